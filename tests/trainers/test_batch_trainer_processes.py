"""Online DPO and A*-PO on two ranks: what one process computes."""

import os
import random

import pytest
import torch
from peft import LoraConfig

import trl_fast
from support.ranks import run_on_ranks
from support.rollouts import color_prompts
from support.training import NOT_COMPARED, make_trainer
from trl_fast.rollout import Rollout

pytestmark = pytest.mark.processes

SETTINGS = {"gradient_accumulation_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
CASES = {
    "online dpo": ("OnlineDPO", {"max_new_tokens": 8, "missing_eos_penalty": 1.0, "beta": 0.3}),
    "online dpo, lora": ("OnlineDPO", {"max_new_tokens": 8, "peft": True}),
    "a2po": ("A2PO", {"max_completion_length": 8, "num_value_samples": 4, "beta2": 0.05}),
}


class Scripted:
    """An engine of which a completion depends on its prompt, its place among the prompt's own, and the step only."""

    def sync_weights(self, model, step):
        self.step = step

    def generate(self, prompt_ids, settings):
        places = [prompt_ids[:index].count(prompt) for index, prompt in enumerate(prompt_ids)]
        return Rollout(prompt_ids, [self._complete(*each) for each in zip(prompt_ids, places, strict=True)])

    def _complete(self, prompt, place):
        rng = random.Random(f"{prompt} {place} {self.step}")
        ids = [rng.randrange(6, 300) for _ in range(rng.randint(1, 7))]
        return ids + [1] * (rng.random() < 0.7)


def remainder(completion_ids, **_):
    return [float(sum(ids) % 7 > 2) for ids in completion_ids]


def train(case, model_path, folder):
    method, settings = CASES[case]
    settings = {**SETTINGS, **settings}
    arguments = {
        "model": model_path,
        "reward_funcs": remainder,
        "train_dataset": color_prompts(),
        "rollout_engine": Scripted(),
    }
    if settings.pop("peft", False):
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings["per_device_train_batch_size"] = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    trainer.train()
    logs = [
        {name: value for name, value in log.items() if not any(part in name for part in NOT_COMPARED)}
        for log in trainer.state.log_history[:-1]
    ]
    return {"logs": logs, "weights": torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])}


@pytest.mark.parametrize(
    "case", ["online dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in [*CASES][1:])]
)
def test_two_ranks_compute_what_one_does(case, model_path, tmp_path):
    alone = train(case, model_path, tmp_path / "alone")
    ranks = run_on_ranks(lambda: train(case, model_path, tmp_path / "ranks"), engine="ddp")
    assert ranks[0]["logs"] == ranks[1]["logs"]
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=0, atol=1e-6)
    for ours, theirs in zip(ranks[0]["logs"], alone["logs"], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
