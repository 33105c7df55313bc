"""Everything about this repository that only an NVIDIA GPU can tell: are the ops right, how fast, how much memory.

    python -m benchmarks.gpu_check [--rows 4096 --hidden 2048 --vocab 151936 --rounds 5]

Checks every op on every backend that serves here against float64, and rows without padding, tiled MLPs and offloaded
activations against the padded layout. Times the head against TRL, plain PyTorch, torch's chunked cross-entropy and, if
installed, Liger-Kernel and cut-cross-entropy, with peak memory; and the fused scoring kernel against the two steps
that it replaces, for heads on either side of the size up to which trl_fast/ops/fused_scores.py expects it to be
faster. Writes benchmarks/results/gpu_NAME.json and .md, and exits 1 if a check failed. Without a GPU it says so,
measures nothing, and exits 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from trl_fast.ops import (
    BACKENDS,
    linear_cross_entropy,
    linear_logprob,
    linear_token_loss,
    pair_loss,
    policy_loss,
    selective_log_softmax,
    supports,
)
from trl_fast.ops.blocks import DEFAULT_WORKSPACE_BYTES, Head, score_rows
from trl_fast.ops.fused_scores import can_fuse, score_rows_fused, serves_fused
from trl_fast.ops.rows import finish_scores, new_state
from trl_fast.ops.scores import ENTROPY, ENTROPY_ROW, LOGPROB_ROW
from trl_fast.ops.transform import LogitTransform

from .linear_logprob import MODES, Problem, contenders, make_problem, report
from .memory import MIB
from .timing import Contender, race

RESULTS = Path(__file__).parent / "results"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_SIZES = (256, 576, 1024, 2048, 4096)
# Relative error in the 2-norm of a gradient: some units in the last place of the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm; NaN counts as infinite."""
    found = ((got.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()
    return float("inf") if found != found else found


def head_losses(backend: str | None) -> dict[str, Callable[..., torch.Tensor]]:
    """Summed losses of hidden, weight and targets by op; backend None is the float64 truth by whole logits."""

    def truth(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")

    if backend is None:
        names = ("linear_logprob", "linear_cross_entropy", "linear_token_loss", "selective_log_softmax")
        return dict.fromkeys(names, truth)
    options = {"backend": backend, "workspace_bytes": 4 << 20}
    return {
        "linear_logprob": lambda *given: -linear_logprob(*given, **options).logprobs.sum(),
        "linear_cross_entropy": lambda *given: linear_cross_entropy(*given, reduction="sum", **options),
        "linear_token_loss": lambda *given: linear_token_loss(*given, lambda s, _: -s.logprobs.sum(), **options).loss,
        "selective_log_softmax": lambda h, w, t: -selective_log_softmax(h @ w.T, t, backend=backend).sum(),
    }


def check_heads(device: torch.device, vocab: int = 32003) -> Iterator[tuple[str, float, float]]:
    """(what, error, tolerance) of every head op, backend and dtype: the largest of the gradients' errors."""
    for dtype in DTYPES:
        problem = make_problem(300, 128, vocab, dtype, device).for_mode("trained")
        leaves = (problem.hidden, problem.weight)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        for backend in BACKENDS:
            for op, loss in head_losses(backend).items():
                if not supports(op, backend, device, dtype).ok:
                    continue
                exact = torch.autograd.grad(head_losses(None)[op](*wide, problem.targets), wide)
                got = torch.autograd.grad(loss(*leaves, problem.targets), leaves)
                worst = max(error(a, b) for a, b in zip(got, exact, strict=True))
                yield f"{op}, {backend}, {dtype}".replace("torch.", ""), worst, TOLERANCE[dtype]


def check_losses(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """The same for the losses over vectors of tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (16,), generator=generator)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(device)
    branch = torch.arange(16).repeat_interleave(lengths).to(device)
    logprobs = -torch.rand(len(branch), generator=generator).to(device)
    old, reference = logprobs + 0.1, torch.randn(16, generator=generator).to(device)

    def gradient(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaf = logprobs.detach().to(dtype).requires_grad_()
        rows = (old.to(dtype), reference.to(dtype), branch, torch.ones_like(reference, dtype=dtype))
        pairs = pair_loss(leaf, starts, reference.to(dtype), lengths.to(device), backend=backend).losses.sum()
        policy = policy_loss(leaf, *rows, backend=backend).loss
        return {"pair_loss": torch.autograd.grad(pairs, leaf)[0], "policy_loss": torch.autograd.grad(policy, leaf)[0]}

    exact = gradient("torch", torch.float64)
    for backend in BACKENDS:
        if supports("pair_loss", backend, device, torch.float32).ok:
            for op, got in gradient(backend, torch.float32).items():
                yield f"{op}, {backend}", error(got, exact[op]), TOLERANCE[torch.float32]


def fused_step(problem: Problem, state: torch.Tensor, outputs: int = 0) -> Callable[[], None]:
    """Scores by the fused kernel, whether the arithmetic would choose it here or not."""
    given = (problem.hidden.detach(), problem.weight.detach(), problem.targets, None, LogitTransform())
    return lambda: score_rows_fused(*given, outputs, state, DEFAULT_WORKSPACE_BYTES)


def two_steps(problem: Problem, state: torch.Tensor) -> Callable[[], None]:
    """The same by a product and a row kernel."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    head = Head(weight, None, LogitTransform(), weight.dtype, "triton", DEFAULT_WORKSPACE_BYTES)
    no_room = head.empty_logits(0, len(hidden))
    return lambda: score_rows(head, hidden, problem.targets, 0, state, keep=no_room)


def check_fused_scores(device: torch.device, vocab: int = 32003) -> Iterator[tuple[str, float, float]]:
    """Log-probs and entropies of the fused kernel, which accumulates in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        problem = make_problem(300, 128, vocab, dtype, device)
        if not can_fuse("triton", problem.weight, dtype):
            continue
        state = new_state(300, device)
        fused_step(problem, state, ENTROPY)()
        got = finish_scores(state, ENTROPY, vocab, torch.float32)
        logp = (problem.hidden.detach().double() @ problem.weight.detach().double().T).log_softmax(-1)
        chosen, entropy = logp.gather(1, problem.targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(-1)
        for name, row, exact in (("log-probs", LOGPROB_ROW, chosen), ("entropies", ENTROPY_ROW, entropy)):
            what = f"fused scores, {name}, {dtype}".replace("torch.", "")
            yield what, error(got[row], exact), TOLERANCE[torch.float32]


def small_model(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A random model with grouped-query heads, ready to be scored."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl_fast.modeling.scoring import attach_scoring

    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=1000)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(device, dtype)
    attach_scoring(model)
    return model


def score_and_gradient(model: torch.nn.Module, layout: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Log-probs of some pairs, and all gradients as one vector."""
    from trl_fast.data import Tree, pack_trees
    from trl_fast.modeling.scoring import score

    trees = [Tree([*range(5, 30 + i)], [[*range(40, 90 + 9 * i)], [*range(200, 230 + i)]]) for i in range(4)]
    model.zero_grad()
    logprobs = score(model, pack_trees(trees, layout, 0).to(device)).tokens.logprobs
    logprobs.square().mean().backward()
    gradients = torch.cat([weight.grad.double().flatten() for weight in model.parameters()])
    return {"log-probs": logprobs.detach().double(), "gradients": gradients}


def check_layouts(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """A small random model in rows without padding, then its MLPs in tiles, then its activations offloaded.

    In float32 a GPU has no flash kernel, so that attention there is by plain PyTorch.
    """
    from trl_fast.modeling.attention import use_segment_attention
    from trl_fast.modeling.offloading import offload_activations
    from trl_fast.modeling.tiled_mlp import tile_mlps

    for dtype in (torch.float32, torch.bfloat16):
        model, name = small_model(device, dtype), str(dtype).removeprefix("torch.")
        padded = score_and_gradient(model, "padded", device)
        use_segment_attention(model)
        changes = {"as it is": lambda: None, "tiled MLPs": lambda model=model: tile_mlps(model, 128)}
        for change, apply in changes.items():
            apply()
            for layout in ("packed", "shared_prefix"):
                got = score_and_gradient(model, layout, device)
                for what, exact in padded.items():
                    yield f"{what} in {layout}, {change}, {name}", error(got[what], exact), TOLERANCE[dtype]
        kept = score_and_gradient(model, "shared_prefix", device)
        offload_activations(model)
        offloaded = score_and_gradient(model, "shared_prefix", device)
        for what, exact in kept.items():
            yield f"{what}, activations offloaded, {name}", error(offloaded[what], exact), TOLERANCE[dtype]


def liger(problem: Problem) -> Contender | None:
    """Liger-Kernel's fused linear cross-entropy, if it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return Contender("Liger-Kernel", lambda: loss(problem.weight, problem.hidden, problem.targets).backward())


def cut_cross_entropy(problem: Problem) -> Contender | None:
    """Apple's cut-cross-entropy, if it is installed."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return None
    from cut_cross_entropy import linear_cross_entropy as cce

    run = lambda: cce(problem.hidden, problem.weight, problem.targets, reduction="sum").backward()  # noqa: E731
    return Contender("cut-cross-entropy", run)


def summed_contenders(problem: Problem) -> list[Contender]:
    """Summed cross-entropy with a trained head, forward and backward: ours and the peers that have only that."""
    given = (problem.hidden, problem.weight, problem.targets)
    options = torch.nn.LinearCrossEntropyOptions()
    runs = {
        "ours": lambda: linear_cross_entropy(*given, reduction="sum").backward(),
        "F.linear_cross_entropy": lambda: F.linear_cross_entropy(*given, reduction="sum", options=options).backward(),
        "plain PyTorch": lambda: F.cross_entropy(F.linear(*given[:2]).float(), given[2], reduction="sum").backward(),
    }
    found = [Contender(name, run) for name, run in runs.items()]
    return found + [peer for peer in (liger(problem), cut_cross_entropy(problem)) if peer is not None]


def run_checks(console: Console, device: torch.device) -> list[dict]:
    table = Table(title="correctness against float64")
    for column in ("what", "relative error", "allowed", ""):
        table.add_column(column)
    rows = []
    for check in (check_heads, check_fused_scores, check_losses, check_layouts):
        for what, found, allowed in check(device):
            rows.append({"what": what, "error": found, "allowed": allowed, "ok": found <= allowed})
            table.add_row(what, f"{found:.2e}", f"{allowed:.0e}", "ok" if found <= allowed else "[red]WRONG")
    console.print(table)
    return rows


def run_races(console: Console, arguments: argparse.Namespace, device: torch.device) -> list[dict]:
    problem = make_problem(arguments.rows, arguments.hidden, arguments.vocab, torch.bfloat16, device)
    rows = []
    for mode in MODES:
        raced = contenders(problem, mode, set())
        race(raced, arguments.rounds, 60.0, device, mode)
        rows += report(console, mode, raced)
    raced = summed_contenders(problem.for_mode("trained"))
    race(raced, arguments.rounds, 60.0, device, "summed cross-entropy")
    for contender in raced:
        ratio = contender.median / raced[0].median
        peak = contender.peak_bytes / MIB
        rows.append({"mode": "summed", "name": contender.name, "over_ours": ratio, "peak_mib": peak})
        console.print(f"summed cross-entropy: {contender.name}: {ratio:.2f}× ours, peak {peak:.0f} MiB")
    return rows


def race_fused_scores(console: Console, arguments: argparse.Namespace, device: torch.device) -> list[dict]:
    """By hidden size, how the fused kernel does against two steps, and what the arithmetic expects."""
    rows = []
    for size in FUSED_SIZES:
        problem = make_problem(arguments.rows, size, arguments.vocab, torch.bfloat16, device)
        if not can_fuse("triton", problem.weight, torch.bfloat16):
            continue
        state = new_state(arguments.rows, device)
        raced = [Contender("fused", fused_step(problem, state)), Contender("two steps", two_steps(problem, state))]
        race(raced, arguments.rounds, 60.0, device, f"scoring, H={size}")
        ratio = raced[1].median / raced[0].median
        chosen = serves_fused("triton", problem.weight, torch.bfloat16, 4)
        rows.append({"mode": "fused scores", "hidden": size, "two_steps_over_fused": ratio, "chosen": chosen})
        console.print(f"scoring, H={size}: two steps take {ratio:.2f}× the fused kernel; it is chosen: {chosen}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU here: nothing was run, and nothing is claimed.")
        return 0
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    console = Console(record=True, width=130)
    console.print(f"{name}, torch {torch.__version__}, {vars(arguments)}")
    checks = run_checks(console, device)
    races = run_races(console, arguments, device) + race_fused_scores(console, arguments, device)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu_{name.replace(' ', '_')}"
    figures = {"device": name, "torch": torch.__version__, "checks": checks, "races": races}
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1))
    path.with_suffix(".md").write_text(f"# {name}\n\n```\n{console.export_text()}```\n")
    return 0 if all(row["ok"] for row in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
