"""Warns, once of each kind, of generations that nothing can be learned from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def are_all_equal(rewards: torch.Tensor, group: int) -> bool:
    """Says whether rewards (N,) float32 are equal in each `group` of consecutive ones; NaN equals only NaN."""
    grouped = rewards.view(-1, group)
    return group > 1 and bool(grouped.isclose(grouped[:, :1], rtol=1e-6, atol=0, equal_nan=True).all())


class GenerationWarnings:
    """Warns of generations without an end and of groups without a difference, once of each kind.

    Args:
        tokenizer: names the end tokens.
        end_ids: tokens that end a completion; empty: completions are not to end, and nothing is said of it.
        length_setting: the argument that limits a completion, and its value.
        excludes_cut_off: whether completions that were cut off are not learned from.
        reward_names: returns the reward sources' names as they are now.
        is_main_process: whether this process is the one that writes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        length_setting: tuple[str, int],
        *,
        excludes_cut_off: bool = False,
        reward_names: Callable[[], Sequence[str]] = tuple,
        is_main_process: bool = True,
    ) -> None:
        self._tokenizer, self._end_ids = tokenizer, sorted(end_ids)
        self._length_setting, self._longest = length_setting
        self._excludes_cut_off, self._reward_names = excludes_cut_off, reward_names
        self._is_main_process = is_main_process
        self._warned_of: set[str] = set()

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned_of and self._is_main_process:
            logger.warning(f"{message} This is logged once.")
        self._warned_of.add(kind)

    def warn_of_equal_rewards(self, rewards: torch.Tensor, group: int, prompts: list) -> None:
        """Warns if rewards (N,) float32, sums over the sources, are equal in each `group` of two or more."""
        known = rewards[~rewards.isnan()]
        if not len(known) or group == 1 or not are_all_equal(rewards, group):
            return
        names = ", ".join(map(repr, self._reward_names()))
        where = "of each prompt" if group < len(rewards) else "of a generation"
        self._warn_once(
            "equal rewards",
            f"All completions {where} have the same reward, here {known[0].item():g} (first prompt: "
            f"{prompts[0]!r:.200}), so that rewards teach nothing here. If this goes on, see whether the reward "
            f"functions {names} tell these completions apart, and whether the task is too hard or too easy.",
        )

    def warn_of_cut_off(self, cut_off: torch.Tensor) -> None:
        """Warns if all completions were cut off, (N,) bool."""
        if not self._end_ids or not cut_off.all():
            return
        setting = self._length_setting
        ends = ", ".join(f"{self._tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in self._end_ids)
        learns = "and mask_truncated_completions=True lets nothing be learned from them"
        self._warn_once(
            "cut off",
            f"None of the {len(cut_off)} completions of a generation came to an end: all were cut off at {setting}="
            f"{self._longest} without an end token, {ends}"
            f"{f', {learns}' if self._excludes_cut_off else ''}. If this "
            f"goes on, raise {setting}, or see whether the model and its prompts lead to one of these tokens.",
        )
