"""Times the host's work for a layer by the way to checkpoint, on layers so small that only that counts.

    python -m benchmarks.checkpointing [--layers 24 --hidden 256 --tokens 8 --steps 10 --rounds 5 --json FILE]

A Llama of random weights, in turns: without checkpointing; torch's plain one; ours as on a GPU with memory for all
layers, for half of them, and for none; ours as on a CPU, which keeps results and so looks at every operator. The GPU's
memory is made up, so that its host's work can be timed without one. Times are the shortest of the rounds; compare
ratios of one run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from trl_fast.modeling.checkpointing import enable_checkpointing
from trl_fast.modeling.selective_checkpointing import set_selective_checkpointing
from trl_fast.modeling.uncheckpointed_layers import MARGIN, DeviceMemory

from .machine_info import describe_machine
from .memory import MIB
from .timing import Contender, race

NONE, PLAIN, RESULTS = "no checkpointing", "plain checkpointing", "results kept, as on a CPU"


def tiny_llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Returns a model whose layers are small, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 64),
        vocab_size=64,
    )
    return LlamaForCausalLM(config).to(arguments.device).train()


class MadeUpMemory:
    """Tells of a device on which every layer saves a MiB and so many layers fit."""

    def __init__(self, layers: float) -> None:
        self._total = int(layers * MIB) * MARGIN // (MARGIN - 1) + MARGIN
        self._asked = 0

    def __call__(self, device: torch.device) -> DeviceMemory:
        # It is asked before a layer is computed again and after it.
        self._asked += 1
        return DeviceMemory(self._total, self._total, self._asked * MIB, MIB)


def step_of(model: LlamaForCausalLM, arguments: argparse.Namespace) -> Callable[[], None]:
    """Returns a call that does some forward and backward passes."""
    ids = torch.randint(0, 64, (1, arguments.tokens), device=arguments.device)

    def step() -> None:
        for _ in range(arguments.steps):
            model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
            model.zero_grad()

    return step


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Returns each way to checkpoint, with a model of its own."""
    whole = {"all layers left whole": arguments.layers, "half of them": arguments.layers / 2, "none of them": 0}
    memories: dict[str, Callable | None] = {name: MadeUpMemory(layers) for name, layers in whole.items()}
    memories[RESULTS] = None
    found = []
    for name in (NONE, PLAIN, *memories):
        model = tiny_llama(arguments)
        if name in memories:
            set_selective_checkpointing(model, None)
            # On a CPU there is none to tell of.
            model.trl_fast_selective_checkpointing.device_memory = memories[name] or (lambda device: None)
        if name != NONE:
            enable_checkpointing(model)
        found.append(Contender(name, step_of(model, arguments)))
    return found


def layer_milliseconds(arguments: argparse.Namespace) -> dict[str, float]:
    """Measures milliseconds of forward and backward for a layer, by the way to checkpoint."""
    ways = contenders(arguments)
    race(ways, arguments.rounds, patience=60, device=torch.device(arguments.device), title="checkpointing")
    return {way.name: 1000 * min(way.seconds) / (arguments.layers * arguments.steps) for way in ways}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("layers", 24), ("hidden", 256), ("tokens", 8), ("steps", 10), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    found = layer_milliseconds(arguments)
    table = Table(title=f"{arguments.layers} layers, hidden size {arguments.hidden}, {arguments.tokens} tokens")
    for column in ("", "ms a layer", "times plain"):
        table.add_column(column, justify="left" if not column else "right")
    for name, milliseconds in found.items():
        table.add_row(name, f"{milliseconds:.2f}", f"{milliseconds / found[PLAIN]:.2f}")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": describe_machine(), "layer_ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
