"""Kernels of others in the layers, and compiled layers: a run's numbers in every layout, tiled and checkpointed."""

from __future__ import annotations

import functools

import pytest
import torch

import trl_fast
from support.liger_kernels import Swiglu, put_hub_in_place, put_liger_in_place
from support.models import tiny_model
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.scoring import evaluating

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

LAYOUTS = ("shared_prefix", "packed", "padded")
CHECKPOINTING = {
    "kept": {},
    "selective": {"gradient_checkpointing_kwargs": {"selective": True}, "activation_budget_bytes": 0},
}


def run(tokenizer, output_dir, prepare=lambda model: None, **settings):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    prepare(model)
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": color_pairs(8)}
    trainer = make_trainer(trl_fast, output_dir, arguments=arguments, **settings)
    trainer.train()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def plain_run(tokenizer, tmp_path_factory):
    """From a layout and what is checkpointed to the logs of transformers' own layers, which are run once."""

    @functools.cache
    def logs(layout, checkpointing="kept"):
        return run(tokenizer, tmp_path_factory.mktemp("plain"), batch_layout=layout, **CHECKPOINTING[checkpointing])

    return logs


# Every pair of layout, tile and checkpointing.
LAYERS = [
    ("shared_prefix", None, "kept"),
    ("shared_prefix", 16, "selective"),
    ("packed", None, "selective"),
    ("packed", 16, "kept"),
    ("padded", None, "kept"),
    ("padded", 16, "selective"),
]


@pytest.mark.parametrize("layout, tile, checkpointing", LAYERS)
def test_liger(layout, tile, checkpointing, plain_run, tokenizer, tmp_path, monkeypatch):
    settings = {"batch_layout": layout, **CHECKPOINTING[checkpointing]}
    expected = plain_run(layout, checkpointing)
    put_liger_in_place(monkeypatch)
    got = run(tokenizer, tmp_path, use_liger_kernel=True, tiled_mlp=tile, **settings)
    assert_same_logs(got, expected, rel=1e-5, abs=1e-6)
    assert Swiglu.seen and (tile is None or max(Swiglu.seen) <= tile)


@pytest.mark.parametrize("tile", [None, 16], ids=["whole", "tiled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hub(layout, tile, plain_run, tokenizer, tmp_path, monkeypatch):
    expected = plain_run(layout)
    modes = put_hub_in_place(monkeypatch)
    use_kernels = lambda model: model.set_use_kernels(True)  # noqa: E731
    got = run(tokenizer, tmp_path, use_kernels, batch_layout=layout, tiled_mlp=tile)
    assert_same_logs(got, expected, rel=1e-5, abs=1e-6)
    assert Swiglu.seen and (tile is None or max(Swiglu.seen) <= tile)
    assert set(modes) == {True, False}


def test_after_an_evaluation_the_hubs_kernels_are_those_for_training(monkeypatch):
    modes = put_hub_in_place(monkeypatch)
    model = tiny_model()
    model.set_use_kernels(True)
    model.model.layers[0].mlp.training = False
    with evaluating(model):
        assert modes == [True, False]
    assert modes[-1]
    assert model.training and not model.model.layers[0].mlp.training


@pytest.mark.slow
@pytest.mark.parametrize("tile", [None, 16], ids=["whole", "tiled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled(layout, tile, tokenizer, tmp_path):
    expected = run(tokenizer, tmp_path, batch_layout=layout)
    torch._dynamo.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "tiled_mlp": tile}
    try:
        got = run(tokenizer, tmp_path, batch_layout=layout, **compiled)
    finally:
        torch._dynamo.reset()
    assert_same_logs(got, expected, rel=1e-5, abs=1e-6)


# ---- what cannot be


def test_without_liger(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_fast.modeling.liger_kernels.is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="use_liger_kernel=True needs liger-kernel: `pip install liger-kernel`"):
        run(tokenizer, tmp_path, use_liger_kernel=True)


def test_liger_on_a_cpu(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_fast.modeling.liger_kernels.is_liger_kernel_available", lambda: True)
    with pytest.raises(ValueError, match="use_liger_kernel=True: Liger's kernels run on a GPU, not on a cpu"):
        run(tokenizer, tmp_path, use_liger_kernel=True)


def test_a_family_that_liger_does_not_know(tokenizer, tmp_path, monkeypatch, caplog):
    put_liger_in_place(monkeypatch)
    monkeypatch.setattr("liger_kernel.transformers.monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN", {})
    run(tokenizer, tmp_path, use_liger_kernel=True)
    assert (
        "use_liger_kernel=True has no effect: this version of Liger has no kernels for LlamaForCausalLM" in caplog.text
    )
