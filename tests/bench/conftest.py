import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors on many threads wait for each other, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
