"""GRPO, GMPO and RLOO on two ranks, by each engine: what one process computes; one failure stops both."""

import os
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig

import trl_fast
from support.models import save_tiny_classifier
from support.ranks import run_on_ranks
from support.rollouts import color_prompts
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, make_trainer
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import EngineWrapper, Rollout, SamplingSettings
from trl_fast.rollout.vllm_engine import VLLMServerEngine

pytestmark = pytest.mark.processes

# Completions of a generation: groups of four, of which one of three is on both ranks.
GENERATION = 12
# Small steps: at 0.1 a norm of FSDP2's gradients is 5.1e-7 from one process, at 0.05 6.1e-7, by rounding.
SETTINGS = {"num_generations": 4, "max_completion_length": 8, "optim": "sgd", "learning_rate": 0.02, "max_steps": 2}
CASES = {
    "dapo": ("GRPO", {"gradient_accumulation_steps": 2, "max_steps": 3}),
    "grpo": ("GRPO", {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}),
    "lora": ("GRPO", {"beta": 0.1, "peft": True}),
    "high entropy": ("GRPO", {"top_entropy_quantile": 0.5}),
    "batch scale": ("GRPO", {"scale_rewards": "batch", "mask_truncated_completions": True}),
    "gmpo": ("GMPO", {"beta": 0.1, "num_iterations": 2}),
    "gmpo, lora": ("GMPO", {"beta": 0.1, "peft": True}),
    "rloo": ("RLOO", {"beta": 0.1, "normalize_advantages": True}),
    "evaluated": ("GRPO", {"beta": 0.1, "eval_strategy": "steps", "eval_steps": 1}),
    "synced": ("GRPO", {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    "reward model": ("GRPO", {"reward_model": True}),
    "generated": ("GRPO", {"generates": True}),
    "by layer": ("GRPO", {"generates": True, "ds3_gather_for_generation": False}),
}
# Those of the default tests.
QUICK = ("grpo", "lora", "gmpo", "rloo", "generated")
ENGINES = ("ddp", "zero2", "zero3", "fsdp1")
# Means over micro-batches, which hold other completions.
HIDDEN = {"dapo": ("entropy", "clip_ratio")}


TIMES = ("runtime", "per_second")


class Scripted:
    """An engine of which a completion depends on its prompt, its place among all processes' and the step only."""

    def __init__(self, end):
        self.end = end

    def sync_weights(self, model, step):
        self.step = step

    def generate(self, prompt_ids, settings):
        first = PartialState().process_index * len(prompt_ids)
        return Rollout(prompt_ids, [self._complete(prompt, first + i) for i, prompt in enumerate(prompt_ids)])

    def _complete(self, prompt, place):
        rng = random.Random(f"{prompt} {place} {self.step}")
        ids = [rng.randrange(6, 300) for _ in range(rng.randint(1, 7))]
        return ids + [self.end] * (rng.random() < 0.8)


class Shortened(EngineWrapper):
    """Cuts completions to lengths that depend on their place: greedy ones of one prompt would be equal."""

    def generate(self, prompt_ids, settings):
        first = PartialState().process_index * len(prompt_ids)
        found = self.engine.generate(prompt_ids, settings)
        return Rollout(prompt_ids, [ids[: 2 + (first + i) % 4] for i, ids in enumerate(found.completion_ids)])


class Judge:
    """A reward function that logs; in one process, one of its calls fails."""

    __name__ = "judge"

    def __init__(self, failing=None):
        self.calls, self.failing = 0, failing

    def __call__(self, completion_ids, log_extra, log_metric, **_):
        self.calls += 1
        if (PartialState().process_index, self.calls) == self.failing:
            raise KeyError("solution")
        log_extra("last", [ids[-1] for ids in completion_ids])
        log_metric("first", sum(ids[0] for ids in completion_ids) / len(completion_ids))
        return [float(sum(ids) % 7) for ids in completion_ids]


def make(case, model_path, folder, failing=None, **changes):
    method, settings = CASES[case]
    settings = {"gradient_accumulation_steps": 1, **SETTINGS, **settings, **changes}
    arguments = {"model": model_path, "reward_funcs": [Judge(failing)], "train_dataset": color_prompts()}
    if settings.pop("reward_model", False):
        arguments["reward_funcs"].append(reward_model_path_beside(model_path))
    if "eval_strategy" in settings:
        # accelerate cuts the last batch of several processes to what is left of the prompts; nothing is left of eight.
        arguments["eval_dataset"] = color_prompts(8)
        settings["per_device_eval_batch_size"] = 8 // processes()
    if settings.pop("peft", False):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        arguments["peft_config"] = adapter
    generates = settings.pop("generates", False)
    if generates:
        settings["generation_kwargs"] = {"do_sample": False}
    else:
        arguments["rollout_engine"] = Scripted(1)
    size = GENERATION // (processes() * settings["gradient_accumulation_steps"])
    settings["per_device_train_batch_size"] = size
    settings |= {"log_completions": True, "num_completions_to_print": 1}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    assert trainer.args.world_size == processes()
    if generates:
        trainer.engine = Shortened(trainer.engine)
    return trainer


def reward_model_path_beside(model_path):
    folder = Path(model_path) / "reward"
    return str(folder) if folder.exists() else save_tiny_classifier(folder, build_tokenizer())


def processes():
    return int(os.environ.get("WORLD_SIZE", "1"))


def found(trainer):
    """Each step's log but for times, and the weights as one vector."""
    logs = [
        {name: value for name, value in log.items() if name != "step_time" and not any(part in name for part in TIMES)}
        for log in trainer.state.log_history
    ]
    with gathered(trainer.model if trainer.is_fsdp_enabled else trainer.model_wrapped):
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"logs": logs[:-1], "weights": weights}


def train(case, model_path, folder, **changes):
    trainer = make(case, model_path, folder, **changes)
    trainer.train()
    return found(trainer)


def of_two(cases, engine, model_path, folder):
    """The findings of each of two ranks, by case."""
    return run_on_ranks(lambda: {case: train(case, model_path, folder / case) for case in cases}, engine=engine)


def assert_as_alone(case, ranks, model_path, folder):
    """Both ranks found what this process finds alone."""
    first, second = (rank[case] for rank in ranks)
    assert first["logs"] == second["logs"]
    alone = train(case, model_path, folder / "alone" / case)
    for rank in (first, second):
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=0, atol=1e-6)
    hidden = HIDDEN.get(case, ())
    logs = [
        [{name: value for name, value in log.items() if not name.startswith(hidden)} for log in result["logs"]]
        for result in (first, alone)
    ]
    assert_same_logs(*logs)
    for ours, theirs in zip(first["logs"], alone["logs"], strict=True):
        if "grad_norm" not in theirs:
            continue
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-7)
        # Advantages of both signs: a sum near zero.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-7, abs=1e-7)
    assert any(log.get("grad_norm", 0) > 0.01 for log in alone["logs"])


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES)])
def test_two_ranks_compute_what_one_process_does(engine, model_path, tmp_path):
    reward_model_path_beside(model_path)
    cases = QUICK if engine == "fsdp2" else CASES
    ranks = of_two(cases, engine, model_path, tmp_path)
    for case in cases:
        assert_as_alone(case, ranks, model_path, tmp_path)
    file = "completions/completions_00002.parquet"
    ours, theirs = (pd.read_parquet(path / "grpo" / file) for path in (tmp_path, tmp_path / "alone"))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)
    assert len(ours) == GENERATION and "last" in ours


