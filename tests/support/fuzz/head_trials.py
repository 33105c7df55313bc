"""Tries the ops of the head: scores, gradients, and that the same rows agree bit for bit whatever is asked beside."""

from __future__ import annotations

from collections.abc import Callable

import torch

from support.fuzz.draw import Draw
from support.fuzz.head_cases import HeadCase, draw_backend, draw_head, draw_workspace
from support.fuzz.hold import Held
from trl_fast.ops import TokenScores, linear_logprob, linear_token_loss
from trl_fast.ops.head.row_statistics import OUTPUT_BITS

FLOAT_OUTPUTS = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits")
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def arguments(case: HeadCase, workspace: int | None) -> tuple[tuple, dict]:
    problem = case.problem
    named = {"bias": problem.bias, "workspace_bytes": workspace, "backend": case.backend, **problem.transform}
    return (problem.hidden, problem.weight, problem.targets), named


def _hold_scores(held: Held, case: HeadCase, got: TokenScores, outputs: tuple[str, ...]) -> None:
    units = case.score_units()
    for name in FLOAT_OUTPUTS:
        if name in outputs:
            held.close(name, getattr(got, name), case.plain[name], case.exact[name], units[name], case.score_floor())
        elif getattr(got, name) is not None:
            held.faults.append(f"{name} was not asked for")
    if "is_top1" in outputs and len(case.logits):
        others = case.logits.scatter(1, case.problem.targets[:, None], float("-inf")).amax(1)
        target = case.logits.gather(1, case.problem.targets[:, None])[:, 0]
        clear = (target - others).abs() > 16 * torch.finfo(case.product).eps * case.logit_size()[:, 0]
        held.same("is_top1", got.is_top1[clear], case.exact["is_top1"][clear])


def _hold_gradients(held: Held, case: HeadCase, got: torch.Tensor, loss: Loss, least: float = 0.0) -> None:
    """Holds the gradients of a loss of log-probabilities and entropies; got: the op's loss, 0-d.

    least: probability that may be missing.
    """
    leaves = case.leaves
    if not leaves:
        return
    exact = loss(case.exact["logprobs"], case.exact["entropy"])
    plain = loss(case.plain["logprobs"], case.plain["entropy"])
    upstream = [case.exact[name].detach().requires_grad_() for name in ("logprobs", "entropy")]
    found = torch.autograd.grad(loss(*upstream), upstream, allow_unused=True)
    floors = case.gradient_floors()
    given = [torch.zeros_like(u) if g is None else g for g, u in zip(found, upstream, strict=True)]
    units = case.gradient_units(*given)
    ours, theirs, true = (torch.autograd.grad(x, list(leaves.values())) for x in (got, plain, exact))
    for (name, leaf), a, b, c in zip(leaves.items(), ours, theirs, true, strict=True):
        held.close(f"gradient of {name}", a, b, c, units[name] + least, floors[name], torch.finfo(leaf.dtype).tiny)
        if a.dtype != leaf.dtype:
            held.faults.append(f"gradient of {name}: {a.dtype}, not {leaf.dtype}")


def _smooth_loss(draw: Draw, num_rows: int, with_entropy: bool) -> Loss:
    """Returns a loss that weighs rows differently, some with nothing, and is not linear."""
    linear, square, own = (draw.normal(num_rows).double() for _ in range(3))
    weight = (draw.uniform(num_rows) < 0.8).double()

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        logprobs = logprobs.double()
        total = (weight * (linear * logprobs + 0.1 * square * logprobs.square())).sum()
        return total + (weight * own * entropy.double()).sum() if with_entropy else total

    return loss


def try_logprob(draw: Draw, held: Held) -> None:
    """Tries linear_logprob, its gradient exact or from a sample that holds every probability."""
    case = draw_head(draw, draw_backend(draw))
    positional, named = arguments(case, draw_workspace(draw, case))
    outputs = ("logprobs", *(name for name in OUTPUT_BITS if name != "logprobs" and draw.number(0, 1) < 0.5))
    least = 0.0
    if case.backend in ("cpp", "torch") and case.product == torch.float32 and draw.chance("sparse", 0.15):
        named |= {"head_grad": "sparse", "sparse_threshold": 1e-30}
        least = 1e-20
    got = linear_logprob(*positional, outputs=outputs, **named)
    _hold_scores(held, case, got, outputs)
    if case.leaves:
        entropy = got.logprobs.detach() * 0 if got.entropy is None else got.entropy
        loss = _smooth_loss(draw, len(positional[0]), "entropy" in outputs)
        _hold_gradients(held, case, loss(got.logprobs, entropy), loss, least)


def try_token_loss(draw: Draw, held: Held) -> None:
    """Tries linear_token_loss, row by row or in groups whose rows weigh on each other."""
    case = draw_head(draw, draw_backend(draw))
    positional, named = arguments(case, draw_workspace(draw, case))
    num_rows = len(positional[0])
    outputs = ("logprobs", "entropy") if draw.chance("entropy", 0.5) else ("logprobs",)
    sizes = draw.split(num_rows) if draw.chance("groups", 0.5) else None
    owner = torch.arange(num_rows)
    if sizes is not None:
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    smooth = _smooth_loss(draw, num_rows, "entropy" in outputs)
    linear, num_groups = draw.normal(num_rows).double(), num_rows if sizes is None else len(sizes)

    def whole(logprobs: torch.Tensor, entropy: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        full = torch.zeros(num_rows, dtype=torch.float64)
        logprobs = full.index_copy(0, rows, logprobs.double())
        entropy = full.index_copy(0, rows, entropy.double())
        sums = torch.zeros(num_groups, dtype=torch.float64).index_add(0, owner, linear * logprobs)
        return smooth(logprobs, entropy) + torch.nn.functional.softplus(sums).sub(torch.log(torch.tensor(2.0))).sum()

    def token_loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        entropy = scores.logprobs * 0 if scores.entropy is None else scores.entropy
        return whole(scores.logprobs, entropy, rows)

    skip = draw.choose("skip_zero_rows", None, True, False)
    found = linear_token_loss(
        *positional, token_loss, **named, outputs=outputs, group_sizes=sizes, skip_zero_rows=skip
    )
    _hold_scores(held, case, found.scores, outputs)
    every = torch.arange(num_rows)
    _hold_gradients(held, case, found.loss, lambda logprobs, entropy: whole(logprobs, entropy, every))


def try_agreement(draw: Draw, held: Held) -> None:
    """Tries that a row's scores are the same bits with gradient or without, trained head or frozen, in any op."""
    case = draw_head(draw, draw_backend(draw))
    (hidden, weight, targets), named = arguments(case, draw_workspace(draw, case))
    expected = None
    bias = named.pop("bias")
    for trains in ("nothing", "hidden", "head", "all"):
        leaves = [
            None if x is None else x.detach().requires_grad_(trains == "all" or (name == trains))
            for name, x in (("hidden", hidden), ("head", weight), ("head", bias))
        ]
        found = {"logprob": linear_logprob(leaves[0], leaves[1], targets, bias=leaves[2], **named).logprobs}
        sizes = draw.split(len(targets))
        for name, groups in (("token loss", None), ("groups", sizes)):
            given = (leaves[0], leaves[1], targets, lambda scores, rows: scores.logprobs.sum())
            found[name] = linear_token_loss(*given, bias=leaves[2], group_sizes=groups, **named).scores.logprobs
        for name, logprobs in found.items():
            expected = logprobs.detach() if expected is None else expected
            held.same(f"logprobs of {name}, {trains} trained", logprobs.detach(), expected)
