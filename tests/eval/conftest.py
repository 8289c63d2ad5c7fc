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
