"""Online DPO and A*-PO on two ranks, by each engine: what one process computes."""

import os
import random

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule

import trl_fast
from support.ranks import run_on_ranks
from support.rollouts import color_prompts
from support.training import NOT_COMPARED, make_trainer
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import EngineWrapper, Rollout

pytestmark = pytest.mark.processes

# Small steps: at 0.1 the KL of online DPO is 1.1e-5 from one process, at 0.05 1.01e-6, by rounding.
SETTINGS = {"gradient_accumulation_steps": 1, "optim": "sgd", "learning_rate": 0.02, "max_steps": 3}
CASES = {
    # A small beta: float32 has steps of 4e-6 for a completion's log-probability of -36, and the loss is beta times as
    # far off. With 0.3, one process whose weights begin an ulp away from its own is up to 1.1e-6 from itself.
    "online dpo": ("OnlineDPO", {"max_new_tokens": 8, "missing_eos_penalty": 1.0, "beta": 0.05}),
    "online dpo, lora": ("OnlineDPO", {"max_new_tokens": 8, "peft": True}),
    "online dpo, generated": ("OnlineDPO", {"max_new_tokens": 8, "generates": True}),
    "a2po": ("A2PO", {"max_completion_length": 8, "num_value_samples": 4, "beta2": 0.05}),
    "a2po, lora": ("A2PO", {"max_completion_length": 8, "num_value_samples": 4, "beta2": 0.05, "peft": True}),
    "a2po, generated": ("A2PO", {"max_completion_length": 8, "generates": True, "filter_all_incorrect": False}),
    # Two values leave 10 of 12 prompts: accelerate would fill a last step of two up with the epoch's first prompts.
    "a2po, some prompts": (
        "A2PO",
        {"max_completion_length": 8, "generates": True, "num_value_samples": 2, "dataloader_drop_last": True},
    ),
}
# Those of the default tests.
QUICK = {"ddp": ["online dpo"], "fsdp2": ["online dpo", "online dpo, generated", "a2po, generated"]}
ENGINES = ("ddp", "fsdp2", "fsdp1", "zero2", "zero3")


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


class Shortened(EngineWrapper):
    """Cuts completions to lengths that depend on their place among the prompt's: greedy ones would be equal."""

    def generate(self, prompt_ids, settings):
        found = self.engine.generate(prompt_ids, settings)
        places = [prompt_ids[:index].count(prompt) for index, prompt in enumerate(prompt_ids)]
        cut = [ids[: 2 + place] for ids, place in zip(found.completion_ids, places, strict=True)]
        return Rollout(prompt_ids, cut)


def remainder(completion_ids, **_):
    return [float(sum(ids) % 7 > 2) for ids in completion_ids]


def train(case, model_path, folder):
    method, settings = CASES[case]
    settings = {**SETTINGS, **settings}
    arguments = {"model": model_path, "reward_funcs": remainder, "train_dataset": color_prompts()}
    if settings.pop("peft", False):
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    generates = settings.pop("generates", False)
    if generates:
        settings["generation_kwargs"] = {"do_sample": False}
    else:
        arguments["rollout_engine"] = Scripted()
    settings["per_device_train_batch_size"] = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    if generates:
        trainer.engine = Shortened(trainer.engine)
    trainer.train()
    logs = [
        {name: value for name, value in log.items() if not any(part in name for part in NOT_COMPARED)}
        for log in trainer.state.log_history[:-1]
    ]
    with gathered(trainer.model if trainer.is_fsdp_enabled else trainer.model_wrapped):
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"logs": logs, "weights": weights}


def assert_as_alone(ranks, alone):
    assert ranks[0]["logs"] == ranks[1]["logs"]
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=0, atol=1e-6)
    for ours, theirs in zip(ranks[0]["logs"], alone["logs"], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=5e-7, abs=1e-7), name
    assert all(log["grad_norm"] > 1e-3 for log in alone["logs"])


@pytest.mark.parametrize(
    ("engine", "cases"),
    [
        *QUICK.items(),
        *(
            pytest.param(engine, [case for case in CASES if case not in QUICK.get(engine, ())], marks=pytest.mark.slow)
            for engine in ENGINES
        ),
    ],
)
def test_two_ranks_compute_what_one_does(engine, cases, model_path, tmp_path):
    ranks = run_on_ranks(
        lambda: {case: train(case, model_path, tmp_path / case) for case in cases}, engine=engine, patience=300
    )
    for case in cases:
        assert_as_alone([rank[case] for rank in ranks], train(case, model_path, tmp_path / "alone" / case))


class Watching(Scripted):
    """Notes of each rollout whether FSDP2 has the policy's weights in parts."""

    def __init__(self):
        self.in_parts = []

    def sync_weights(self, model, step):
        super().sync_weights(model, step)
        self.in_parts.append(any(isinstance(module, FSDPModule) for module in model.modules()))


def test_values_are_estimated_by_a_policy_in_parts(model_path, tmp_path):
    def estimate():
        arguments = {"model": model_path, "reward_funcs": remainder, "train_dataset": color_prompts()}
        watching = Watching()
        arguments["rollout_engine"] = watching
        trainer = make_trainer(trl_fast, tmp_path, method="A2PO", arguments=arguments, max_completion_length=8)
        trainer.estimate_values()
        return watching.in_parts

    assert run_on_ranks(estimate, engine="fsdp2") == [[True, True]] * 2


def test_a_failure_while_values_are_estimated_ends_both(model_path, tmp_path, monkeypatch):
    scores = trl_fast.A2POTrainer._scores

    def fail_in_one(trainer, rewards):
        if PartialState().process_index == 1:
            raise LookupError("no scores")
        return scores(trainer, rewards)

    monkeypatch.setattr(trl_fast.A2POTrainer, "_scores", fail_in_one)

    def failure():
        with pytest.raises(LookupError) as error:
            train("a2po", model_path, tmp_path)
        return str(error.value)

    assert run_on_ranks(failure) == ["process 1 failed: no scores", "no scores"]
