"""Checks rollouts before rewards are computed: one completion a prompt, known tokens, one value a token."""

from __future__ import annotations

from trl_fast.rollout import Rollout

_SHOWN_CHARACTERS = 80


def check_rollout(rollout: Rollout, prompts: list, vocab_size: int) -> Rollout:
    """Returns the rollout if it fits the prompts.

    Args:
        rollout: of an engine or of a user's rollout_func.
        prompts: one for each completion, texts or conversations, for messages.
        vocab_size: entries of the policy's head.

    Raises:
        ValueError: a list has another length than the prompts, is empty, or holds a token that the head does not have.
    """
    for name in ("prompt_ids", "completion_ids"):
        lists = getattr(rollout, name)
        if len(lists) != len(prompts):
            raise ValueError(f"the rollout has {len(lists)} {name} for {len(prompts)} prompts; expected one each")
        for ids, prompt in zip(lists, prompts, strict=True):
            if not ids:
                raise ValueError(f"the rollout's {name} are empty for the prompt {_short(prompt)}")
            if not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"the rollout's {name} for the prompt {_short(prompt)} have a token outside of the "
                    f"{vocab_size} entries of the model's head"
                )
    _check_by_token("logprobs", rollout.logprobs, rollout.completion_ids, prompts)
    _check_by_token("mask (a rollout_func's env_mask)", rollout.mask, rollout.completion_ids, prompts)
    return rollout


def _check_by_token(name: str, lists: list[list] | None, completion_ids: list[list[int]], prompts: list) -> None:
    """Raises ValueError if there is not one value for each token of each completion; None passes."""
    if lists is None:
        return
    if len(lists) != len(prompts):
        raise ValueError(f"the rollout has {len(lists)} lists of {name} for {len(prompts)} prompts; expected one each")
    for values, ids, prompt in zip(lists, completion_ids, prompts, strict=True):
        if len(values) != len(ids):
            raise ValueError(
                f"the rollout's {name} for the prompt {_short(prompt)} has {len(values)} values for a "
                f"completion of {len(ids)} tokens; expected one each"
            )


def _short(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
