"""Two processes that share every weight (tensor parallelism) train as one does on the same rows.

Sums over what the two have are in another order than one process's: 1e-6 is allowed, relative, for losses and norms.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import ParallelismConfig
from safetensors.torch import load_file

import trl_fast
from support.models import save_tiny_model
from support.ranks import run_on_ranks
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer

pytestmark = pytest.mark.processes

DATA = {"SFT": sft_rows("prompt and completion", 16), "KTO": color_labels(16), "DPO": color_pairs(16)}
DATA |= {"Reward": DATA["DPO"], "ORPO": DATA["DPO"], "BCO": DATA["KTO"]}


@pytest.fixture(scope="module")
def tied_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-qwen2"), build_tokenizer(), "qwen2")


def train(method, model, folder, ranks, **settings):
    """The logs of a short run and of an evaluation, the weights after it, and how many of their elements are here.

    The weights are saved too, whole. It is SGD: Adam makes a whole step of a gradient that is nothing but rounding.
    """
    if ranks > 1:
        settings["parallelism_config"] = ParallelismConfig(tp_size=ranks)
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, **settings}
    arguments = {"model": model, "train_dataset": DATA[method], "eval_dataset": DATA[method]}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    trainer.train()
    # A head that is scored wrongly would be given up for the model's own logits.
    assert method == "Reward" or trainer.model.trl_fast_fused_head
    logs = [log for log in trainer.state.log_history if "loss" in log]
    logs.append({"loss": trainer.evaluate()["eval_loss"], "grad_norm": 0.0})
    trainer.save_model(str(folder / "saved"))
    return logs, whole_weights(trainer.model), held(trainer.model)


def whole_weights(model):
    named = {name: weight.detach() for name, weight in model.named_parameters()}
    return {name: getattr(weight, "full_tensor", lambda weight=weight: weight)() for name, weight in named.items()}


def held(model):
    """The elements of all weights that this process holds."""
    return sum(getattr(weight, "_local_tensor", weight).numel() for weight in model.parameters())


SLOW = ("DPO", "KTO", "Reward", "ORPO", "BCO")


@pytest.mark.parametrize("method", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in DATA])
def test_two_processes_train_as_one(method, model_path, reward_model_path, tied_path, tmp_path):
    models = (
        [reward_model_path] if method == "Reward" else [model_path, tied_path] if method == "DPO" else [model_path]
    )
    for number, model in enumerate(models):
        folder = tmp_path / str(number)
        ranks = run_on_ranks(lambda model=model, folder=folder: train(method, model, folder / "two", 2))
        one, weights, elements = train(method, model, folder / "one", 1)
        for logs, found, own in ranks:
            # Metrics are differences of sums of log-probabilities, of which each is rounded.
            assert_same_logs(logs, one, rel=1e-5, abs=1e-5)
            for name in ("loss", "grad_norm"):
                assert [log[name] for log in logs] == pytest.approx([log[name] for log in one], rel=1e-6)
            assert found.keys() == weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            assert own < 0.52 * elements
        saved = [load_file(folder / kind / "saved/model.safetensors") for kind in ("one", "two")]
        # Of a tied head transformers writes the parts that are gathered twice.
        assert saved[1].keys() - saved[0].keys() <= {"lm_head.weight"}
        for name, weight in saved[0].items():
            torch.testing.assert_close(saved[1][name], weight, rtol=0, atol=1e-6)
