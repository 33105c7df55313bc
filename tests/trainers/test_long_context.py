"""Checks that what makes long rows fit, or saves time with memory, changes no number of a training run."""

from __future__ import annotations

import functools
import logging
from unittest import mock

import pytest
import torch
from peft import LoraConfig

import trl_fast
from support.copies import LateCopies
from support.models import tiny_classifier, tiny_model
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling import activation_offloading
from trl_fast.modeling.selective_checkpointing import ATTENTION, PRODUCT, Budget

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

SETTINGS = {"tiled": {"tiled_mlp": 16}, "offloaded": {"activation_offloading": True}}
SETTINGS["both"] = SETTINGS["tiled"] | SETTINGS["offloaded"]


@pytest.fixture
def offloaded(monkeypatch):
    """Copies within the CPU in place of those to and from a GPU; a list of what was copied."""
    copies = LateCopies()
    monkeypatch.setattr("trl_fast.modeling.activation_offloading.torch.cuda.is_available", lambda: True)
    # A CUDA build of torch without a driver would be asked by the optimizer.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(activation_offloading, "is_on_device", lambda tensor: True)
    monkeypatch.setattr(activation_offloading, "copies_of", lambda device: copies)
    return copies.left


def datasets(method):
    pairs = color_pairs(8)
    if method != "SFT":
        return pairs
    return pairs.map(lambda row: {"text": row["prompt"] + row["chosen"]}, remove_columns=pairs.column_names)


def logs(method, output_dir, tokenizer, peft_config=None, **settings):
    build = tiny_classifier if method == "Reward" else tiny_model
    arguments = {
        "model": build(vocab_size=len(tokenizer)),
        "processing_class": tokenizer,
        "train_dataset": datasets(method),
        "peft_config": peft_config,
    }
    trainer = make_trainer(trl_fast, output_dir, method=method, arguments=arguments, **settings)
    trainer.train()
    return trainer, trainer.state.log_history


@pytest.fixture(scope="module")
def plain_logs(tokenizer, tmp_path_factory):
    """From a method to the logs of a training with nothing changed, which is run once."""
    return functools.cache(lambda method: logs(method, tmp_path_factory.mktemp(method), tokenizer)[1])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("method", ["DPO", "SFT", "Reward"])
def test_the_same_training(method, settings, offloaded, plain_logs, tokenizer, tmp_path):
    expected = plain_logs(method)
    assert not offloaded
    trainer, got = logs(method, tmp_path, tokenizer, **settings)
    assert_same_logs(got, expected)
    assert bool(offloaded) == ("activation_offloading" in settings)
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None and "tiled_mlp" in settings:
            assert [layer.mlp.tile_tokens for layer in model.model.layers] == [16, 16]


BUDGETS = {
    "none": {"activation_budget_bytes": 0},
    "some": {"activation_budget_bytes": 80_000},
    "selective": {"gradient_checkpointing_kwargs": {"selective": True}, "activation_budget_bytes": 0},
    "of no use": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def counted_logs(method, folder, tokenizer, **settings):
    """The logs of a training, and how many results of each kind were kept."""
    taken, take = {}, Budget.take

    def counted(self, kind, size):
        found = take(self, kind, size)
        taken[kind] = taken.get(kind, 0) + found
        return found

    with mock.patch.object(Budget, "take", counted):
        return logs(method, folder, tokenizer, **settings)[1], taken


@pytest.fixture(scope="module")
def keeping_all(tokenizer, tmp_path_factory):
    """From a method to logs and counts of a training that keeps all it can, which is run once."""

    @functools.cache
    def keep(method):
        # By default a reward model has as much as its gradients will take, and one as small as this nothing.
        everything = {"activation_budget_bytes": 1 << 30} if method == "Reward" else {}
        return counted_logs(method, tmp_path_factory.mktemp(method), tokenizer, **everything)

    return keep


@pytest.mark.parametrize("settings", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("method", ["DPO", pytest.param("SFT", marks=pytest.mark.slow), "Reward"])
def test_what_checkpointing_keeps_is_what_it_would_compute(method, settings, keeping_all, tokenizer, tmp_path):
    expected, at_most = keeping_all(method)
    got, taken = counted_logs(method, tmp_path, tokenizer, **settings)
    assert_same_logs(got, expected)
    assert min(at_most.values()) > 0 and len(at_most) == 2
    keeps = {"some": (PRODUCT, ATTENTION), "selective": (ATTENTION,)}
    name = next(name for name, value in BUDGETS.items() if value == settings)
    assert {kind for kind, count in taken.items() if count} == set(keeps.get(name, ()))
    assert sum(taken.values()) < sum(at_most.values())


def test_the_same_training_of_an_adapter(offloaded, tokenizer, tmp_path):
    def lora():
        return LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")

    _, expected = logs("DPO", tmp_path, tokenizer, lora(), learning_rate=1e-2)
    _, got = logs("DPO", tmp_path, tokenizer, lora(), learning_rate=1e-2, **SETTINGS["both"])
    assert_same_logs(got, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_offloading_says_once_that_it_does_nothing(tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_fast"):
        logs("DPO", tmp_path, tokenizer, activation_offloading=True)
    assert len([record for record in caplog.records if "activation_offloading" in record.message]) == 1


def test_a_model_without_mlps_to_tile(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="tiled_mlp=16: MambaForCausalLM has no MLP that can be tiled"):
        arguments = {"model": tiny_model("mamba", vocab_size=len(tokenizer)), "processing_class": tokenizer}
        make_trainer(trl_fast, tmp_path, arguments={**arguments, "train_dataset": color_pairs(4)}, tiled_mlp=16)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_router_under_reentrant_checkpointing(reentrant, tokenizer, tmp_path, caplog):
    model = tiny_model("mixtral", vocab_size=len(tokenizer), num_local_experts=4, sliding_window=None)
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": color_pairs(4)}
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, "router_aux_loss_coef": 0.1}
    with caplog.at_level(logging.WARNING, "trl_fast"):
        make_trainer(trl_fast, tmp_path, arguments=arguments, **options)
    assert ("load-balancing loss has no gradient" in caplog.text) == reentrant
