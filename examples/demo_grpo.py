"""Online reinforcement learning, end to end: GRPO on a real model and a real task, whose answers earn rewards.

    python -m examples.demo_grpo [--steps 60] [--warm_up_steps 10] [--model_name_or_path ...] [--output_dir runs/grpo]

SmolLM2-135M-Instruct does sums of reasoning-gym. A short supervised warm-up teaches it to answer with a number; then
GRPO teaches it the right one, from nothing but the task's own score of sampled answers. Prints rewards on held-out
questions before and after and where the time went, and draws the training curves. The exit status is 1 if the reward
did not clearly rise.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import matplotlib
import reasoning_gym
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, ProgressCallback

from trl_fast import GRPOConfig, GRPOTrainer, RichProgressCallback, SFTConfig, SFTTrainer

from .smollm2 import smollm2_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INSTRUCTION = "Give only the answer."
GENERATIONS = 8
# What the reward on held-out questions has to gain.
CLEARLY = 0.1
CURVES = ("reward", "kl", "entropy", "completions/mean_length")


def sums(train: int, held_out: int, seed: int) -> dict[str, Dataset]:
    """Sums and differences of two digits as conversations, with their answers; no question is in both splits."""
    source = reasoning_gym.create_dataset("chain_sum", size=4000, seed=seed, min_terms=2, max_terms=2, max_digits=1)
    rows = {
        entry["question"]: {
            "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": entry["question"]}],
            "completion": [{"role": "assistant", "content": entry["answer"]}],
            "answer": entry["answer"],
        }
        for entry in source
    }
    questions = sorted(rows)
    random.Random(seed).shuffle(questions)
    if len(questions) < train + held_out:
        raise ValueError(f"the task has {len(questions)} questions, {train} + {held_out} were asked for")
    splits = {"test": questions[:held_out], "train": questions[held_out : held_out + train]}
    return {name: Dataset.from_list([rows[question] for question in part]) for name, part in splits.items()}


def correct(completions: list[list[dict]], answer: list[str], **_: object) -> list[float]:
    """1 for the right answer and nothing else, else 0."""
    texts = [completion[0]["content"].strip() for completion in completions]
    return [float(text == expected) for text, expected in zip(texts, answer, strict=True)]


def common_settings(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """What both trainers are given."""
    return {
        "output_dir": str(arguments.output_dir / name),
        "seed": arguments.seed,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 2,
        "lr_scheduler_type": "constant",
    }


def quiet(trainer: SFTTrainer | GRPOTrainer, console: Console) -> None:
    """Our progress bar instead of the others."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RichProgressCallback(console))


def warm_up(model: PreTrainedModel, data: Dataset, arguments: argparse.Namespace, console: Console) -> None:
    """A few supervised steps: an answer is a number and nothing else."""
    config = SFTConfig(
        max_steps=arguments.warm_up_steps,
        per_device_train_batch_size=8,
        learning_rate=2e-5,
        **common_settings(arguments, "warm_up"),
    )
    rows = data.select_columns(["prompt", "completion"])
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    quiet(trainer, console)
    trainer.train()


def make_trainer(model: PreTrainedModel, data: dict[str, Dataset], arguments: argparse.Namespace) -> GRPOTrainer:
    """GRPO on the questions alone."""
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
    """Seconds that a trainer spends on making completions."""

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
    """Held-out figures before and after, and the speed of generation and update apart."""
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


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Reward, KL divergence, entropy and completion length over the steps."""
    logs = [log for log in history if "reward" in log]
    figure, axes = plt.subplots(1, len(CURVES), figsize=(15, 3.4), layout="constrained")
    for axis, name in zip(axes, CURVES, strict=True):
        axis.plot([log["step"] for log in logs], [log[name] for log in logs], ".-")
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="hub name or folder; default: SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--steps", type=int, default=60, help="steps of GRPO")
    parser.add_argument("--warm_up_steps", type=int, default=10, help="supervised steps before")
    parser.add_argument("--held_out", type=int, default=24, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    arguments = parse_arguments(words)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    if arguments.model_name_or_path is None:
        arguments.model_name_or_path = str(smollm2_folder())
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
    plot(trainer.state.log_history, picture)
    console.print(results_table(before, after, tokens, seconds, generating))
    console.print(f"training curves: {picture}", soft_wrap=True)
    if after["eval_reward"] >= before["eval_reward"] + CLEARLY:
        return 0
    console.print("FAILED: the reward on held-out questions did not clearly rise", style="red")
    return 1


if __name__ == "__main__":
    sys.exit(main())
