"""The arguments about a model's layers reach every model that they concern."""

import pytest
import torch

import trl_fast
from support.models import tiny_model
from trl_fast.trainers.base.model_setup import set_up_layers


@pytest.mark.parametrize("trains", [True, False])
def test_a_model_that_trains_keeps_and_offloads_and_a_reference_does_not(trains, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    model = tiny_model("llama")
    settings = {"tiled_mlp": 16, "activation_offloading": True, "activation_budget_bytes": 7, "use_cpu": True}
    set_up_layers(model, trl_fast.DPOConfig(str(tmp_path), bf16=False, **settings), trains=trains)
    assert all(layer.mlp.tile_tokens == 16 for layer in model.model.layers)
    assert hasattr(model.model, "forward_kept") == trains
    assert hasattr(model, "trl_fast_selective_checkpointing") == trains
    assert not trains or (
        model.trl_fast_selective_checkpointing.limit,
        model.trl_fast_selective_checkpointing.whole_layers,
    ) == (7, False)
