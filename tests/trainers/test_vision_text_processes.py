"""Models that read images too, trained on text in two processes: they train as one process does."""

from __future__ import annotations

import re
from functools import partial
from itertools import product

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import set_seed

import trl_fast
from support.ranks import RankError, run_on_ranks
from support.tokenizer import build_tokenizer
from support.training import color_pairs, make_trainer
from support.vision_models import tiny_vision_model
from trl_fast.modeling.loading import load_causal_lm
from trl_fast.trainers.base.trainer import BaseTrainer

pytestmark = pytest.mark.processes

# Modules of images, by the names that families have for them.
VISION = re.compile(r"\.(visual|vision_tower|embed_vision|multi_modal_projector)\.")

# Plain steps: Adam makes of a rounding a step where a gradient is nearly nothing.
SETTINGS = {"gradient_accumulation_steps": 1, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}


@pytest.fixture(autouse=True)
def seeded_adapters(monkeypatch):
    """Adapters begin with the same random numbers, however many an engine's way to load a model uses up."""

    def load_and_seed(*args, **kwargs):
        model = load_causal_lm(*args, **kwargs)
        set_seed(0)
        return model

    monkeypatch.setattr(BaseTrainer, "load_model", staticmethod(load_and_seed))


def save_model(folder, family, **changes):
    """The folder of a model; a router's loss, which is a mean over the rows of a process, does not count."""
    size = len(build_tokenizer())
    changes |= {"vocab_size_per_layer_input": size} if family == "gemma4" else {}
    model = tiny_vision_model(family, vocab_size=size, router_aux_loss_coef=0.0, **changes)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.9)
    model.save_pretrained(folder)
    return str(folder)


def train(model, folder, batch_size=2, *, lora=False):
    """The layout, the numbers of each step, and the weights that are saved."""
    arguments = {"model": model, "processing_class": build_tokenizer(), "train_dataset": color_pairs(12)}
    if lora:
        arguments["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    settings = {**SETTINGS, "per_device_train_batch_size": batch_size}
    trainer = make_trainer(trl_fast, folder, arguments={**arguments, "eval_dataset": None}, **settings)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    weights = load_file(next(folder.glob("*model.safetensors")))
    return trainer.layout.name, [(log["loss"], log["grad_norm"]) for log in logs], weights


QUICK = [("gemma4", "fsdp2", False)]
REST = [*product(("gemma4", "qwen3_5", "qwen3_vl", "gemma3"), ("ddp", "fsdp2", "zero3"), (False, True))]
REST += [("qwen3_vl_moe", engine, lora) for engine in ("ddp", "fsdp2") for lora in (False, True)]


@pytest.mark.parametrize(
    ("family", "engine", "lora"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST if case not in QUICK)],
)
def test_two_processes_train_as_one(family, engine, lora, tmp_path):
    """Gemma 4 has buffers in its files, and reads its embeddings where they are not called; Qwen3.5 a convolution."""
    model = save_model(tmp_path / "model", family)
    (layout, steps, weights), _ = run_on_ranks(partial(train, model, tmp_path / "two", lora=lora), engine=engine)
    expected = train(model, tmp_path / "one", 4, lora=lora)
    assert layout == expected[0] == "shared_prefix"
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected[1]), rtol=1e-5, atol=1e-6)
    # Of an adapter DeepSpeed saves only what trains: what text does not reach is frozen, as it began.
    unsaved = expected[2].keys() - weights.keys() if lora and engine == "zero3" else set()
    assert weights.keys() == expected[2].keys() - {name for name in unsaved if VISION.search(name)}
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, expected[2][name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_expert_weights_that_zero3_would_transpose(tmp_path):
    """Those that transformers has saved itself are refused; those of the first checkpoints have to be transposed."""
    # No weight of an expert is square, so that its shape tells whether it is transposed.
    model = save_model(tmp_path / "model", "qwen3_vl_moe", moe_intermediate_size=24)
    with pytest.raises(RankError, match=r"mlp.experts.\w+ has the shape \[4, .* train with FSDP2"):
        run_on_ranks(partial(train, model, tmp_path / "two"), engine="zero3")
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: w.mT.contiguous() if ".experts." in name else w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    (_, steps, _), _ = run_on_ranks(partial(train, model, tmp_path / "two"), engine="zero3")
    _, expected, _ = train(model, tmp_path / "one", 4)
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-5, atol=1e-6)
