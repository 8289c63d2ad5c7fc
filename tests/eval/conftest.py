import pytest

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def tiny():
    from longspan.testing.models import tiny_model

    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokens():
    text = "It was the best of times, it was the worst of times; it was the age of wisdom. " * 8
    return list(text.encode())


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors on many threads wait for each other, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
