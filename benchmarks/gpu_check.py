"""Everything about this repository that only an NVIDIA GPU can tell: are the ops right, how fast, how much memory.

    python -m benchmarks.gpu_check [--rows 4096 --hidden 2048 --vocab 151936 --rounds 5]

Checks every op on every backend that serves here against float64, in the modes and with the transforms, outputs and
formulas of benchmarks/gpu_cases.py, values and gradients; and rows without padding, tiled MLPs and offloaded
activations against the padded layout. Times the head against TRL, plain PyTorch, torch's chunked cross-entropy and, if
installed, Liger-Kernel and cut-cross-entropy, with peak memory; the fused scoring kernel against the two steps that it
replaces, for heads on either side of the size up to which trl_fast/ops/fused_scores.py expects it to be faster; and
the layouts of a batch of pairs. Writes benchmarks/results/gpu_NAME.json and .md after the checks and after each race,
and exits 1 if a check failed or something of ours could not be timed. Without a GPU it says so, measures nothing, and
exits 0.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from trl_fast.data import TokenBatch, Tree, pack_trees
from trl_fast.modeling.attention import use_segment_attention
from trl_fast.modeling.offloading import offload_activations
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.ops import BACKENDS, linear_cross_entropy, supports
from trl_fast.ops.blocks import score_rows
from trl_fast.ops.fused_scores import can_fuse, score_rows_fused, serves_fused
from trl_fast.ops.head import DEFAULT_WORKSPACE_BYTES, Head
from trl_fast.ops.rows import finish_scores, new_state
from trl_fast.ops.scores import ENTROPY, ENTROPY_ROW, LOGPROB_ROW
from trl_fast.ops.transform import LogitTransform

from .gpu_cases import HeadProblem, Tensors, head_cases, loss_cases
from .linear_logprob import MODES, Problem, contenders, make_problem, report
from .memory import MIB
from .timing import Contender, race

RESULTS = Path(__file__).parent / "results"
# Seconds; what takes longer runs once.
PATIENCE = 60.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_SIZES = (256, 576, 1024, 2048, 4096)
# Relative error in the 2-norm of a gradient: some units in the last place of the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Losses of sums of thousands of float32 log-probs.
LOSS_TOLERANCE = 1e-3


Check = Callable[[torch.device], Iterator[tuple[str, float, float]]]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm; NaN counts as infinite."""
    exact = exact.double()
    found = ((got.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()
    return float("inf") if found != found else found


def compare(
    what: str, run: Callable[[], Tensors], exact: Callable[[], Tensors], tolerance: float
) -> tuple[str, float, float]:
    """(what, error, tolerance): the largest of the errors, and whose it is; infinite if something raised."""
    try:
        got, wanted = run(), exact()
        errors = {name: error(got[name], value) for name, value in wanted.items()}
    except Exception as raised:
        return f"{what}: {type(raised).__name__}: {raised}", float("inf"), tolerance
    worst = max(errors, key=errors.__getitem__)
    return f"{what}: {worst}", errors[worst], tolerance


def check_heads(
    device: torch.device, rows: int = 300, hidden: int = 128, vocab: int = 32003
) -> Iterator[tuple[str, float, float]]:
    """Every op of the head in every mode, on every backend and in every dtype."""
    for dtype in DTYPES:
        problem = HeadProblem.random(rows, hidden, vocab, dtype, device)
        for case in head_cases():
            for backend in BACKENDS:
                if not supports(case.op, backend, device, dtype).ok:
                    continue
                # A few row blocks.
                run = functools.partial(case.run, problem, backend, rows * vocab * 4 // 3)
                what = f"{case.what}, {backend}, {dtype}".replace("torch.", "")
                yield compare(what, run, functools.partial(case.exact, problem), TOLERANCE[dtype])


def check_losses(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """The same for the losses over vectors of tokens."""
    for case in loss_cases(device):
        for backend in BACKENDS:
            if supports(case.op, backend, device, torch.float32).ok:
                run = functools.partial(case.run, backend, torch.float32)
                yield compare(f"{case.what}, {backend}", run, case.exact, LOSS_TOLERANCE)


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


def random_model(device: torch.device, dtype: torch.dtype, hidden: int = 256) -> torch.nn.Module:
    """A random model with grouped-query heads of 64 channels, ready to be scored."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4, vocab_size=1000)
    heads = dict(num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=1 << 15)).to(device, dtype)
    attach_scoring(model)
    return model


def some_pairs() -> list[Tree]:
    """Pairs whose lengths are all different."""
    return [Tree([*range(5, 30 + i)], [[*range(40, 90 + 9 * i)], [*range(200, 230 + i)]]) for i in range(4)]


def score_and_backward(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Log-probs of a batch; the gradients of a loss of them are the model's."""
    model.zero_grad()
    logprobs = score(model, batch).tokens.logprobs
    logprobs.square().mean().backward()
    return logprobs


def score_and_gradient(model: torch.nn.Module, layout: str, device: torch.device, trees: list[Tree]) -> Tensors:
    """Log-probs of some pairs, and all gradients as one vector."""
    logprobs = score_and_backward(model, pack_trees(trees, layout, 0).to(device))
    gradients = torch.cat([weight.grad.double().flatten() for weight in model.parameters()])
    return {"log-probs": logprobs.detach().double(), "gradients": gradients}


def check_layouts(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """A small random model in rows without padding, then its MLPs in tiles, then its activations offloaded.

    In float32 a GPU has no flash kernel, so that attention there is by plain PyTorch.
    """
    pairs = some_pairs()
    for dtype in (torch.float32, torch.bfloat16):
        model, name = random_model(device, dtype), str(dtype).removeprefix("torch.")
        padded = score_and_gradient(model, "padded", device, pairs)
        use_segment_attention(model)
        changes = {"as it is": lambda: None, "tiled MLPs": lambda model=model: tile_mlps(model, 128)}
        for change, apply in changes.items():
            apply()
            for layout in ("packed", "shared_prefix"):
                got = score_and_gradient(model, layout, device, pairs)
                for what, exact in padded.items():
                    yield f"{what} in {layout}, {change}, {name}", error(got[what], exact), TOLERANCE[dtype]
        kept = score_and_gradient(model, "shared_prefix", device, pairs)
        offload_activations(model)
        offloaded = score_and_gradient(model, "shared_prefix", device, pairs)
        for what, exact in kept.items():
            yield f"{what}, activations offloaded, {name}", error(offloaded[what], exact), TOLERANCE[dtype]


def liger(problem: Problem) -> Contender | None:
    """Liger-Kernel's fused linear cross-entropy, if it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None

    def run() -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        loss(problem.weight, problem.hidden, problem.targets).backward()

    return Contender("Liger-Kernel", run)


def cut_cross_entropy(problem: Problem) -> Contender | None:
    """Apple's cut-cross-entropy, if it is installed."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return None

    def run() -> None:
        from cut_cross_entropy import linear_cross_entropy as cce

        cce(problem.hidden, problem.weight, problem.targets, reduction="sum").backward()

    return Contender("cut-cross-entropy", run)


def summed_contenders(problem: Problem) -> list[Contender]:
    """Summed cross-entropy with a trained head, forward and backward: ours and the peers that have only that."""
    given = (problem.hidden, problem.weight, problem.targets)

    def chunked() -> None:
        options = torch.nn.LinearCrossEntropyOptions()
        F.linear_cross_entropy(*given, reduction="sum", options=options).backward()

    runs = {
        "ours": lambda: linear_cross_entropy(*given, reduction="sum").backward(),
        "F.linear_cross_entropy": chunked,
        "plain PyTorch": lambda: F.cross_entropy(F.linear(*given[:2]).float(), given[2], reduction="sum").backward(),
    }
    found = [Contender(name, run) for name, run in runs.items()]
    return found + [peer for peer in (liger(problem), cut_cross_entropy(problem)) if peer is not None]


CHECKS = (check_heads, check_fused_scores, check_losses, check_layouts)


def to_the_end(check: Check, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """What a check finds; the last entry is what it raised, if it did."""
    try:
        yield from check(device)
    except Exception as raised:
        yield f"{check.__name__}: {type(raised).__name__}: {raised}", float("inf"), 0.0


def run_checks(console: Console, device: torch.device) -> list[dict]:
    table = Table(title="correctness against float64")
    for column in ("what", "relative error", "allowed", ""):
        table.add_column(column)
    rows = []
    for check in CHECKS:
        for what, found, allowed in to_the_end(check, device):
            rows.append({"what": what, "error": found, "allowed": allowed, "ok": found <= allowed})
            table.add_row(what, f"{found:.2e}", f"{allowed:.0e}", "ok" if found <= allowed else "[red]WRONG")
    console.print(table)
    return rows


def timed_rows(console: Console, mode: str, raced: list[Contender]) -> list[dict]:
    """Each contender's time as a multiple of the first one's, and its peak of memory; or why it was not run."""
    rows = []
    for contender in raced:
        row = {"mode": mode, "name": contender.name}
        if contender.failure is not None:
            rows.append({**row, "not_run": contender.failure})
            console.print(f"{mode}: {contender.name}: not run: {contender.failure}")
            continue
        ratio, peak = contender.median / raced[0].median, contender.peak_bytes / MIB
        rows.append({**row, "over_first": ratio, "seconds": contender.seconds, "peak_mib": peak})
        console.print(f"{mode}: {contender.name}: {ratio:.2f}× {raced[0].name}, peak {peak:.0f} MiB")
    return rows


def race_heads(console: Console, arguments: argparse.Namespace, device: torch.device) -> Iterator[list[dict]]:
    """The head against its peers, mode by mode."""
    problem = make_problem(arguments.rows, arguments.hidden, arguments.vocab, torch.bfloat16, device)
    for mode in MODES:
        raced = contenders(problem, mode, set())
        race(raced, arguments.rounds, PATIENCE, device, mode, keep_going=True)
        yield report(console, mode, raced)
    raced = summed_contenders(problem.for_mode("trained"))
    race(raced, arguments.rounds, PATIENCE, device, "summed cross-entropy", keep_going=True)
    yield timed_rows(console, "summed cross-entropy", raced)


def race_fused_scores(console: Console, arguments: argparse.Namespace, device: torch.device) -> Iterator[list[dict]]:
    """By hidden size, how the fused kernel does against two steps, and what the arithmetic expects."""
    for size in FUSED_SIZES:
        problem = make_problem(arguments.rows, size, arguments.vocab, torch.bfloat16, device)
        if not can_fuse("triton", problem.weight, torch.bfloat16):
            continue
        state = new_state(arguments.rows, device)
        raced = [
            Contender("ours, fused", fused_step(problem, state)),
            Contender("ours, two steps", two_steps(problem, state)),
        ]
        race(raced, arguments.rounds, PATIENCE, device, f"scoring, H={size}", keep_going=True)
        chosen = serves_fused("triton", problem.weight, torch.bfloat16, 4)
        console.print(f"scoring, H={size}: the fused kernel is chosen: {chosen}")
        yield [{**row, "fused_is_chosen": chosen} for row in timed_rows(console, f"scoring, H={size}", raced)]


def race_layouts(console: Console, arguments: argparse.Namespace, device: torch.device) -> Iterator[list[dict]]:
    """Forward and backward of four pairs, each prompt as long as its two answers together, by layout."""
    prompt = arguments.layout_tokens
    answers = [[*range(40 + i, 140 + i)] * (prompt // 2 // 100 + 1) for i in range(2)]
    trees = [Tree([5 + i] * prompt, [answer[: prompt // 2] for answer in answers]) for i in range(4)]
    model = random_model(device, torch.bfloat16, arguments.layout_hidden)
    use_segment_attention(model)
    raced = []
    for layout in ("shared_prefix", "packed", "padded"):
        batch = pack_trees(trees, layout, 0).to(device)
        raced.append(Contender(f"ours, {layout}", functools.partial(score_and_backward, model, batch)))
    race(raced, arguments.rounds, PATIENCE, device, "layouts", keep_going=True)
    yield timed_rows(console, f"four pairs, prompts of {prompt} tokens", raced)


RACES = (race_heads, race_fused_scores, race_layouts)


def check_and_race(console: Console, arguments: argparse.Namespace, device: torch.device, name: str) -> bool:
    """Everything, written down as soon as it is known; whether nothing of ours failed."""
    console.print(f"{name}, torch {torch.__version__}, {vars(arguments)}")
    checks, races = run_checks(console, device), []
    path = RESULTS / f"gpu_{name.replace(' ', '_')}"

    def write() -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        figures = {"device": name, "torch": torch.__version__, "checks": checks, "races": races}
        path.with_suffix(".json").write_text(json.dumps(figures, indent=1))
        path.with_suffix(".md").write_text(f"# {name}\n\n```\n{console.export_text(clear=False)}```\n")

    write()
    for run in RACES:
        for rows in run(console, arguments, device):
            races += rows
            write()
    failed = [row["name"] for row in races if "not_run" in row and row["name"].startswith("ours")]
    return all(row["ok"] for row in checks) and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--layout_tokens", type=int, default=1024, help="of each prompt when layouts are timed")
    parser.add_argument("--layout_hidden", type=int, default=2048, help="a multiple of 128")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU here: nothing was run, and nothing is claimed.")
        return 0
    device = torch.device("cuda")
    console = Console(record=True, width=150)
    fine = check_and_race(console, arguments, device, torch.cuda.get_device_name(device))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
