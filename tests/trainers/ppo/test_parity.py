"""PPOTrainer against padded matrices and plain forward passes: every metric, and both models' weights afterwards."""

import copy
from statistics import fmean, variance

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trl_fast
import trl_fast.data.packing as packing
from support.dense_ppo import DensePPO
from support.rollouts import FixedEngine, color_prompts
from support.training import make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

ROWS = 8
BASE = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "max_steps": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "response_length": 8,
    "stop_token": "eos",
    "num_sample_generations": 0,
    "gradient_checkpointing": False,
}
DENSE = ("kl_coef", "kl_estimator", "missing_eos_penalty", "whiten_rewards", "gamma", "lam", "cliprange")
DENSE += ("cliprange_value", "vf_coef", "temperature", "learning_rate")


@pytest.fixture
def models(model_path, reward_model_path):
    value_model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    with torch.no_grad():
        value_model.score.weight.mul_(-0.5)
    return {
        "model": AutoModelForCausalLM.from_pretrained(model_path),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
        "value_model": value_model,
    }


@pytest.fixture
def compare(models, tokenizer, tmp_path, monkeypatch):
    """Runs both; rollouts, mini-batches and micro-batches are the same ones."""

    def run(**settings):
        settings = {**BASE, **settings}
        dense = DensePPO(
            *(copy.deepcopy(models[name]) for name in ("model", "value_model", "reward_model")),
            eos=tokenizer.eos_token_id,
            **{name: settings[name] for name in DENSE if name in settings},
        )
        dataset = color_prompts(ROWS)
        arguments = {**models, "processing_class": tokenizer, "ref_model": None, "train_dataset": dataset}
        arguments["rollout_engine"] = FixedEngine(tokenizer, longest=5)
        trainer = make_trainer(trl_fast, tmp_path, method="PPO", arguments=arguments, **settings)
        rollouts = []
        judge = trainer.loop.judge

        def keep(rows, rollout, *further):
            rollouts.append([*zip(rollout.prompt_ids, rollout.completion_ids, strict=True)])
            return judge(rows, rollout, *further)

        monkeypatch.setattr(trainer.loop, "judge", keep)
        minis = [torch.tensor([3, 0, 6, 1]), torch.tensor([7, 2, 5, 4])]
        monkeypatch.setattr(trainer, "_mini_batches", lambda count: iter(minis * settings["num_ppo_epochs"]))
        trainer.train()
        logs = [log for log in trainer.state.log_history if "objective/kl" in log]
        assert len(logs) == len(rollouts) == 2
        for rollout, log in zip(rollouts, logs, strict=True):
            expected = {name: value.item() for name, value in dense.collect(rollout).items()}
            by_micro_batch = []
            for mini in minis * settings["num_ppo_epochs"]:
                by_micro_batch += dense.update([part.tolist() for part in mini.split(2)])
            for name in by_micro_batch[0]:
                expected[name] = fmean(metrics[name] for metrics in by_micro_batch)
            expected["val/ratio_var"] = variance(metrics["val/ratio"] for metrics in by_micro_batch)
            expected["val/num_eos_tokens"] = sum(tokenizer.eos_token_id in ids for _, ids in rollout)
            assert {name: log[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=2e-5)
        for ours, theirs in ((trainer.model, dense.policy), (trainer.value_model, dense.value_model)):
            for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(
                    weight, other, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
                )
        return logs

    return run


SETTINGS = {
    "defaults": {},
    "k3, whitened rewards, penalty": {"kl_estimator": "k3", "whiten_rewards": True, "missing_eos_penalty": 1.5},
    "discount": {"gamma": 0.9, "lam": 0.8, "temperature": 1.3, "kl_coef": 0.5},
    "clipped": {"cliprange": 0.02, "cliprange_value": 0.02, "vf_coef": 1.0, "num_ppo_epochs": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings, compare):
    logs = compare(**settings)
    if "cliprange" in settings:
        assert logs[-1]["policy/clipfrac_avg"] > 0 and logs[-1]["val/clipfrac_avg"] > 0


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_layouts(layout, compare, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    compare(batch_layout=layout)
