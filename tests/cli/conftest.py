import json

import pytest

from support.models import save_tiny_classifier, save_tiny_model
from support.tokenizer import build_tokenizer
from support.training import color_pairs


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), build_tokenizer())


@pytest.fixture(scope="session")
def reward_model_path(tmp_path_factory):
    return save_tiny_classifier(tmp_path_factory.mktemp("tiny-reward"), build_tokenizer())


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in color_pairs(16)))
    return path
