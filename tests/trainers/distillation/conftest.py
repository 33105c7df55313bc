import pytest

from support.given_answers import save_changed
from support.tokenizer import build_other_tokenizer


@pytest.fixture(scope="session")
def teacher_path(model_path, tmp_path_factory):
    return save_changed(model_path, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def wider_teacher_path(model_path, tmp_path_factory):
    """A teacher of another width and more layers, with a padded vocabulary."""
    folder = tmp_path_factory.mktemp("wider-teacher")
    return save_changed(model_path, folder, hidden_size=48, num_hidden_layers=3)


@pytest.fixture(scope="session")
def other_teacher_path(model_path, tmp_path_factory):
    """A teacher with a tokenizer of its own, which is smaller, and another width."""
    folder, tokenizer = tmp_path_factory.mktemp("other-teacher"), build_other_tokenizer()
    return save_changed(model_path, folder, tokenizer, hidden_size=48, vocab_size=len(tokenizer))
