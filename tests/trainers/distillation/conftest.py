import pytest
import torch
from transformers import AutoModelForCausalLM

from support.tokenizer import build_tokenizer


def save_changed(source, folder, **changes):
    """Saves a model like the one at `source` with other weights, and its tokenizer; changes: of its config."""
    model = AutoModelForCausalLM.from_pretrained(source)
    if changes:
        config = type(model.config)(**{**model.config.to_dict(), **changes})
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_path(model_path, tmp_path_factory):
    return save_changed(model_path, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def wider_teacher_path(model_path, tmp_path_factory):
    """A teacher of another width and more layers, with a padded vocabulary."""
    folder = tmp_path_factory.mktemp("wider-teacher")
    return save_changed(model_path, folder, hidden_size=48, num_hidden_layers=3)
