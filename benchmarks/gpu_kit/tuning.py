"""Times configurations of the fused kernel, and the row kernels alone, so that constants are what was measured.

Variants are compiled while earlier phases have the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from trl_fast.ops import BACKENDS, supports
from trl_fast.ops.head.fused_kernel import SlicedWeight, empty_packed, fused_tiles, score_rows_fused, tiles_of
from trl_fast.ops.head.kept_logits import CHUNK
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.row_kernels import ROW_KERNELS
from trl_fast.ops.head.sweep import new_state

from ..head_size import Size
from .ceilings import random_matrix
from .phase_context import Kit

SIZES = (Size(8192, 896, 151936), Size(8192, 2048, 151936), Size(8192, 4096, 151936))
TINY_SIZES = (Size(32, 32, 640),)
ROUNDS = 5
_COMPILING = 6


def variants(device: torch.device) -> list:
    """Returns configurations around the one that is used, and that of CUTLASS; none where Triton's does not serve.

    Each kind of GPU begins from its own. One that does not fit there is left out, with its reason, when it is timed.
    """
    now = fused_tiles("triton", SIZES[0].hidden, torch.bfloat16, device)
    if now is None:
        return []
    changes = [{}, {"flatten": not now.flatten}, {"tma": not now.tma}, {"num_stages": now.num_stages + 1}]
    changes += [{"num_stages": now.num_stages - 1}, {"pieces": now.pieces // 2}, {"group": 4}, {"group": 16}]
    changes += [{"rows": 256, "columns": 128, "pieces": 4}, {"rows": 128, "columns": 256, "pieces": 8}]
    changes += [{"columns": 128, "num_warps": 4, "pieces": 4, "num_stages": 4}, {"columns": 128, "pieces": 4}]
    changes += [{"depth": 2 * now.depth, "num_stages": 2}]
    made_with_cutlass, _ = tiles_of("cutlass", device)
    found = dict.fromkeys(now._replace(**change) for change in changes)
    return [*found, *([made_with_cutlass] if made_with_cutlass else [])]


def prepare(device: torch.device, tiny: bool) -> None:
    """Compiles every variant for small factors; one that does not compile is found when it is timed."""
    if device.type != "cuda" or tiny:
        return
    small = Size(256, 128, 1024)
    calls = [fused_call(small, tiles, keep, device) for tiles in variants(device) for keep in (False, True)]
    with ThreadPoolExecutor(_COMPILING) as pool:
        list(pool.map(_quietly, calls))
    torch.cuda.synchronize()


def _quietly(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        return


def run(kit: Kit) -> None:
    for size in TINY_SIZES if kit.tiny else SIZES:
        if kit.late(f"fused kernel at {size}", 4):
            return
        for tiles in variants(kit.device):
            for keep in (False, True):
                _time(
                    kit, "fused kernel", size, fused_call(size, tiles, keep, kit.device), tiles=list(tiles), keep=keep
                )
        kit.clock.release()
    size = TINY_SIZES[0] if kit.tiny else Size(4096, 0, 151936)
    for backend in BACKENDS[:2] if kit.is_gpu else ("torch",):
        if not supports("linear_logprob", backend, kit.device, torch.bfloat16).ok:
            continue
        for what, num_bytes, call in row_kernels(size, backend, kit.device):
            _time(kit, f"{what}, {backend}", size, call, num_bytes)
        kit.clock.release()


def _time(kit: Kit, what: str, size: Size, call: Callable[[], object], num_bytes: int = 0, **values: object) -> None:
    try:
        ms = kit.clock.median(call, ROUNDS)
    except Exception as error:
        kit.facts.skip(what, error, size=str(size), **values)
        return
    rate = {"gb_per_s": num_bytes / ms / 1e6} if num_bytes else {"tflops": size.pass_flops / ms / 1e9}
    kit.facts.add(what, size=str(size), ms=ms, **rate, **values)


def fused_call(size: Size, tiles: object, keep: bool, device: torch.device) -> Callable[[], None]:
    n, h, v = size
    hidden, weight = random_matrix(n, h, device), random_matrix(v, h, device, h**-0.5)
    targets, state = torch.randint(0, v, (n,), device=device), new_state(n, device)
    kept = empty_packed(n, v, device, tiles.columns) if keep else None
    given = (hidden, SlicedWeight.whole(weight), targets, None, LogitTransform(), 0, state, kept, tiles, 1 << 31)
    return functools.partial(score_rows_fused, *given)


def row_kernels(size: Size, backend: str, device: torch.device) -> list[tuple[str, int, Callable[[], object]]]:
    """Yields (name, bytes, call) of each row kernel on a tile of all columns."""
    n, v = size.rows, size.vocab
    kernels = ROW_KERNELS["triton" if backend == "triton" else backend]
    logits = torch.empty(n, v, device=device).normal_(0, 3)
    targets, state = torch.randint(0, v, (n,), device=device), new_state(n, device)
    lse = torch.full((n,), 16.0, device=device)
    coefficients = torch.rand(4, n, device=device)
    narrow = torch.empty(n, v, dtype=torch.bfloat16, device=device)
    numbers = (1.0, 0.0, 1.0)
    calls = [
        ("row_scores", 4, lambda: kernels.scores(logits, targets, None, *numbers, 0, 0, state)),
        ("row_grad", 6, lambda: kernels.grad(logits, targets, None, *numbers, lse, coefficients, 0, narrow)),
    ]
    if kernels.grad_packed is not None:
        kept = empty_packed(n, v, device).tile(slice(0, v))
        out = kept.values.view(torch.bfloat16)
        packed = (targets, None, 1.0, 1.0, 0, 0, state, *kept)
        graded = (kept.values, None, targets, 1.0, 1.0, lse, coefficients, 0, out, kept.tops)
        calls += [
            ("row_scores_packed", 6, lambda: kernels.scores_packed(logits, *packed)),
            ("row_grad_packed in place", 4, lambda: kernels.grad_packed(*graded)),
        ]
        if backend == "triton":
            fused = empty_packed(n, v, device, CHUNK // 8).tile(slice(0, v))
            fused.tops.fill_(9.0)
            out = fused.values.view(torch.bfloat16)
            graded = (fused.values, None, targets, 1.0, 1.0, lse, coefficients, 0, out, fused.tops, CHUNK // 8)
            calls.append(("row_grad_packed in place, chunks of 256", 4, lambda: kernels.grad_packed(*graded)))
    return [(what, width * n * v, call) for what, width, call in calls]
