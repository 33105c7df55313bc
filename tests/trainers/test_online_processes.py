"""GRPO and RLOO in two processes: for the same completions what one process computes, and one failure stops both."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import PartialState

import trl_fast
from support.rollouts import color_prompts
from support.training import assert_same_logs, make_trainer
from trl_fast.rollout import Rollout
from trl_fast.rollout.vllm_engine import VLLMServerEngine

TESTS = Path(__file__).parent.parent
# Completions of a generation: groups of four, of which one of three is in both processes.
GENERATION = 12
SETTINGS = {"num_generations": 4, "max_completion_length": 8, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
CASES = {
    "dapo": ("GRPO", {"gradient_accumulation_steps": 2}),
    "grpo": ("GRPO", {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}),
    "high entropy": ("GRPO", {"top_entropy_quantile": 0.5}),
    "batch scale": ("GRPO", {"scale_rewards": "batch", "mask_truncated_completions": True}),
    "rloo": ("RLOO", {"beta": 0.1, "normalize_advantages": True}),
}
# Means over micro-batches, which hold other completions.
BY_MICRO_BATCH = ("entropy", "clip_ratio")


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


def make(case, model_path, folder, processes=1, failing=None, **changes):
    method, settings = CASES[case]
    settings = {"gradient_accumulation_steps": 1, **SETTINGS, **settings, **changes}
    arguments = {
        "model": model_path,
        "reward_funcs": Judge(failing),
        "train_dataset": color_prompts(),
        "rollout_engine": Scripted(1),
    }
    size = GENERATION // (processes * settings["gradient_accumulation_steps"])
    settings |= {"per_device_train_batch_size": size, "log_completions": True, "num_completions_to_print": 1}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    assert trainer.args.world_size == processes
    return trainer


def found(trainer):
    """Each step's log but for times, and the weights as one list."""
    logs = [{name: value for name, value in log.items() if name != "step_time"} for log in trainer.state.log_history]
    return {
        "logs": logs[:-1],
        "weights": torch.cat([w.detach().flatten() for w in trainer.model.parameters()]).tolist(),
    }


def train(case, model_path, folder, processes=1):
    trainer = make(case, model_path, folder, processes)
    trainer.train()
    return found(trainer)


@pytest.fixture(scope="module")
def two(model_path, tmp_path_factory):
    """Returns the findings of two processes, and the folder with all that they wrote."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        + [model_path, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case, two, model_path, tmp_path):
    (first, second), folder = two
    assert first[case] == second[case]
    alone = train(case, model_path, tmp_path)
    torch.testing.assert_close(torch.tensor(first[case]["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=1e-6)
    hidden = BY_MICRO_BATCH if case == "dapo" else ()
    logs = [
        [{name: value for name, value in log.items() if not name.startswith(hidden)} for log in result["logs"]]
        for result in (first[case], alone)
    ]
    assert_same_logs(*logs)
    file = "completions/completions_00002.parquet"
    ours, theirs = (pd.read_parquet(path / file) for path in (folder / case, tmp_path))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)
    assert len(ours) == GENERATION and "last" in ours


@pytest.mark.slow
def test_a_failure_in_one_process_stops_both_and_nothing_is_lost(two):
    (first, second), _ = two
    assert first["failure"].startswith("RuntimeError: process 1 failed: reward function 'judge' raised")
    assert second["failure"].startswith("RuntimeError: reward function 'judge' raised KeyError")
    for result in (first, second):
        assert "Step 1 is saved" in result["note"]
        assert result["resumed"]["weights"] == result["dapo"]["weights"]
        assert result["resumed"]["logs"][-1]["num_tokens"] == result["dapo"]["logs"][-1]["num_tokens"]
        assert result["server"] == "ConnectionError: the server is gone"


def fail_and_resume(model_path, folder):
    """Tells how this process reports a failure in the second one, and how the resumed run ends."""
    settings = {"processes": 2, "save_strategy": "steps", "save_steps": 100}
    broken = make("dapo", model_path, folder, failing=(1, 2), **settings)
    with pytest.raises(RuntimeError) as failure:
        broken.train()
    broken.accelerator.wait_for_everyone()
    resumed = make("dapo", model_path, folder, **settings)
    resumed.train(resume_from_checkpoint=True)
    said = f"{type(failure.value).__name__}: {failure.value}"
    return {"failure": said, "note": failure.value.__notes__[0], "resumed": found(resumed)}


def ask_a_server_that_is_gone():
    """The error of this process where the first one's request fails."""
    engine = object.__new__(VLLMServerEngine)
    engine.state = PartialState()

    def ask():
        raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError) as failure:
        engine._from_main(ask)
    return {"server": f"ConnectionError: {failure.value}"}


def main(model_path, folder):
    """All of it in this process, one of two."""
    torch.set_num_threads(1)
    results = {case: train(case, model_path, folder / case, 2) for case in CASES}
    results |= fail_and_resume(model_path, folder / "broken")
    results |= ask_a_server_that_is_gone()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
