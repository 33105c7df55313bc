"""Who divides a loss by the accumulation steps is the same whatever version of transformers is below."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from trl_fast.trainers.base.hf_trainer import check_low_bits, declare_loss_scaling, forbid_data_parallel


@pytest.mark.parametrize("scaled", [True, False, None])
def test_versions_without_the_declaration_are_told_otherwise(monkeypatch, scaled):
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    trainer = SimpleNamespace(
        loss_is_scaled_for_ga=scaled, model_accepts_loss_kwargs=True, compute_loss_func=None, compute_loss=print
    )
    declare_loss_scaling(trainer)
    # What `training_step` of those versions asks, where the items of a batch are counted and where they are not.
    for items in (12, None):
        divides = (not trainer.model_accepts_loss_kwargs or items is None) and trainer.compute_loss_func is None
        assert divides == {True: False, False: True, None: items is None}[scaled]


def test_data_parallel_is_refused():
    forbid_data_parallel(SimpleNamespace(args=SimpleNamespace(n_gpu=1)))
    with pytest.raises(ValueError, match="SimpleNamespace does not run under nn.DataParallel.*accelerate launch"):
        forbid_data_parallel(SimpleNamespace(args=SimpleNamespace(n_gpu=2)))


def test_4_bit_weights_of_another_storage_are_refused_under_fsdp():
    def quantized(storage):
        config = SimpleNamespace(bnb_4bit_quant_storage=storage)
        quantizer = SimpleNamespace(quantization_config=config)
        return SimpleNamespace(is_loaded_in_4bit=True, hf_quantizer=quantizer, dtype=torch.bfloat16)

    check_low_bits(quantized(torch.bfloat16))
    check_low_bits(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="bnb_4bit_quant_storage=uint8.*set bnb_4bit_quant_storage='bfloat16'"):
        check_low_bits(quantized(torch.uint8))


def test_8_bit_weights_are_refused_under_fsdp():
    with pytest.raises(ValueError, match="load_in_8bit=True: FSDP shards no weights of 8 bits; load in 4 bits"):
        check_low_bits(SimpleNamespace(is_loaded_in_8bit=True))
