"""Turns samples of two completions a prompt into micro-batches of pairs: the completion of higher reward first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trl_fast.data import TokenBatch
from trl_fast.losses.loss_inputs import PreferenceLossInputs
from trl_fast.losses.online_dpo import online_loss_inputs
from trl_fast.rollout.samples import Samples


@dataclass
class ScoredSamples(Samples):
    """Holds S completions with what they are ordered by.

    - `scores` (S,) float32, the weighted sums of rewards, less penalties. `has_score` (S,) bool: whether a reward
      source gave one. `has_end` (S,) bool: whether an end token is among the tokens.
    """

    scores: torch.Tensor | None = None
    has_score: torch.Tensor | None = None
    has_end: torch.Tensor | None = None


@dataclass
class PairUpdate:
    """Holds a micro-batch of P pairs, S = 2P completions.

    - `batch`: the tokens to score, N of them. `group_sizes`: those of each pair. `loss_inputs`: which completion each
      is of.
    - `ref_logprobs` (N,) float32: log-probabilities of the tokens under the reference.
    - `scores`, `has_end` (S,) float32: as in ScoredSamples.
    """

    batch: TokenBatch
    group_sizes: tuple[int, ...]
    loss_inputs: PreferenceLossInputs
    ref_logprobs: torch.Tensor
    scores: torch.Tensor
    has_end: torch.Tensor


def make_pair_update(samples: Samples, batch: TokenBatch, ref_logprobs: torch.Tensor) -> PairUpdate:
    """Returns the update of pairs that a batch holds; `ref_logprobs`: (N,) float32. Scores are zeros if unknown."""
    lengths = [len(ids) for ids in samples.completion_ids]
    unknown = torch.zeros(len(samples))
    known = (getattr(samples, name, None) for name in ("scores", "has_end"))
    scores, has_end = ((unknown if values is None else values).float().to(ref_logprobs.device) for values in known)
    sizes = tuple(first + second for first, second in zip(lengths[0::2], lengths[1::2], strict=True))
    has_score = getattr(samples, "has_score", None)
    has_score = None if has_score is None else has_score.to(batch.branch.device)
    inputs = online_loss_inputs(batch.branch, len(samples), has_score)
    return PairUpdate(batch, sizes, inputs, ref_logprobs, scores, has_end)


def chosen_first(samples: Samples) -> list[int]:
    """Returns the numbers of S completions, the one of the larger advantage of each pair first.

    Pairs whose prompts begin alike are next to each other, so that a batch shares beginnings. Of equal ones the first
    is chosen.
    """
    firsts = sorted(range(0, len(samples), 2), key=samples.prompt)
    better = (samples.advantages[0::2] >= samples.advantages[1::2]).tolist()
    return [index for first in firsts for index in ((first, first + 1) if better[first // 2] else (first + 1, first))]


def with_short_prompts(samples: ScoredSamples, max_length: int | None) -> ScoredSamples:
    """Returns pairs whose prompts have lost their beginning where prompt and longer completion exceed `max_length`."""
    if max_length is None:
        return samples
    prompts = []
    for first in range(0, len(samples), 2):
        room = max_length - max(map(len, samples.completion_ids[first : first + 2]))
        prompts += [samples.prompt_ids[first][-max(room, 1) :]] * 2
    return replace(samples, prompt_ids=prompts)
