"""What is said once about generations that nothing can be learned from."""

from __future__ import annotations

import logging
from functools import cached_property

import torch

logger = logging.getLogger(__name__)


def are_all_equal(rewards: torch.Tensor, group: int) -> bool:
    """Whether rewards (N,) are equal in each `group` of consecutive ones; NaN, no reward, is equal to itself only."""
    grouped = rewards.view(-1, group)
    return group > 1 and bool(grouped.isclose(grouped[:, :1], rtol=1e-6, atol=0, equal_nan=True).all())


class GenerationWarnings:
    """The part of an online trainer that warns of generations, once of each kind.

    `length_setting` is the argument that says how long a completion may get.
    """

    length_setting = "max_completion_length"

    @cached_property
    def _warned_of(self) -> set[str]:
        return set()

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned_of and self.accelerator.is_main_process:
            logger.warning(f"{message} This is logged once.")
        self._warned_of.add(kind)

    def _warn_of_equal_rewards(self, rewards: torch.Tensor, group: int, prompts: list) -> None:
        """Warns if rewards (N,), sums over the functions, are equal in each `group` of completions."""
        known = rewards[~rewards.isnan()]
        if not len(known) or not are_all_equal(rewards, group):
            return
        names = ", ".join(map(repr, self.reward_functions.names))
        where = "of each prompt" if group < len(rewards) else "of a generation"
        self._warn_once(
            "equal rewards",
            f"All completions {where} have the same reward, here {known[0].item():g} (first prompt: "
            f"{prompts[0]!r:.200}), so that rewards teach nothing here. If this goes on, see whether the reward "
            f"functions {names} tell these completions apart, and whether the task is too hard or too easy.",
        )

    def _warn_of_cut_off(self, cut_off: torch.Tensor) -> None:
        """Warns if all completions were cut off, (N,) bool."""
        if not cut_off.all():
            return
        setting, tokenizer = self.length_setting, self.processing_class
        ends = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in sorted(self.end_ids))
        masked = getattr(self.args, "mask_truncated_completions", False)
        self._warn_once(
            "cut off",
            f"None of the {len(cut_off)} completions of a generation came to an end: all were cut off at {setting}="
            f"{getattr(self.args, setting)} without an end token, {ends}"
            f"{', and mask_truncated_completions=True lets nothing be learned from them' if masked else ''}. If this "
            f"goes on, raise {setting}, or see whether the model and its prompts lead to one of these tokens.",
        )
