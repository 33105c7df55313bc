"""ORPO and BCO in two processes: ORPO against TRL's in two, BCO's mean of rewards over both."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import trl_fast
from support.models import save_tiny_model
from support.ranks import run_on_ranks
from support.reference_free import trls
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer

pytestmark = pytest.mark.processes

SIZES = {"gradient_accumulation_steps": 1, "max_steps": 2}


def train_orpo(module, model_path, folder):
    arguments = {"model": model_path, "train_dataset": color_pairs(16), "eval_dataset": color_pairs(8)}
    trainer = make_trainer(module, folder, method="ORPO", arguments=arguments, **SIZES)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


@pytest.mark.slow
def test_orpo(tmp_path):
    """Prompts and answers are of the same lengths in both processes, since each of TRL's takes its own mean."""
    path = save_tiny_model(tmp_path / "model", build_tokenizer(add_bos=True))
    ours, theirs = (
        run_on_ranks(train_orpo, module, path, tmp_path / name)[0]
        for name, module in (("ours", trl_fast), ("trl", trls("ORPO")))
    )
    uneven = ("nll_loss", "eval_nll_loss", "logits/chosen", "logits/rejected", "eval_logits/chosen")
    for log in (*ours, *theirs):
        for name in (*uneven, "eval_logits/rejected"):
            log.pop(name, None)
    assert_same_logs(ours, theirs)


def train_bco(model_path, folder, ranks):
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    reference.model.norm.weight.data.mul_(1.6)
    arguments = {"model": model_path, "ref_model": reference, "train_dataset": color_labels(16)}
    sizes = SIZES | {"per_device_train_batch_size": 8 // ranks, "beta": 0.4, "optim": "sgd", "learning_rate": 0.1}
    trainer = make_trainer(trl_fast, folder, method="BCO", arguments=arguments, **sizes)
    trainer.train()
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return trainer.running.mean, trainer.running.count, trainer.state.log_history[:2], weights


@pytest.mark.slow
def test_bco(model_path, tmp_path):
    ranks = run_on_ranks(train_bco, model_path, tmp_path / "two", 2)
    mean, count, logs, weights = train_bco(model_path, tmp_path / "one", 1)
    for found, number, own_logs, own in ranks:
        assert number == count == 16 and found == pytest.approx(mean, rel=1e-5)
        torch.testing.assert_close(own, weights, rtol=0, atol=1e-6)
        assert_same_logs(own_logs, logs, rel=1e-4)
