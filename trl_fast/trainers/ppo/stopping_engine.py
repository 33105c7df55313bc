"""Generates PPO's completions: so many at a time, cut after their first stop token."""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import PreTrainedTokenizerBase

from trl_fast.rollout import EngineWrapper, Rollout, RolloutEngine, SamplingSettings, check_engine

from .config import PPOConfig


class StoppingEngine(EngineWrapper):
    """Wraps a rollout engine: asks it for a few completions at a time, and cuts them after their first stop token.

    Args:
        engine: generates.
        stop_ids: tokens that completions are cut after; empty: none are cut.
        batch_size: completions at a time.
    """

    def __init__(self, engine: RolloutEngine, stop_ids: Collection[int], batch_size: int) -> None:
        check_engine(engine)
        super().__init__(engine)
        self._stop_ids, self._batch_size = stop_ids, batch_size

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], settings: SamplingSettings) -> Rollout:
        """Returns one completion for each prompt, without log-probabilities.

        Raises:
            ValueError: as the engine does.
        """
        whole = Rollout([], [])
        for start in range(0, len(prompt_ids), self._batch_size):
            part = self.engine.generate(prompt_ids[start : start + self._batch_size], settings)
            whole.prompt_ids += part.prompt_ids
            whole.completion_ids += [_cut(ids, self._stop_ids) for ids in part.completion_ids]
        return whole


def end_tokens(
    args: PPOConfig, processing_class: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[set[int], set[int]]:
    """Returns the tokens that count as ends, and those that completions are cut after.

    vocab_size: the tokens that the policy may sample.

    Raises:
        ValueError: the arguments need an EOS token, and the tokenizer has none; or the policy never samples a stop
            token.
    """
    eos, stop = processing_class.eos_token_id, args.stop_token_id
    if eos is None:
        for name in ("stop_token", "missing_eos_penalty"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}={getattr(args, name)!r} needs an EOS token, but the tokenizer has none")
    if args.stop_token == "eos":
        stop = eos
    if stop is not None and not 0 <= stop < vocab_size:
        name = "stop_token_id" if args.stop_token is None else "the tokenizer's eos_token_id"
        raise ValueError(
            f"{name}={stop} is none of the {vocab_size} tokens of the policy's head, so no completion would stop; use "
            "the model's own tokenizer, or a token that it has"
        )
    ends = {token for token in (stop, None if stop is not None else eos) if token is not None}
    return ends or {processing_class.pad_token_id}, set() if stop is None else {stop}


def _cut(ids: list[int], ends: Collection[int]) -> list[int]:
    """Returns token ids up to and including the first end token."""
    return ids[: next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))]
