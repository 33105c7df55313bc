"""Trains a tiny model that reads images end to end: SFT on questions about pictures, then DPO on its own mistakes.

    python -m examples.demo_pictures [--pictures 1600] [--epochs 4] [--output_dir runs/pictures]

A LLaVA of 440 thousand parameters with random weights learns to name the color of squares in generated pictures and
to count them. DPO then trains it on pairs of the right answer and the wrong one that it likes best. Prints how often
it answers rightly on held-out pictures after each stage, and draws the training curves. The exit status is 1 if either
stage did not raise the accuracy.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from trl_fast import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from .online_demo import make_console, quiet
from .picture_tasks import QUESTIONS, accuracy, make_model, make_processor, preference_pairs, questions, ranked_answers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 32


@dataclass
class Stage:
    """Holds what one stage showed: its log, how long it took, and the accuracy on held-out pictures after it."""

    name: str
    history: list[dict[str, float]]
    seconds: float
    accuracy: dict[str, float]


def common_settings(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """Returns the settings of both stages."""
    return {
        "output_dir": str(arguments.output_dir / name),
        "per_device_train_batch_size": BATCH,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "seed": arguments.seed,
        "bf16": False,
    }


def train_sft(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, arguments: argparse.Namespace, console: Console
) -> list[dict[str, float]]:
    """Trains on pictures, questions and answers; returns the log."""
    config = SFTConfig(
        **common_settings(arguments, "sft"), learning_rate=1e-3, num_train_epochs=arguments.epochs, warmup_steps=5
    )
    data = questions(arguments.pictures, arguments.seed).remove_columns("answer")
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=processor)
    quiet(trainer, console)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def train_dpo(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, arguments: argparse.Namespace, console: Console
) -> list[dict[str, float]]:
    """Trains on pairs of right answers and the model's mistakes about new pictures; returns the log."""
    # The loss of the chosen answer beside DPO's keeps it likely: DPO alone only asks for the distance of the two.
    config = DPOConfig(
        **common_settings(arguments, "dpo"), learning_rate=3e-4, loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5]
    )
    data = questions(arguments.pictures, arguments.seed + 1)
    pairs = preference_pairs(data, ranked_answers(model, processor, data))
    reference = copy.deepcopy(model)
    trainer = DPOTrainer(model, reference, args=config, train_dataset=pairs, processing_class=processor)
    quiet(trainer, console)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def run_stages(arguments: argparse.Namespace, console: Console) -> list[Stage]:
    """Trains both stages; the first element is the model with random weights."""
    processor = make_processor()
    model = make_model(processor, arguments.seed)
    held_out = questions(arguments.held_out, arguments.seed + 2)

    def now() -> dict[str, float]:
        return accuracy(held_out, ranked_answers(model, processor, held_out))

    stages = [Stage("random weights", [], 0.0, now())]
    for name, train in (("SFT", train_sft), ("DPO", train_dpo)):
        console.rule(name)
        start = time.perf_counter()
        history = train(model, processor, arguments, console)
        stages.append(Stage(name, history, time.perf_counter() - start, now()))
    return stages


def mean(values: dict[str, float]) -> float:
    """Returns the mean over the questions."""
    return sum(values.values()) / len(values)


def results_table(stages: list[Stage]) -> Table:
    """Returns a table: the accuracy on held-out pictures and the time of each stage."""
    table = Table(title="held-out pictures: share of right answers", title_justify="left")
    for column in ("", *QUESTIONS, "both", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for stage in stages:
        shares = [*(stage.accuracy[question] for question in QUESTIONS), mean(stage.accuracy)]
        table.add_row(stage.name, *(f"{share:.3f}" for share in shares), f"{stage.seconds:.0f}")
    return table


def plot(stages: list[Stage], path: Path) -> None:
    """Plots SFT's loss, DPO's reward accuracy, and the accuracy on held-out pictures after each stage."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, stage, name in zip(axes, stages[1:], ("loss", "rewards/accuracies"), strict=False):
        logs = [log for log in stage.history if name in log and "train_runtime" not in log]
        axis.plot([log["step"] for log in logs], [log[name] for log in logs], ".-")
        axis.set(title=f"{stage.name}: {name}", xlabel="step")
    for question in QUESTIONS:
        axes[2].plot(
            [stage.name for stage in stages], [stage.accuracy[question] for stage in stages], "o-", label=question
        )
    axes[2].set(title="right answers on held-out pictures", ylim=(0, 1.05))
    axes[2].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1600, help="pictures that each stage is trained on")
    parser.add_argument("--held_out", type=int, default=400, help="held-out pictures")
    parser.add_argument("--epochs", type=float, default=4, help="passes of SFT over its pictures")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    arguments = parse_arguments(words)
    console = make_console()
    stages = run_stages(arguments, console)
    picture = arguments.output_dir / "training.png"
    plot(stages, picture)
    console.print(results_table(stages))
    console.print(f"training curves: {picture}", soft_wrap=True)
    before, sft, dpo = (mean(stage.accuracy) for stage in stages)
    if before < sft < dpo:
        return 0
    console.print("FAILED: the accuracy on held-out pictures did not rise in both stages", style="red")
    return 1


if __name__ == "__main__":
    sys.exit(main())
