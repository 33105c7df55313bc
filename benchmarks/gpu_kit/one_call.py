"""Makes one call by name, for profilers and checkers that watch a whole process."""

from __future__ import annotations

import argparse
import functools
from collections import deque
from collections.abc import Callable

import torch

from trl_fast.modeling.attention.tree_attention import tree_attention

from ..head_size import Size
from .correctness import backends_for, check_layers
from .divergences import check_divergences
from .float64_cases import HeadProblem, head_cases, loss_cases
from .tuning import fused_call, row_kernels, variants

SIZES = {"small": Size(70, 64, 2500), "large": Size(4096, 1024, 131072)}


def head(size: Size, device: torch.device) -> None:
    """Runs every op of the head in every mode on every backend that serves."""
    problem = HeadProblem.random(*size, torch.bfloat16, device)
    for case in head_cases():
        for backend in backends_for(case.op, device, torch.bfloat16):
            case.run(problem, backend, size.rows * size.vocab * 4)


def losses(_: Size, device: torch.device) -> None:
    """Runs every loss over vectors of tokens."""
    for case in loss_cases(device, longest=40):
        for backend in backends_for(case.op, device, torch.float32):
            case.run(backend, torch.float32)


def attention(_: Size, device: torch.device) -> None:
    """Runs forward and backward of a row of trees, of which one has an image."""
    shapes = ((4, 60, 64), (2, 60, 64), (2, 60, 64))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (torch.randn(1, *shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    tree_attention(query, key, value, ((10, 12, 8), (20, 10)), image_runs=((2, 9),)).sum().backward()


def layers(_: Size, device: torch.device) -> None:
    """Runs the ops of a layer forward and backward, rows in packs and others."""
    deque(check_layers(device, scale=1), maxlen=0)


def divergences(_: Size, device: torch.device) -> None:
    """Runs every divergence of two heads forward and backward."""
    deque(check_divergences(device, rows=9, hidden=64, vocab=4100), maxlen=0)


def kernels(size: Size, device: torch.device) -> None:
    """Runs each row kernel and the fused one, once."""
    for backend in backends_for("linear_logprob", device, torch.bfloat16):
        for _, _, call in row_kernels(size, backend, device):
            call()
    for tiles in variants(device)[:1]:
        for keep in (False, True):
            fused_call(size, tiles, keep, device)()


NAMES: dict[str, Callable[[Size, torch.device], None]] = {
    function.__name__: function for function in (head, losses, layers, divergences, attention, kernels)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(NAMES))
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    functools.partial(NAMES[arguments.name], SIZES[arguments.size], device)()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
