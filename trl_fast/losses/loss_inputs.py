"""Holds what losses read besides the policy's scores: which sequence a scored token belongs to, and its constants.

N scored tokens belong to S sequences and are ordered by sequence. A loss may be asked for the share of some tokens:
`rows` (R,) int64 are the numbers of consecutive tokens, the whole of some sequences unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

# Numbers of tokens, or all tokens of a batch.
Rows = torch.Tensor | slice
ALL = slice(None)


def sums_by_sequence(values: torch.Tensor, branch: torch.Tensor, num_sequences: int, rows: Rows = ALL) -> torch.Tensor:
    """Sums values (R,) of the tokens `rows` by sequence, (S,) in their dtype.

    branch: (N,) int64, the sequence of each token.
    """
    return values.new_zeros(num_sequences).index_add(0, branch[rows], values)


@dataclass(frozen=True, eq=False)
class PolicyLossInputs:
    """Holds what a policy-gradient loss reads of N tokens in S completions.

    - `branch` (N,) int64: the sequence of each token.
    - `advantages` (S,) float32.
    - `weights` (S,) float32: what a token of each sequence counts in the loss, of `sequence_weights`.
    - `mask` (N,) float32: 1 on tokens that the policy wrote, 0 on those of an environment; None: all are its own.
    - `old_logprobs`, `ref_logprobs`, `sampling_logprobs` (N,) float32: of the policy before the update (None: of the
      present one), of the reference, of the engine that sampled (NaN where it did not say).
    - `importance_ratios` (N,) float32: π_old / π_sampler as it enters the loss, truncated or masked already.
    - `token_advantages` (N,) float32: where each token has its own; `advantages` are then their means.
    """

    branch: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sampling_logprobs: torch.Tensor | None = None
    importance_ratios: torch.Tensor | None = None
    token_advantages: torch.Tensor | None = None

    def advantages_of(self, rows: Rows = ALL) -> torch.Tensor:
        """Returns the advantage of each of the tokens `rows`, (R,)."""
        if self.token_advantages is not None:
            return self.token_advantages[rows]
        return self.advantages[self.branch[rows]]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Counts the tokens of each sequence that the policy wrote, (S,) float32."""
        ones = torch.ones_like(self.branch, dtype=torch.float32) if self.mask is None else self.mask
        return self.sums(ones)

    def masked(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Returns values (R,) of the tokens `rows`, 0 where the policy did not write."""
        return values if self.mask is None else values * self.mask[rows]

    def sums(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Sums values (R,) of the tokens `rows` by sequence, (S,)."""
        return sums_by_sequence(values, self.branch, len(self.advantages), rows)

    def masked_sums(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Sums values (R,) by sequence, (S,), over the tokens that the policy wrote."""
        return self.sums(self.masked(values, rows), rows)

    def masked_means(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Averages values (R,) by sequence, (S,), over the tokens that the policy wrote."""
        return self.masked_sums(values, rows) / self.lengths.clamp(min=1)


@dataclass(frozen=True, eq=False)
class PreferenceLossInputs:
    """Holds which of N scored tokens belongs to which of S = 2P sequences: the int64 tensors of a `TokenBatch`.

    branch, offset: (N,); branch_lengths: (S,). pair_weights: (P,) float32, what each pair counts in the loss's mean
    over all P; None: 1.
    """

    branch: torch.Tensor
    offset: torch.Tensor
    branch_lengths: torch.Tensor
    pair_weights: torch.Tensor | None = None

    def __len__(self) -> int:
        """Returns the number of pairs P."""
        return len(self.branch_lengths) // 2

    @cached_property
    def scored_lengths(self) -> torch.Tensor:
        """Counts the scored tokens of each sequence, (S,) int64."""
        return self.sums(torch.ones_like(self.branch))

    @cached_property
    def is_chosen(self) -> torch.Tensor:
        """Says whether each token belongs to a chosen completion, (N,) bool."""
        return self.branch % 2 == 0

    def sums(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Sums values (R,) of the tokens `rows` by sequence, (S,)."""
        return sums_by_sequence(values, self.branch, len(self.branch_lengths), rows)

    def sequence_logprobs(
        self, token_logprobs: torch.Tensor, ld_alpha: float | None = None, rows: Rows = ALL
    ) -> torch.Tensor:
        """Sums the log-probabilities (R,) of the tokens `rows` to those of the sequences, (S,).

        With `ld_alpha`, a pair's tokens beyond the length that its two completions share count α instead of 1
        (LD-DPO, arXiv 2409.06411); lengths are then those of the scored tokens.
        """
        if ld_alpha is not None:
            shared_lengths = self.scored_lengths.view(-1, 2).amin(dim=1).repeat_interleave(2)
            branch = self.branch[rows]
            rank = self.offset[rows] - (self.branch_lengths - self.scored_lengths)[branch]
            token_logprobs = torch.where(rank < shared_lengths[branch], token_logprobs, ld_alpha * token_logprobs)
        return self.sums(token_logprobs, rows)

    def has_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Says which pairs (P,) bool have tokens among `rows` (R,); pairs without any go with the first token."""
        present = self.sums(torch.ones_like(rows), rows).view(-1, 2).sum(1) > 0
        without_tokens = self.scored_lengths.view(-1, 2).sum(1) == 0
        return present | (without_tokens & (rows[0] == 0))


@dataclass(frozen=True, eq=False)
class CompletionLossInputs:
    """Holds which of N scored tokens belongs to which of S = k·P completions of P prompts, k for each.

    - `branch` (N,) int64: the completion of each token; those of a prompt follow each other.
    - `offset` (N,) int64: its index there; a token of the prompt, which counts for no completion, has one below 0.
    - `num_completions`: S; `width`: k.
    """

    branch: torch.Tensor
    offset: torch.Tensor
    num_completions: int
    width: int

    def __len__(self) -> int:
        """Returns the number of prompts P."""
        return self.num_completions // self.width

    @cached_property
    def is_completion(self) -> torch.Tensor:
        """Says which tokens are no prompts', (N,) bool."""
        return self.offset >= 0

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Counts the scored tokens of each completion, (S,) int64."""
        return self.sums(torch.ones_like(self.branch))

    def of(self, column: int, *, with_prompts: bool = False) -> torch.Tensor:
        """Says which tokens are those of the prompts' completions of that number, (N,) bool.

        with_prompts: whether tokens of the prompts that are scored with them are among them.
        """
        found = self.branch % self.width == column
        return found if with_prompts else found & self.is_completion

    def sums(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Sums values (R,) of the tokens `rows` by completion, (S,)."""
        own = torch.where(self.is_completion[rows], values, 0)
        return sums_by_sequence(own, self.branch, self.num_completions, rows)

    def means(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Averages values (R,) of the tokens `rows`, all of some completions, by completion, (S,); 0 without any."""
        return self.sums(values, rows) / self.lengths.clamp(min=1)

    def has_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Says which prompts (P,) bool have tokens among `rows` (R,); those without any go with the first token."""
        ones = torch.ones_like(self.branch)
        without_tokens = self._by_prompt(ones) == 0
        return (self._by_prompt(ones[rows], rows) > 0) | (without_tokens & (rows[:1] == 0).any())

    def _by_prompt(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        return sums_by_sequence(values, self.branch, self.num_completions, rows).view(-1, self.width).sum(1)


@dataclass(frozen=True, eq=False)
class KTOLossInputs:
    """Holds what the KTO loss reads of N tokens in S labelled completions.

    branch: (N,) int64, the sequence of each scored token, ascending; labels: (S,) bool, True for good completions;
    ref_logprobs: (S,) float32, log π_ref(y).
    """

    branch: torch.Tensor
    labels: torch.Tensor
    ref_logprobs: torch.Tensor

    def sequence_logprobs(self, token_logprobs: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Sums the log-probabilities (R,) of the tokens `rows` to log π(y) (S,)."""
        return sums_by_sequence(token_logprobs, self.branch, len(self.labels), rows)

    def has_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Says which sequences (S,) bool have tokens among `rows` (R,); those without any go with the first token."""
        ones = torch.ones_like(self.branch)
        without_tokens = sums_by_sequence(ones, self.branch, len(self.labels)) == 0
        present = sums_by_sequence(ones[rows], self.branch, len(self.labels), rows) > 0
        return present | (without_tokens & (rows[:1] == 0).any())
