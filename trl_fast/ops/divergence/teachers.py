"""Holds the teacher of a sweep: another head, some tokens of one, or log-probabilities that are given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..head.row_kernels import RowKernels, row_kernels
from ..memory_pool import pooled_empty
from .formulas import DivergenceFormula
from .given import KnownTokens, likeliest_tokens, row_divergence_to_known
from .heads import DivergenceHead
from .row_kernels import divergence_kernel


@dataclass(eq=False)
class Teacher:
    """Holds the teacher's side of all rows, and computes the divergence of a block to it.

    head, hidden (N, H): its head and hidden states; or known: what is given of it. top_k: how many tokens of the head
    are compared, 0 for all; of_student: whether they are the student's likeliest ones, and not the teacher's; tail:
    whether all others are one more class; backend: that of the kernels.
    """

    formula: DivergenceFormula
    backend: str
    head: DivergenceHead | None = None
    hidden: torch.Tensor | None = None
    known: KnownTokens | None = None
    top_k: int = 0
    of_student: bool = False
    tail: bool = True
    _logits: torch.Tensor | None = None

    @property
    def compares_all(self) -> bool:
        """Tells whether the divergence is over the whole vocabulary."""
        return self.known is None and not self.top_k

    def bytes_per_column(self, student: DivergenceHead) -> int:
        """Returns the bytes that a row's column takes in the workspace, the student's logit included."""
        device = student.weight.device
        if self.compares_all:
            temporaries = divergence_kernel(self.backend, device).bytes_per_element
        else:
            temporaries = row_kernels(self.backend, device).bytes_per_element
            if student.logits != student.product:  # the gradient's room
                temporaries += student.product.itemsize
        return student.logits.itemsize + temporaries + (0 if self.head is None else self.head.logits.itemsize)

    def of_rows(self, rows: torch.Tensor | None) -> Teacher:
        """Returns the same of some rows, (A,) int64; None for all."""
        if rows is None:
            return self
        hidden = None if self.hidden is None else self.hidden[rows]
        known = None if self.known is None else KnownTokens(*(one[rows] for one in self.known))
        return replace(self, hidden=hidden, known=known)

    def compare(
        self,
        rows: slice,
        student: DivergenceHead,
        logits: torch.Tensor,
        weights: torch.Tensor,
        results: torch.Tensor,
        with_gradient: bool,
    ) -> torch.Tensor | None:
        """Computes the results (3, R) of a block, and returns its gradient (R, V) in the product's dtype if asked for.

        logits: (R, V) the student's raw products, which the gradient replaces; weights: (R,), see row_kernels.py.
        """
        device = logits.device
        if self.compares_all:
            gradient = _narrow(logits, student.product) if with_gradient else None
            assert self.head is not None, "such a teacher is a head"
            s, t = student.transform, self.head.transform
            divergence_kernel(self.backend, device).divergence(
                *(logits, student.bias, s.scale, s.softcap, self._multiply(rows), self.head.bias, t.scale, t.softcap),
                *(s.inv_temperature, *self.formula, weights, results, gradient),
            )
            return gradient
        kernels = row_kernels(self.backend, device)
        known = self._known(rows, student, logits, kernels)
        gradient = None
        if with_gradient:
            narrow = logits.dtype != student.product
            gradient = pooled_empty(logits.shape, student.product, device) if narrow else logits
        given = (known, self.formula, self.tail, weights, results, gradient)
        row_divergence_to_known(kernels, logits, student.bias, student.transform, *given)
        return gradient

    def _known(self, rows: slice, student: DivergenceHead, logits: torch.Tensor, kernels: RowKernels) -> KnownTokens:
        """Returns what is known of the teacher's tokens in a block; logits: (R, V) the student's raw products."""
        if self.known is not None:
            return self.known.rows(rows)
        assert self.head is not None, "such a teacher is a head"
        products, bias, transform = self._multiply(rows), self.head.bias, self.head.transform
        shown = (logits, student.bias, student.transform) if self.of_student else (products, bias, transform)
        chosen = likeliest_tokens(*shown, self.top_k)
        return KnownTokens.of_head(products, bias, transform, chosen, kernels)

    def _multiply(self, rows: slice) -> torch.Tensor:
        """Returns the teacher's raw products (R, V) of a block; the first block has the most rows."""
        assert self.head is not None and self.hidden is not None, "such a teacher is a head"
        hidden = self.hidden[rows]
        if self._logits is None:
            shape = (len(hidden), self.head.vocab_size)
            self._logits = pooled_empty(shape, self.head.logits, hidden.device)
        return self.head.multiply(hidden, self._logits[: len(hidden)])


def _narrow(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the first part of each row of logits (R, V), contiguous, that V numbers of a dtype take."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]
