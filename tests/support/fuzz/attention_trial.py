"""Tries attention of a row of trees: trees, windows, runs, caps, widths and strides of any kind."""

from __future__ import annotations

import random

import torch

from support.fuzz.draw import Draw
from support.fuzz.hold import Held
from support.row_attention import random_runs, random_tree
from trl_fast.data.segments import num_tokens, segments_of
from trl_fast.ops.attention import TokenTable, row_attention, row_attention_backward

EPS = torch.finfo(torch.float32).eps


def _table(draw: Draw) -> TokenTable:
    """Returns the table of a row of up to three trees."""
    choice = random.Random(draw.choose("trees", *range(1000)))
    trees = tuple(random_tree(choice) for _ in range(choice.randrange(1, 4)))
    runs = random_runs(choice, trees) if draw.chance("runs", 0.3) else ()
    window = draw.choose("window", 0, 0, 1, 3, 40)
    segments = [n for s in segments_of(trees) for n in (s.start, s.end, s.tree_end, s.offset)]
    assert sum(map(num_tokens, trees)) == (segments[-3] if segments else 0)
    return TokenTable(segments, [n for run in runs for n in run], draw.chance("whole_runs", 0.3), window)


def try_attention(draw: Draw, held: Held) -> None:
    """Tries row_attention and its gradients."""
    table = _table(draw)
    tokens = table.segments[-3]
    dtype = draw.choose("dtype", torch.float32, torch.float32, torch.bfloat16, torch.float16)
    groups, size = draw.choose("groups", 1, 2, 3), draw.choose("size", 1, 2, 3, 7)
    widths = draw.choose("widths", (1, 1), (16, 16), (17, 5), (40, 64), (64, 64))
    shapes = (groups * size, widths[0]), (groups, widths[0]), (groups, widths[1]), (groups * size, widths[1])
    names = ("query", "key", "value", "grad")
    given = [
        draw.laid_out(name, draw.normal(heads, tokens, width).to(dtype))
        for name, (heads, width) in zip(names, shapes, strict=True)
    ]
    options = draw.choose("scale", 0.1, 0.5), draw.choose("softcap", 0.0, 0.0, 2.0)

    def results(backend: str, given: list[torch.Tensor]) -> list[torch.Tensor]:
        out, lse = row_attention(*given[:3], table, *options, backend=backend)
        found = row_attention_backward(given[3], *given[:3], out, lse, table, *options, backend=backend)
        return [out, lse, *found]

    found = results("cpp", given), results("torch", given), results("torch", [x.double() for x in given])
    for name, got, plain, exact in zip(("out", "lse", "query", "key", "value"), *found, strict=True):
        # Sums of as many numbers of both signs as there are tokens: relative to the largest one.
        unit = 1 + (exact.abs().max() if exact.numel() else 0.0)
        held.close(name, got, plain, exact, unit, 8 * torch.finfo(got.dtype).eps + 64 * EPS)
