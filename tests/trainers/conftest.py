import pytest

from support.models import save_tiny_classifier, save_tiny_model
from support.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), build_tokenizer())


@pytest.fixture(scope="session")
def reward_model_path(tmp_path_factory):
    return save_tiny_classifier(tmp_path_factory.mktemp("tiny-reward"), build_tokenizer())
