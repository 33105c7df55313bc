"""SDPO on two ranks, by each engine: what one process computes, also of a group that is on both."""

import os
import random

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig

import trl_fast
from support.ranks import run_on_ranks
from support.rewarded_prompts import prompts_with_feedback
from support.training import NOT_COMPARED, make_trainer
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import Rollout

pytestmark = pytest.mark.processes

# Completions of a generation: groups of four, of which one of three is on both ranks.
GENERATION = 12
SETTINGS = {
    **{"num_generations": 4, "max_completion_length": 8, "optim": "sgd", "learning_rate": 0.05, "max_steps": 3},
    **{"gradient_accumulation_steps": 1, "include_environment_feedback": True, "teacher_update_rate": 0.3},
}
CASES = {
    "sampled": {},
    "both, likeliest, two updates": {
        **{"distillation_mode": "topk_logits", "distillation_topk": 7, "distillation_weight": 0.5},
        **{"num_iterations": 2, "max_steps": 4},
    },
    "all, lora": {"distillation_mode": "full_logits", "peft": True},
    "live": {"teacher_model_kind": "live", "distillation_mode": "full_logits"},
    # Groups change the process.
    "dealt": {"num_generations": 2, "balance_batches": "step"},
}
# Those of the default tests.
QUICK = {"ddp": ["sampled", "both, likeliest, two updates", "dealt"]}
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


class Scripted:
    """An engine of which a completion depends on its prompt, its place among all processes' and the step only."""

    def sync_weights(self, model, step):
        self.step = step

    def generate(self, prompt_ids, settings):
        first = PartialState().process_index * len(prompt_ids)
        return Rollout(prompt_ids, [self._complete(prompt, first + i) for i, prompt in enumerate(prompt_ids)])

    def _complete(self, prompt, place):
        rng = random.Random(f"{prompt} {place} {self.step}")
        return [rng.randrange(6, 300) for _ in range(rng.randint(1, 7))]


def one_of_four(completion_ids, **_):
    return [float(sum(ids) % 4 == 0) for ids in completion_ids]


def train(case, model_path, folder):
    settings, ranks = {**SETTINGS, **CASES[case]}, int(os.environ.get("WORLD_SIZE", "1"))
    arguments = {"model": model_path, "reward_funcs": one_of_four, "train_dataset": prompts_with_feedback()}
    if settings.pop("peft", False):
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments["rollout_engine"] = Scripted()
    settings["per_device_train_batch_size"] = GENERATION // ranks
    trainer = make_trainer(trl_fast, folder, method="SDPO", arguments=arguments, **settings)
    trainer.train()
    logs = [
        {name: value for name, value in log.items() if not any(part in name for part in (*NOT_COMPARED, "step_time"))}
        for log in trainer.state.log_history[:-1]
    ]
    with gathered(trainer.model if trainer.is_fsdp_enabled else trainer.model_wrapped):
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"logs": logs, "weights": weights}


def assert_as_alone(ranks, alone):
    assert ranks[0]["logs"] == ranks[1]["logs"]
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=0, atol=1e-5)
    for ours, theirs in zip(ranks[0]["logs"], alone["logs"], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert all(log["grad_norm"] > 1e-4 for log in alone["logs"])


@pytest.mark.parametrize(
    ("engine", "cases"),
    [
        *QUICK.items(),
        *(
            pytest.param(engine, [case], marks=pytest.mark.slow)
            for engine in ENGINES
            for case in CASES
            if case not in QUICK.get(engine, ())
        ),
    ],
)
def test_two_ranks_compute_what_one_does(engine, cases, model_path, tmp_path):
    ranks = run_on_ranks(
        lambda: {case: train(case, model_path, tmp_path / case) for case in cases}, engine=engine, patience=300
    )
    for case in cases:
        assert_as_alone([rank[case] for rank in ranks], train(case, model_path, tmp_path / "alone" / case))
