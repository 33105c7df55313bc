"""Times steps of SFT and DPO with and without `fused_layers`, in turns in one process.

    python -m benchmarks.fused_layers [--rounds 5 --batch 2 --tokens 256]

SmolLM2-135M-Instruct in float32 reads English prose. A step is forward, backward and optimizer on one batch.
Writes benchmarks/results/fused_layers.json: medians, in seconds and in CPU seconds, which
other processes disturb less, and the load of the machine before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.llama import modeling_llama

import trl_fast
from examples.smollm2 import smollm2_folder
from trl_fast.modeling.fused_layers import FUSED_LAYERS
from trl_fast.modeling.model_changes import changes_of

from .english_text import token_stream
from .machine_info import describe_machine

RESULTS = Path(__file__).parent / "results"
METHODS = ("sft", "dpo")


def make_rows(method: str, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> Dataset:
    """Returns rows of text: so many tokens for SFT; for DPO half of them a prompt, an eighth a completion."""
    stream = token_stream(tokenizer)
    text = lambda start, length: tokenizer.decode(stream[start : start + length])  # noqa: E731
    places = range(0, count * 2 * tokens, 2 * tokens)
    if method == "sft":
        return Dataset.from_list([{"text": text(start, tokens)} for start in places])
    half, part = tokens // 2, tokens // 8
    return Dataset.from_list(
        [
            {
                "prompt": text(start, half),
                "chosen": text(start + half, part),
                "rejected": text(start + tokens + half, part),
            }
            for start in places
        ]
    )


def make_step(method: str, fused: bool, arguments: argparse.Namespace, folder: str) -> Callable[[], float]:
    """Returns a function that takes a step on one batch and returns its loss."""
    place = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    kinds: dict[str, Any] = {"sft": (trl_fast.SFTConfig, trl_fast.SFTTrainer)}
    kinds["dpo"] = (trl_fast.DPOConfig, trl_fast.DPOTrainer)
    config, trainer_class = kinds[method]
    trainer = trainer_class(
        model=model,
        args=config(
            folder,
            fused_layers=fused,
            per_device_train_batch_size=arguments.batch,
            max_length=2 * arguments.tokens,
            learning_rate=1e-6,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=make_rows(method, tokenizer, arguments.batch, arguments.tokens),
        processing_class=tokenizer,
    )
    assert (FUSED_LAYERS in changes_of(trainer.model)) is fused
    turn = modeling_llama.apply_rotary_pos_emb
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)
    trainer.model.train()
    if arguments.checkpointing:
        trainer.model.gradient_checkpointing_enable()

    def step() -> float:
        # All Llamas of a process share this function: each of both gets the one that it was made with.
        modeling_llama.apply_rotary_pos_emb = turn
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def race(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both in turns; the first step of each is not counted, and its losses are compared."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: make_step(method, name == "fused", arguments, folder) for name in ("plain", "fused")}
        losses = {name: step() for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in track(range(arguments.rounds), description=method, transient=True):
            for name, step in steps.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                step()
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    return {
        "losses": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "medians": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": _ratio(seconds),
        "cpu_ratio": _ratio(cpu_seconds),
    }


def _ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(seconds["plain"], seconds["fused"], strict=True))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments, console = parse_arguments(words), Console()
    found: dict[str, Any] = {"arguments": vars(arguments), "machine": describe_machine(), "load": [os.getloadavg()]}
    table = Table("method", "plain, s a step", "fused", "plain / fused", "in CPU time", "losses")
    for method in arguments.methods:
        found[method] = result = race(method, arguments)
        medians, losses = result["medians"], result["losses"]
        table.add_row(
            method,
            f"{medians['plain']:.3f}",
            f"{medians['fused']:.3f}",
            f"{result['ratio']:.3f}",
            f"{result['cpu_ratio']:.3f}",
            f"{losses['plain']:.6f} {losses['fused']:.6f}",
        )
    found["load"].append(os.getloadavg())
    console.print(table)
    console.print(f"load {found['load'][0][0]:.1f} before, {found['load'][1][0]:.1f} after")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fused_layers.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
