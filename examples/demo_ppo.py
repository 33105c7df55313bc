"""Trains a reward model and PPO on it, end to end, on a real model and a real task.

    python -m examples.demo_ppo [--steps 20] [--reward_steps 150] [--model_name_or_path ...] [--output_dir runs/ppo]

SmolLM2-135M-Instruct does sums of reasoning-gym. A short supervised warm-up teaches it to answer with a number; a
reward model is trained on pairs of a right and a wrong answer; then PPO teaches the policy what that model likes. What
held-out questions' sampled answers earn, from the reward model and from the task itself, is printed before and after.
The exit status is 1 if the reward did not clearly rise or fewer answers are right.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer

from .arithmetic_task import answer_pairs, correct, sums
from .online_demo import common_settings, make_console, make_parser, parse_arguments, plot, quiet, warm_up

CURVES = ("objective/scores", "objective/kl", "objective/entropy", "completions/mean_length")
# What the reward model's score of held-out answers has to gain.
CLEARLY = 1.0
# Answers that are sampled to each held-out question.
SAMPLES = 4


@dataclass(frozen=True)
class HeldOut:
    """Holds means over answers to held-out questions: share of right ones, reward model's score, length in tokens."""

    right: float
    score: float
    length: float


def train_reward_model(
    data: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace, console: Console
) -> tuple[PreTrainedModel, float]:
    """Returns a reward model, started from the warmed-up policy, and its accuracy on held-out pairs."""
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.output_dir / "warm_up", num_labels=1, dtype="float32"
    )
    config = RewardConfig(
        max_steps=arguments.reward_steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        learning_rate=3e-5,
        **common_settings(arguments, "reward"),
    )
    pairs = {name: answer_pairs(part, tokenizer, arguments.pairs, arguments.seed) for name, part in data.items()}
    trainer = RewardTrainer(
        model, args=config, train_dataset=pairs["train"], eval_dataset=pairs["test"], processing_class=tokenizer
    )
    quiet(trainer, console)
    trainer.train()
    return trainer.model, trainer.evaluate()["eval_accuracy"]


def make_trainer(
    policy: PreTrainedModel,
    reward_model: PreTrainedModel,
    data: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
) -> PPOTrainer:
    """Returns a PPO trainer on the questions alone; the value model starts as a copy of the reward model."""
    config = PPOConfig(
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        num_mini_batches=2,
        num_ppo_epochs=1,
        response_length=6,
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=1.0,
        kl_coef=0.05,
        # The reward model's scores are up to 10 apart, and within a rollout values may move no further than this.
        cliprange_value=10.0,
        learning_rate=1e-5,
        num_sample_generations=0,
        **common_settings(arguments, "ppo"),
    )
    questions = {name: part.select_columns(["prompt", "answer"]) for name, part in data.items()}
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        reward_model=reward_model,
        train_dataset=questions["train"],
        eval_dataset=questions["test"],
    )


def held_out(trainer: PPOTrainer) -> HeldOut:
    """Samples answers to the held-out questions and judges them."""
    rows = [row for row in trainer.eval_dataset for _ in range(SAMPLES)]
    trainer.model.eval()
    found = trainer.roll_out(rows)
    right = correct(found.completions, [row["answer"] for row in rows])
    lengths = [len(ids) for ids in found.samples.completion_ids]
    return HeldOut(sum(right) / len(rows), found.scores.mean().item(), sum(lengths) / len(rows))


def results_table(before: HeldOut, after: HeldOut, accuracy: float) -> Table:
    """Returns a table of held-out figures before and after."""
    table = Table(title="held-out questions, before → after PPO", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("right answers", f"{before.right:.3f} → {after.right:.3f}")
    table.add_row("reward model's score", f"{before.score:.3f} → {after.score:.3f}")
    table.add_row("tokens of an answer", f"{before.length:.2f} → {after.length:.2f}")
    table.add_section()
    table.add_row("reward model's accuracy on pairs", f"{accuracy:.3f}")
    return table


def main(words: list[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    parser = make_parser(__doc__.splitlines()[0], "ppo", steps=20)
    parser.add_argument("--reward_steps", type=int, default=150, help="steps of the reward model")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of a question that the reward model sees")
    arguments = parse_arguments(parser, words)
    console = make_console()
    data = sums(160, arguments.held_out, arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    policy = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32")
    warm_up(policy, data["train"], arguments, console)
    policy.save_pretrained(arguments.output_dir / "warm_up")
    reward_model, accuracy = train_reward_model(data, tokenizer, arguments, console)
    trainer = make_trainer(policy, reward_model, data, tokenizer, arguments)
    quiet(trainer, console)
    before = held_out(trainer)
    trainer.train()
    after = held_out(trainer)
    picture = arguments.output_dir / "training.png"
    plot(trainer.state.log_history, CURVES, picture)
    console.print(results_table(before, after, accuracy))
    console.print(f"training curves: {picture}", soft_wrap=True)
    if after.score >= before.score + CLEARLY and after.right >= before.right:
        return 0
    console.print("FAILED: held-out answers do not clearly earn more, or fewer of them are right", style="red")
    return 1


if __name__ == "__main__":
    sys.exit(main())
