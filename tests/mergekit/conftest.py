import cases
import pytest


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The golden models, without embeddings where all leaves do not matter."""
    path = tmp_path_factory.mktemp("golden")
    cases.write_models(path, vocabulary=False)
    return path


@pytest.fixture(scope="session")
def vocabulary_root(tmp_path_factory):
    """The golden models that have embeddings, and tokenizers."""
    path = tmp_path_factory.mktemp("vocabulary")
    cases.write_models(path, vocabulary=True)
    return path
