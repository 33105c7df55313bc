"""What trainers that sample their own completions do about rollouts, whatever the method."""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.data import TokenBatch, is_conversational
from trl_fast.rollout import Rollout

from .rescue import Rescue


class Rollouts(Rescue):
    """The part of an online trainer that checks, decodes and scores completions.

    `_vocab_size` are the entries of the policy's head.
    """

    _vocab_size: int

    def _checked(self, rollout: Rollout, rows: list[dict[str, Any]]) -> Rollout:
        for name in ("prompt_ids", "completion_ids"):
            lists = getattr(rollout, name)
            if len(lists) != len(rows):
                raise ValueError(f"the rollout has {len(lists)} {name} for {len(rows)} prompts; expected one each")
            for ids, row in zip(lists, rows, strict=True):
                if not ids:
                    raise ValueError(f"the rollout's {name} are empty for the prompt {_short(row['prompt'])}")
                if not 0 <= min(ids) <= max(ids) < self._vocab_size:
                    raise ValueError(
                        f"the rollout's {name} for the prompt {_short(row['prompt'])} have a token outside of the "
                        f"{self._vocab_size} entries of the model's head"
                    )
        _check_by_token("logprobs", rollout.logprobs, rollout.completion_ids, rows)
        _check_by_token("mask (a rollout_func's env_mask)", rollout.mask, rollout.completion_ids, rows)
        return rollout

    def _decode(self, prompts: list, completion_ids: list[list[int]]) -> list:
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        if not is_conversational({"prompt": prompts[0]}):
            return texts
        return [[{"role": "assistant", "content": text}] for text in texts]

    def policy_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """The policy's log-probabilities of the batch's tokens, (N,)."""
        with self.compute_loss_context_manager():
            return self.score(self.model, batch, temperature=self.args.temperature).tokens.logprobs

    def reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """The reference's log-probabilities of the batch's tokens, (N,)."""
        return self.score_reference(batch, temperature=self.args.temperature).logprobs


def _check_by_token(
    name: str, lists: list[list] | None, completion_ids: list[list[int]], rows: list[dict[str, Any]]
) -> None:
    """Raises ValueError if there is not one value for each token of each completion; None is nothing to check."""
    if lists is None:
        return
    if len(lists) != len(rows):
        raise ValueError(f"the rollout has {len(lists)} lists of {name} for {len(rows)} prompts; expected one each")
    for values, ids, row in zip(lists, completion_ids, rows, strict=True):
        if len(values) != len(ids):
            raise ValueError(
                f"the rollout's {name} for the prompt {_short(row['prompt'])} has {len(values)} values for a "
                f"completion of {len(ids)} tokens; expected one each"
            )


def token_vectors(lists: list[list] | None) -> list[torch.Tensor] | None:
    """A float32 vector a completion from its tokens' values, with NaN for None; None stays None."""
    if lists is None:
        return None
    return [torch.tensor([torch.nan if value is None else float(value) for value in values]) for values in lists]


def _short(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= 80 else text[:77] + "..."
