"""Tries linear_cross_entropy: ignored rows, smoothing, z-loss and every reduction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from support.fuzz.draw import Draw
from support.fuzz.head_cases import HeadCase, draw_backend, draw_head, draw_workspace
from support.fuzz.head_trials import arguments
from support.fuzz.hold import Held
from trl_fast.ops import linear_cross_entropy


@dataclass
class Terms:
    """Holds what is drawn beside a head: the terms of the loss, how it is reduced, and where ignored rows lie.

    place: (N,) int64, where the rows of the head lie among `total` rows; weights: (total,) float64, upstream.
    """

    smoothing: float
    z_loss: float
    reduction: str
    num_items: int | torch.Tensor | None
    ignore_index: int
    place: torch.Tensor
    total: int
    weights: torch.Tensor

    @classmethod
    def drawn(cls, draw: Draw, case: HeadCase) -> Terms:
        """Draws them for a head."""
        smooth = bool(case.exact["mean_logits"].isfinite().all()) and draw.chance("smoothing", 0.3)
        z_loss = 1e-3 * draw.chance("z_loss", 0.2)
        reduction = draw.choose("reduction", "mean", "sum", "none")
        num_items = draw.choose("num_items", None, 7, torch.tensor(3.0)) if reduction != "none" else None
        ignore, num_rows = draw.choose("ignore_index", -100, -1), len(case.problem.targets)
        ignored = 3 * draw.chance("ignored", 0.6)
        total = num_rows + ignored
        order = draw.uniform(total).argsort()[:num_rows].sort()[0]
        return cls(0.2 * smooth, z_loss, reduction, num_items, ignore, order, total, draw.normal(total).double())

    @property
    def by_row(self) -> torch.Tensor:
        """Returns what each row's loss counts, (N,) float64."""
        if self.reduction == "none":
            return self.weights[self.place]
        count = float(self.num_items or (max(len(self.place), 1) if self.reduction == "mean" else 1))
        return torch.full((len(self.place),), 1 / count, dtype=torch.float64)

    def losses(self, scores: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """Returns the rows' losses (N,) from scores and logits (N, V), float64."""
        lse = logits.logsumexp(-1)
        loss = -(1 - self.smoothing) * scores["logprobs"] + self.z_loss * lse.square()
        return loss - self.smoothing * (scores["mean_logits"] - lse) if self.smoothing else loss

    def spread(self, tensor: torch.Tensor, other: float) -> torch.Tensor:
        """Returns a tensor (N, ...) among `total` rows; ignored ones are `other`."""
        room = tensor.detach().new_full((self.total, *tensor.shape[1:]), other)
        return room.index_copy(0, self.place, tensor.detach())


def try_cross_entropy(draw: Draw, held: Held) -> None:
    """Tries it with ignored rows whose hidden states are NaN: nobody may look."""
    case = draw_head(draw, draw_backend(draw))
    terms = Terms.drawn(draw, case)
    (hidden, weight, targets), named = arguments(case, draw_workspace(draw, case))
    rows = terms.spread(hidden, float("nan")).requires_grad_(hidden.requires_grad)
    got = linear_cross_entropy(
        *(rows, weight, terms.spread(targets, terms.ignore_index)),
        **named,
        ignore_index=terms.ignore_index,
        label_smoothing=terms.smoothing,
        z_loss=terms.z_loss,
        reduction=terms.reduction,
        num_items=terms.num_items,
    )
    true = terms.losses(case.exact, case.logits)
    theirs = terms.losses(case.plain, case.problem.logits(case.product).double())
    size, by_row = case.logit_size()[:, 0], terms.by_row
    unit = true.detach().abs() * size + (terms.smoothing > 0) * size + terms.z_loss * size.square()
    if terms.reduction == "none":
        if (got.detach().index_fill(0, terms.place, 0) != 0).any():
            held.faults.append("an ignored row has a loss")
        held.close("losses", got[terms.place], theirs, true, unit, case.score_floor())
        got = (got.double() * terms.weights).sum()
    plain, exact = (by_row * theirs).sum(), (by_row * true).sum()
    held.close("loss", got, plain, exact, (unit * by_row.abs()).sum(), case.score_floor())
    if case.leaves:
        _hold_gradients(held, case, terms, rows, (got, plain, exact))


def _hold_gradients(
    held: Held, case: HeadCase, terms: Terms, rows: torch.Tensor, losses: tuple[torch.Tensor, ...]
) -> None:
    """Holds the gradients; rows: the hidden states that the op was given; losses: ours, PyTorch's, the exact one."""
    leaves, by_row = case.leaves, terms.by_row
    given = [rows if name == "hidden" else leaf for name, leaf in leaves.items()]
    ours = dict(zip(leaves, torch.autograd.grad(losses[0], given), strict=True))
    theirs, true = (torch.autograd.grad(x, list(leaves.values())) for x in losses[1:])
    if "hidden" in ours:
        if (ours["hidden"].index_fill(0, terms.place, 0) != 0).any():
            held.faults.append("an ignored row has a gradient")
        ours["hidden"] = ours["hidden"][terms.place]
    # What smoothing and z-loss add has no p - 1 to stay exact for.
    more = by_row.abs() * (terms.smoothing + 2 * terms.z_loss * case.logits.detach().logsumexp(-1).abs())
    flat = (more[:, None] * case.logit_size() * case.steepness).expand(case.logits.shape)
    hidden, weight = (x.detach().double().abs() for x in (case.problem.hidden, case.problem.weight))
    added = {"hidden": flat @ weight, "weight": flat.t() @ hidden, "bias": flat.sum(0)}
    units, floors = case.gradient_units(by_row, torch.zeros_like(by_row)), case.gradient_floors()
    for (name, leaf), b, c in zip(leaves.items(), theirs, true, strict=True):
        unit = units[name] + added[name]
        held.close(f"gradient of {name}", ours[name], b, c, unit, floors[name], torch.finfo(leaf.dtype).tiny)
