"""Checkpointing is switched by whichever name transformers has, without a word about the other."""

from __future__ import annotations

from functools import partial

import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from support.models import tiny_model
from trl_fast.modeling.checkpointing import disable_checkpointing, enable_checkpointing, is_checkpointing
from trl_fast.modeling.reference_policy import freeze
from trl_fast.modeling.selective_checkpointing import _layer_of

pytestmark = pytest.mark.filterwarnings("error:.*checkpointing_(en|dis)able:FutureWarning")


@pytest.fixture(params=["as installed", "before 5.20"])
def transformers_names(request, monkeypatch):
    """The methods of the transformers that is installed, or those alone that 5.17 has."""
    if request.param == "as installed" or not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        return
    for verb in ("enable", "disable"):
        older = getattr(PreTrainedModel, f"_activation_checkpointing_{verb}")
        monkeypatch.delattr(PreTrainedModel, f"activation_checkpointing_{verb}")
        monkeypatch.setattr(PreTrainedModel, f"gradient_checkpointing_{verb}", older)
    monkeypatch.delattr(PreTrainedModel, "is_activation_checkpointing")


@pytest.mark.parametrize("lora", [False, True])
def test_on_and_off(transformers_names, lora):
    model = tiny_model()
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    layers = model.get_decoder().layers
    assert not is_checkpointing(model)
    enable_checkpointing(model, {"use_reentrant": True})
    assert is_checkpointing(model) and all(layer.gradient_checkpointing for layer in layers)
    assert all(layer._gradient_checkpointing_func.keywords == {"use_reentrant": True} for layer in layers)
    disable_checkpointing(model)
    assert not is_checkpointing(model)


def test_a_frozen_model_keeps_nothing_to_compute_again(transformers_names):
    model = tiny_model()
    enable_checkpointing(model)
    assert not is_checkpointing(freeze(model))


def test_the_layer_is_found_in_what_each_version_hands_over():
    layer = tiny_model().model.layers[0]
    # transformers from 5.20 on, and before: there the method is that of the class above.
    assert _layer_of(partial(type(layer).forward, layer, position_ids=None)) is layer
    assert _layer_of(partial(super(type(layer), layer).__call__, position_ids=None)) is layer
    assert _layer_of(print) is None
