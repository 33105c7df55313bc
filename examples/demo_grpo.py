"""Trains GRPO end to end, on a real model and a real task whose answers earn rewards.

    python -m examples.demo_grpo [--steps 60] [--warm_up_steps 10] [--model_name_or_path ...] [--output_dir runs/grpo]

SmolLM2-135M-Instruct does sums of reasoning-gym. A short supervised warm-up teaches it to answer with a number; then
GRPO teaches it the right one, from nothing but the task's own score of sampled answers. Prints rewards on held-out
questions before and after and where the time went, and draws the training curves. The exit status is 1 if the reward
did not clearly rise.
"""

from __future__ import annotations

import argparse
import sys
import time

from datasets import Dataset
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_fast import GRPOConfig, GRPOTrainer

from .arithmetic_task import correct, sums
from .online_demo import common_settings, make_console, make_parser, parse_arguments, plot, quiet, warm_up

GENERATIONS = 8
# What the reward on held-out questions has to gain.
CLEARLY = 0.1
CURVES = ("reward", "kl", "entropy", "completions/mean_length")


def make_trainer(model: PreTrainedModel, data: dict[str, Dataset], arguments: argparse.Namespace) -> GRPOTrainer:
    """Returns a GRPO trainer on the questions alone."""
    config = GRPOConfig(
        max_steps=arguments.steps,
        per_device_train_batch_size=4 * GENERATIONS,
        per_device_eval_batch_size=4 * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=6,
        learning_rate=1e-5,
        beta=0.02,
        **common_settings(arguments, "grpo"),
    )
    questions = {name: part.select_columns(["prompt", "answer"]) for name, part in data.items()}
    return GRPOTrainer(
        model,
        reward_funcs=correct,
        args=config,
        train_dataset=questions["train"],
        eval_dataset=questions["test"],
        processing_class=AutoTokenizer.from_pretrained(arguments.model_name_or_path),
    )


class Stopwatch:
    """Measures the seconds that a trainer spends on making completions."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.seconds = 0.0
        self._generate = trainer.engine.generate
        trainer.engine.generate = self._timed

    def _timed(self, *arguments: object) -> object:
        start = time.perf_counter()
        rollout = self._generate(*arguments)
        self.seconds += time.perf_counter() - start
        return rollout


def results_table(before: dict, after: dict, tokens: int, seconds: float, generating: float) -> Table:
    """Returns a table: held-out figures before and after, and the speed of generation and update apart."""
    table = Table(title="held-out questions, before → after", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name in ("reward", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length"):
        table.add_row(name, f"{before[f'eval_{name}']:.3f} → {after[f'eval_{name}']:.3f}")
    table.add_section()
    table.add_row("tokens per second, whole loop", f"{tokens / seconds:.0f}")
    table.add_row("… generation alone", f"{tokens / generating:.0f}")
    table.add_row("… update alone", f"{tokens / (seconds - generating):.0f}")
    return table


def main(words: list[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    arguments = parse_arguments(make_parser(__doc__.splitlines()[0], "grpo", steps=60), words)
    console = make_console()
    data = sums(120, arguments.held_out, arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32")
    warm_up(model, data["train"], arguments, console)
    trainer = make_trainer(model, data, arguments)
    quiet(trainer, console)
    before = trainer.evaluate()
    clock, start = Stopwatch(trainer), time.perf_counter()
    trainer.train()
    seconds, generating = time.perf_counter() - start, clock.seconds
    tokens = [log["num_tokens"] for log in trainer.state.log_history if "reward" in log][-1]
    after = trainer.evaluate()
    picture = arguments.output_dir / "training.png"
    plot(trainer.state.log_history, CURVES, picture)
    console.print(results_table(before, after, tokens, seconds, generating))
    console.print(f"training curves: {picture}", soft_wrap=True)
    if after["eval_reward"] >= before["eval_reward"] + CLEARLY:
        return 0
    console.print("FAILED: the reward on held-out questions did not clearly rise", style="red")
    return 1


if __name__ == "__main__":
    sys.exit(main())
