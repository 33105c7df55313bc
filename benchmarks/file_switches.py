"""Counts how often a call of the head, or a GRPO step, moves from one file of trl_fast to another.

    python -m benchmarks.file_switches

Who reads what happens opens a file at each move: the fewer, the better the code can be followed. A move is a function
of one file that calls a function of another one, or a generator's frame of another file that goes on; returns are not
counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, SimpleNamespace

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import trl_fast
from tests.support.tokenizer import build_tokenizer
from trl_fast.ops import linear_logprob
from trl_fast.rollout import Rollout

_PACKAGE = Path(trl_fast.__file__).resolve().parent


def file_switches(call: Callable[[], object]) -> list[tuple[str, str, str]]:
    """Lists a call's moves: calling file, called file (both relative to the package), and the function."""
    moves: list[tuple[str, str, str]] = []
    sys.setprofile(profiler(moves))
    try:
        call()
    finally:
        sys.setprofile(None)
    return moves


def profiler(moves: list[tuple[str, str, str]]) -> Callable[[FrameType, str, object], None]:
    """Returns a function for `sys.setprofile` that appends each move to a list."""
    known: dict[str, str] = {}

    def name_of(frame: FrameType) -> str:
        path = frame.f_code.co_filename
        if path not in known:
            resolved = Path(path)
            inside = resolved.is_absolute() and resolved.resolve().is_relative_to(_PACKAGE)
            known[path] = str(resolved.resolve().relative_to(_PACKAGE)) if inside else ""
        return known[path]

    def see(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or not (called := name_of(frame)):
            return
        caller = frame.f_back
        while caller is not None and not name_of(caller):
            caller = caller.f_back
        if caller is not None and name_of(caller) != called:
            moves.append((name_of(caller), called, frame.f_code.co_name))

    return see


def head_switches() -> dict[str, list[tuple[str, str, str]]]:
    """Returns the moves of one forward and one backward pass of a small trained head with a single tile."""
    torch.manual_seed(0)
    hidden = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(32, 16, requires_grad=True)
    targets = torch.randint(32, (8,))
    with torch.autograd.set_multithreading_enabled(False):
        linear_logprob(hidden, weight, targets).logprobs.sum().backward()
        kept: list[torch.Tensor] = []
        forward = file_switches(lambda: kept.append(linear_logprob(hidden, weight, targets).logprobs))
        backward = file_switches(lambda: kept[0].sum().backward())
    return {"head, forward": forward, "head, backward": backward}


class FixedEngine(SimpleNamespace):
    """Stands for a rollout engine and samples nothing: what is counted is the trainer's own way."""

    def generate(self, prompt_ids: list[list[int]], settings: object) -> Rollout:
        """Returns completions of three and four tokens."""
        return Rollout(prompt_ids, [[5, 6, 7, 8][: 3 + index % 2] for index in range(len(prompt_ids))])

    def sync_weights(self, model: torch.nn.Module, step: int) -> None:
        """Has no weights."""


class SecondStep(TrainerCallback):
    """Counts the moves of the second step: rollout, rewards, advantages, loss, gradients, weights."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, str, str]] = []

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Starts to count."""
        if state.global_step == 1:
            sys.setprofile(profiler(self.moves))

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Stops to count."""
        sys.setprofile(None)


def step_switches(method: str = "GRPO") -> dict[str, list[tuple[str, str, str]]]:
    """Lists the moves of an online method's second step: one micro-batch of four completions, a one-layer model."""
    torch.manual_seed(0)
    tokenizer, counter = build_tokenizer(), SecondStep()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    with TemporaryDirectory() as folder:
        args = getattr(trl_fast, f"{method}Config")(
            folder,
            num_generations=2,
            per_device_train_batch_size=4,
            max_steps=2,
            beta=0.1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            # Each of its operations would count as a move.
            gradient_checkpointing=False,
        )
        trainer = getattr(trl_fast, f"{method}Trainer")(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"What is {i}?"} for i in range(8)]),
            processing_class=tokenizer,
            reward_funcs=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
            rollout_engine=FixedEngine(),
            callbacks=[counter],
        )
        with torch.autograd.set_multithreading_enabled(False):
            trainer.train()
    return {f"{method} step": counter.moves}


def of_the_loop(moves: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Returns the moves from or to the loop's own files: trainers and rollouts."""
    folders = ("trainers", "rollout")
    return [move for move in moves if any(path.startswith(folders) for path in move[:2])]


def main() -> None:
    """Prints the counts."""
    table = Table("call", "moves", "files")
    steps = step_switches("GRPO") | step_switches("RLOO")
    found = head_switches() | steps | {f"{name}, the loop's own": of_the_loop(moves) for name, moves in steps.items()}
    for name, moves in found.items():
        table.add_row(name, str(len(moves)), str(len({path for move in moves for path in move[:2]})))
    Console().print(table)


if __name__ == "__main__":
    main()
