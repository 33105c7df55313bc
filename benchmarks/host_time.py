"""Times what layers cost the host: forward and backward on a few numbers, where kernels take next to nothing.

    python -m benchmarks.host_time [--calls 200 --rounds 15]

On a GPU, kernels of a small model end before the host has started the next ones. PyTorch's code, the fused ops in
Python (which compilers see) and those whose backward passes are in C++ run in turns on one thread; the shortest CPU
time of each counts, so that other processes disturb least. Attention makes a GPU's calls, with stand-ins for the flash
kernels and the merge that compute nothing (flash_stand_in.cpp, compiled at the first run).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.cpp_extension import load
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen2 import modeling_qwen2

from trl_fast.data.segments import TreeLengths
from trl_fast.modeling.attention import tree_attention, varlen
from trl_fast.modeling.attention.row_attention import AttentionSpec
from trl_fast.modeling.attention.varlen import CudaRowAttention
from trl_fast.modeling.fused_layers import fuse_layers
from trl_fast.modeling.segment_attention import row_inputs, use_segment_attention
from trl_fast.ops.layers import (
    Adapter,
    gated_activation,
    joint_linear,
    norm_and_residual,
    qk_norm_rotary,
    residual_rms_norm,
    rms_norm,
    rotary,
)

from .machine_info import describe_machine

EPS, WIDTH, HEAD_WIDTH = 1e-6, 64, 16


class StandIns(CudaRowAttention):
    """Attends as on a GPU, by kernels that compute nothing."""

    device_kind = None

    @staticmethod
    def supports(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> tuple[bool, str]:
        return True, ""

    @staticmethod
    def eager_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor | None:
        run, told = torch.ops.trl_fast.eager_varlen_attention.default, varlen.told_in_cpp(spec.mask, query.device)
        return run(query, key, value, *told, spec.scale)


class Layer(NamedTuple):
    """Holds what a layer computes, in PyTorch and fused, and the shapes of what it is given."""

    name: str
    plain: Callable
    fused: Callable
    shapes: tuple[tuple[int, ...], ...]


def layers() -> Iterator[Layer]:
    """Yields the parts of a decoder layer that are fused, on one row of 8 tokens."""
    norm, query_norm, key_norm = (LlamaRMSNorm(width, EPS) for width in (WIDTH, HEAD_WIDTH, HEAD_WIDTH))
    rows, heads = ((1, 8, WIDTH),), ((1, 4, 8, HEAD_WIDTH), (1, 2, 8, HEAD_WIDTH))
    cos, sin = torch.randn(2, 1, 8, HEAD_WIDTH)

    def plain_sum(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return norm(total), total

    weights = query_norm.weight, key_norm.weight
    yield Layer("norm", norm, lambda x: rms_norm(x, norm.weight, EPS), rows)
    yield Layer(
        "norm beside the residual", lambda x: (norm(x), x), lambda x: norm_and_residual(x, norm.weight, EPS), rows
    )
    yield Layer(
        "residual and norm", plain_sum, lambda x, residual: residual_rms_norm(x, residual, norm.weight, EPS), rows * 2
    )
    yield Layer("gate", lambda gate, up: F.silu(gate) * up, gated_activation, rows * 2)
    yield Layer(
        "rotation", lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), lambda q, k: rotary(q, k, cos, sin), heads
    )
    yield Layer(
        "norms and rotation",
        lambda q, k: apply_rotary_pos_emb(query_norm(q), key_norm(k), cos, sin),
        lambda q, k: qk_norm_rotary(q, k, *weights, EPS, cos, sin),
        heads,
    )


def linear_layers() -> Iterator[Layer]:
    """Yields an attention's three projections, without adapters and with them."""
    weights = [nn.Parameter(torch.randn(width, WIDTH)) for width in (WIDTH, WIDTH // 2, WIDTH // 2)]
    adapters = [
        Adapter(nn.Parameter(torch.randn(8, WIDTH)), nn.Parameter(torch.randn(len(weight), 8)), 2.0)
        for weight in weights
    ]
    rows, biases = ((1, 8, WIDTH),), [None] * len(weights)

    def plain_lora(x: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(weights, adapters, strict=True)
        return [F.linear(x, weight) + F.linear(F.linear(x, a), b) * scaling for weight, (a, b, scaling) in pairs]

    yield Layer(
        "three projections",
        lambda x: [F.linear(x, weight) for weight in weights],
        lambda x: joint_linear(x, weights, biases),
        rows,
    )
    yield Layer("three projections, LoRA", plain_lora, lambda x: joint_linear(x, weights, biases, adapters), rows)


def decoder_layer(
    trees: tuple[TreeLengths, ...] = ((4, 2, 2),), places: Sequence[int] = (0, 1, 2, 3, 4, 5, 4, 5)
) -> Layer:
    """Returns a whole decoder layer of Qwen2's code, with attention of two sequences that share their first tokens.

    trees: lengths of the row's segments; places: of its tokens in their sequences.
    """
    config = Qwen2Config(
        **{"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "vocab_size": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"},
    )
    plain = Qwen2ForCausalLM(config)
    fused = copy.deepcopy(plain)
    use_segment_attention(fused)
    fuse_layers(fused, torch.device("cpu"), required=True)
    positions = torch.tensor([places])
    angles = plain.model.rotary_emb(torch.ones(1), positions)
    keywords = row_inputs(trees, torch.ones(1))

    turn, turn_fused = apply_rotary_pos_emb, modeling_qwen2.apply_rotary_pos_emb

    def run(model: Any, function: Callable, x: torch.Tensor, **keywords: object) -> torch.Tensor:
        # All models of a family call one function.
        modeling_qwen2.apply_rotary_pos_emb = function
        return model.model.layers[0](x, position_ids=positions, position_embeddings=angles, **keywords)

    return Layer(
        "decoder layer",
        lambda x: run(plain, turn, x, attention_mask=None),
        lambda x: run(fused, turn_fused, x, **keywords),
        ((1, len(places), WIDTH),),
    )


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Lets attention make a GPU's calls within, of kernels that compute nothing."""
    load(
        "trl_fast_flash_stand_in",
        [str(Path(__file__).with_suffix("").with_name("flash_stand_in.cpp"))],
        is_python_module=False,
    )
    with (
        mock.patch.object(tree_attention, "KERNELS", (StandIns,)),
        mock.patch.object(varlen, "merge_attention", torch.ops.trl_fast.merge_attention),
    ):
        yield


@contextmanager
def ops_in_python() -> Iterator[None]:
    """Lets the layers' ops run in Python within."""
    with ExitStack() as stack:
        for name, module in [*sys.modules.items()]:
            for choice in ("eager_op", "eager_linear"):
                if name.startswith("trl_fast.ops.layers.") and hasattr(module, choice):
                    stack.enter_context(mock.patch.object(module, choice, return_value=None))
        stack.enter_context(mock.patch.object(StandIns, "eager_attention", return_value=None))
        yield


def microseconds(run: Callable, shapes: tuple[tuple[int, ...], ...], calls: int) -> float:
    """Measures the CPU time of a call, forward and backward, as the mean of so many."""
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    made = run(*given)
    grads = [torch.ones_like(out) for out in ([made] if isinstance(made, torch.Tensor) else made)]
    start = time.process_time()
    for _ in range(calls):
        torch.autograd.backward(run(*given), grads, inputs=given)
    return 1e6 * (time.process_time() - start) / calls


CONTENDERS = {"PyTorch": nullcontext, "in Python": ops_in_python, "in C++": nullcontext}


def measure(layer: Layer, calls: int, rounds: int) -> dict[str, float]:
    """Times the contenders in turns; microseconds a call."""
    best = dict.fromkeys(CONTENDERS, float("inf"))
    for _ in range(rounds):
        for name, context in CONTENDERS.items():
            with context():
                spent = microseconds(layer.plain if name == "PyTorch" else layer.fused, layer.shapes, calls)
            best[name] = min(best[name], spent)
    return best


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    console = Console()
    machine = describe_machine()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    table = Table(title="host time of a call, forward and backward")
    for column in ("", *(f"{name}, µs" for name in CONTENDERS), "PyTorch / C++", "Python / C++"):
        table.add_column(column, justify="left" if not column else "right")
    every = [*layers(), *linear_layers(), decoder_layer()]
    for layer in track(every, description="layers", transient=True):
        with kernels_of_a_gpu():
            plain, python, compiled = measure(layer, arguments.calls, arguments.rounds).values()
        table.add_row(
            layer.name,
            *(f"{spent:.0f}" for spent in (plain, python, compiled)),
            f"{plain / compiled:.2f}×",
            f"{python / compiled:.2f}×",
        )
    console.print(table)


if __name__ == "__main__":
    main()
