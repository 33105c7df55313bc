"""PPO in two processes: one policy and one value model in both, each process with completions of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trl_fast
from support.rollouts import color_prompts
from support.training import make_trainer

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_processes(model_path, reward_model_path, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*launcher, __file__, model_path, reward_model_path, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == pytest.approx(second["weights"], rel=1e-6)
    assert first["logs"] == second["logs"]
    assert first["prompts"] and not set(first["prompts"]) & set(second["prompts"])
    assert first["completions"] != second["completions"]


def train(model_path, reward_model_path, folder):
    """A short run and an evaluation after it; what this process saw, and sums of the weights that it ended with."""
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(model_path),
        "processing_class": AutoTokenizer.from_pretrained(model_path),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
        "value_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
        "train_dataset": color_prompts(16),
        "eval_dataset": color_prompts(4),
    }
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
    options = {"response_length": 5, "num_sample_generations": 0, "max_steps": 2, "per_device_eval_batch_size": 2}
    trainer = make_trainer(trl_fast, folder, method="PPO", arguments=arguments, **sizes, **options, ddp_backend="gloo")
    seen, judge = [], trainer.loop.judge
    trainer.loop.judge = lambda *given: seen.append(judge(*given)) or seen[-1]
    trainer.train()
    rollouts = seen[:2]
    trainer.evaluate()
    varying = ("eps", "runtime", "per_second")
    return {
        "weights": [
            weight.double().sum().item()
            for model in (trainer.model, trainer.value_model)
            for weight in model.parameters()
        ],
        "logs": [
            {name: value for name, value in log.items() if not any(part in name for part in varying)}
            for log in trainer.state.log_history
        ],
        "prompts": rollouts[0].prompts,
        "completions": rollouts[0].completions,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    *models, folder = sys.argv[1:]
    result = train(*models, folder)
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
