"""Two processes that share the tokens of each row (Ulysses) train as one does on the same rows."""

from __future__ import annotations

import pytest
import torch
from accelerate import ParallelismConfig

import trl_fast
import trl_fast.data.packing as packing
from support.ranks import run_on_ranks
from support.supervised import sft_rows
from support.training import assert_same_logs, color_pairs, make_trainer

pytestmark = pytest.mark.processes

DATA = {"SFT": sft_rows("prompt and completion", 16), "DPO": color_pairs(16), "ORPO": color_pairs(16)}


def train(method, model, folder, ranks, **settings):
    """The logs of a short run, the loss of an evaluation, the weights, and the most tokens that a layer has seen."""
    if ranks > 1:
        settings["parallelism_config"] = ParallelismConfig(sp_size=ranks)
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, **settings}
    arguments = {"model": model, "train_dataset": DATA[method], "eval_dataset": DATA[method]}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    seen = []
    embeddings = trainer.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    trainer.train()
    hook.remove()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluated = trainer.evaluate()["eval_loss"]
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    return logs, evaluated, weights, max(seen)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_rows_are_shared_beside_an_engine_that_shares_the_model(engine, model_path, tmp_path):
    def steps(ranks):
        settings = {"parallelism_config": ParallelismConfig(sp_size=ranks)} if ranks > 1 else {}
        settings |= {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "batch_layout": "packed"}
        arguments = {"model": model_path, "train_dataset": DATA["DPO"]}
        trainer = make_trainer(trl_fast, tmp_path / str(ranks), method="DPO", arguments=arguments, **settings)
        trainer.train()
        return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]

    one = steps(1)
    for found in run_on_ranks(lambda: steps(2), engine=engine):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(one), rtol=5e-7, atol=1e-7)


REST = [("SFT", "packed"), ("DPO", "packed"), ("ORPO", "shared_prefix")]


@pytest.mark.parametrize(
    "method, layout",
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in REST), ("DPO", "shared_prefix")],
)
def test_two_processes_train_as_one(method, layout, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    settings = {"batch_layout": layout}
    ranks = run_on_ranks(lambda: train(method, model_path, tmp_path / "two", 2, **settings))
    one, evaluated, weights, tokens = train(method, model_path, tmp_path / "one", 1, **settings)
    for logs, found, own, part in ranks:
        assert part == -(-tokens // 2)
        # Metrics are differences of sums of log-probabilities, of which each is rounded.
        assert_same_logs(logs, one, rel=1e-5, abs=1e-5)
        for name in ("loss", "grad_norm"):
            assert [log[name] for log in logs] == pytest.approx([log[name] for log in one], rel=5e-7)
        assert found == pytest.approx(evaluated, rel=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(own[name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
