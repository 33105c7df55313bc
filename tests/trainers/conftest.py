import datasets
import pytest
from datasets.fingerprint import generate_random_fingerprint

import trl_fast.data.packing as packing
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


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saves a tiny model that reads images, with its processor, once a family: from its name to the folder's."""
    from support.vision_processors import save_tiny_vision_model

    made = {}

    def folder(family):
        if family not in made:
            made[family] = save_tiny_vision_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture
def unnamed_datasets(monkeypatch):
    """Names datasets at random: names from the code of all that changed them take a tiny trainer a tenth of its time.

    Only caches on disk need the names. For modules whose trainers read no cache.
    """
    for module in (datasets.arrow_dataset, datasets.fingerprint):
        monkeypatch.setattr(module, "generate_fingerprint", lambda *_: generate_random_fingerprint())
        monkeypatch.setattr(module, "update_fingerprint", lambda *_: generate_random_fingerprint())


@pytest.fixture(params=["shared_prefix", "packed", "padded"])
def layout(request, monkeypatch):
    """Each layout in turn; the test's short prompts are shared too."""
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    return request.param


@pytest.fixture(
    params=["shared_prefix", *(pytest.param(name, marks=pytest.mark.slow) for name in ("packed", "padded"))]
)
def main_layout(request, monkeypatch):
    """The layout that is the default where several settings are tried; the others are slow tests."""
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    return request.param