@pytest.mark.slow
def test_fsdp2_trains_the_other_cases_alike(model_path, tmp_path):
    reward_model_path_beside(model_path)
    rest = [case for case in CASES if case not in QUICK]
    ranks = of_two(rest, "fsdp2", model_path, tmp_path)
    for case in rest:
        assert_as_alone(case, ranks, model_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_a_resumed_run_has_the_completions_that_it_had(engine, model_path, tmp_path):
    def two():
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "optim": "adamw_torch"}
        whole = make("grpo", model_path, tmp_path, **settings)
        whole.train()
        again = make("grpo", model_path, tmp_path, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        return found(whole), found(again)

    for whole, again in run_on_ranks(two, engine=engine):
        torch.testing.assert_close(again["weights"], whole["weights"], rtol=0, atol=1e-6)
        assert again["logs"][-1]["loss"] == pytest.approx(whole["logs"][-1]["loss"], rel=1e-6, abs=1e-8)


def test_a_failure_in_one_process_stops_both_and_nothing_is_lost(model_path, tmp_path):
    unbroken = {"dapo": train("dapo", model_path, tmp_path / "unbroken")}["dapo"]
    first, second = run_on_ranks(lambda: fail_and_resume(model_path, tmp_path), engine="ddp")
    assert first["failure"].startswith("RuntimeError: process 1 failed: reward function 'judge' raised")
    assert second["failure"].startswith("RuntimeError: reward function 'judge' raised KeyError")
    for result in (first, second):
        assert "Step 1 is saved" in result["note"]
        torch.testing.assert_close(result["resumed"]["weights"], unbroken["weights"], rtol=0, atol=1e-6)
        assert result["resumed"]["logs"][-1]["num_tokens"] == unbroken["logs"][-1]["num_tokens"]
        assert result["server"] == "ConnectionError: the server is gone"


def fail_and_resume(model_path, folder):
    """Tells how this process reports a failure in the second one, and how the resumed run ends."""
    settings = {"save_strategy": "steps", "save_steps": 100}
    broken = make("dapo", model_path, folder, failing=(1, 2), **settings)
    with pytest.raises(RuntimeError) as failure:
        broken.train()
    broken.accelerator.wait_for_everyone()
    resumed = make("dapo", model_path, folder, **settings)
    resumed.train(resume_from_checkpoint=True)
    said = f"{type(failure.value).__name__}: {failure.value}"
    note = failure.value.__notes__[0]
    return {"failure": said, "note": note, "resumed": found(resumed), "server": ask_a_server_that_is_gone()}


def ask_a_server_that_is_gone():
    """The error of this process where the first one's request fails."""
    engine = object.__new__(VLLMServerEngine)
    engine.state, engine.max_positions, engine.image_token_id = PartialState(), None, None

    def complete(*args):
        raise ConnectionError("the server is gone")

    engine._complete = complete
    with pytest.raises(ConnectionError) as failure:
        engine.generate([[5, 6]], SamplingSettings(max_completion_length=4))
    return f"ConnectionError: {failure.value}"
