"""Makes the engine that generates completions, as the arguments of GRPO and RLOO say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from trl_fast.rollout import RolloutEngine, TransformersEngine


def make_engine(trainer: Any, end_ids: Collection[int]) -> RolloutEngine:
    """Returns the engine that a trainer's arguments ask for.

    Args:
        trainer: with its model, accelerator and tokenizer.
        end_ids: tokens that end a completion.
    """
    if trainer.args.use_vllm:
        from trl_fast.rollout.vllm_engine import make_vllm_engine

        engine: Any = make_vllm_engine(trainer.model, trainer.accelerator, trainer.processing_class, trainer.args)
        return engine
    policy = lambda: trainer.accelerator.unwrap_model(trainer.model)  # noqa: E731
    tokenizer = trainer.processing_class
    transformers_engine = TransformersEngine(policy, end_ids, tokenizer.pad_token_id, tokenizer)
    transformers_engine.try_out(trainer.args.sampling_settings())
    return transformers_engine
