"""GRPO in environments on two ranks, by each engine: what one computes, also where an environment fails."""

import os
import random

import pytest
import torch
from accelerate import PartialState

import trl_fast
from support.environments import Sums, questions_with_start
from support.models import save_tiny_model
from support.ranks import RankError, run_on_ranks
from support.tools import TURNS, ToolPolicy, tool_tokenizer
from support.training import assert_same_logs, make_trainer
from trl_fast.parallel.gathering import gathered

pytestmark = pytest.mark.processes

# Completions of a generation: groups of four, of which one of three is on both ranks.
GENERATION = 12


class Numbered(Sums):
    """Writes its completion's number among all processes', so that each has a prompt of its own."""

    resets = 0
    failing: tuple = (7,)

    async def reset(self, **row):
        size = GENERATION // PartialState().num_processes
        place = PartialState().process_index * size + Numbered.resets % size
        Numbered.resets += 1
        super().reset(start=place)
        if place in self.failing:
            raise ConnectionError("no server")
        return f" You are {place}."


class Failing(Numbered):
    """All of one rank's fail."""

    failing = range(6, 12)


class ByPrompt(ToolPolicy):
    """Says the same for the same tokens, whoever asks."""

    def _turn(self, prompt):
        return self.tokenizer(text=random.Random(str(prompt)).choice(TURNS))["input_ids"]


def train(model_path, folder, factory):
    Numbered.resets = 0
    tokenizer = tool_tokenizer()
    arguments = {
        "model": model_path,
        "train_dataset": questions_with_start(),
        "processing_class": tokenizer,
        "rollout_engine": ByPrompt(tokenizer),
        "environment_factory": factory,
    }
    settings = {"num_generations": 4, "max_completion_length": 90, "gradient_accumulation_steps": 1, "max_steps": 2}
    settings["per_device_train_batch_size"] = GENERATION // int(os.environ.get("WORLD_SIZE", "1"))
    settings |= {"optim": "sgd", "learning_rate": 0.1, "log_completions": True, "num_completions_to_print": 1}
    trainer = make_trainer(trl_fast, folder, method="GRPO", arguments=arguments, **settings)
    trainer.train()
    hidden = ("step_time", "train_runtime")
    logs = [{k: v for k, v in log.items() if k not in hidden} for log in trainer.state.log_history[:-1]]
    with gathered(trainer.model if trainer.is_fsdp_enabled else trainer.model_wrapped):
        return logs, torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


ENGINES = ("fsdp2", "fsdp1", "zero2", "zero3")


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES)])
def test_two_ranks_compute_what_one_process_does(engine, tmp_path):
    model_path = save_tiny_model(tmp_path / "model", tool_tokenizer())
    (first, weights), (second, _) = run_on_ranks(train, model_path, tmp_path / "ranks", Numbered, engine=engine)
    alone, expected = train(model_path, tmp_path / "alone", Numbered)
    assert first == second
    assert_same_logs(first, alone)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    assert alone[0]["environments/failure_frequency"] == pytest.approx(1 / 12)
    assert alone[0]["tools/call_frequency"] > 0.3 and alone[0]["rewards/Numbered/std"] > 1


def test_where_all_of_one_rank_fail_both_end(tmp_path):
    model_path = save_tiny_model(tmp_path / "model", tool_tokenizer())
    with pytest.raises(RankError, match=r"all 6 environments of a generation failed.*ConnectionError: no server"):
        run_on_ranks(train, model_path, tmp_path / "ranks", Failing)
