"""Makes the engine that generates completions, as the arguments of GRPO and RLOO say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from trl_fast.modeling.loading import base_model
from trl_fast.rollout import RolloutEngine, TransformersEngine

from .tool_use import with_tools


def make_engine(trainer: Any, given: RolloutEngine | None, end_ids: Collection[int]) -> RolloutEngine:
    """Returns the engine that was given, or the one that a trainer's arguments ask for; around it the tools, if any.

    Args:
        trainer: with its model, accelerator, tokenizer and toolbox.
        given: a user's engine, or None.
        end_ids: tokens that end a completion.

    Raises:
        NotImplementedError: as in `with_tools`.
        ValueError: as in `TransformersEngine.try_out`.
    """
    engine = given or _engine_of_arguments(trainer, end_ids)
    if trainer.toolbox is None:
        return engine
    model: Any = base_model(trainer.model)
    return with_tools(engine, trainer.toolbox, trainer.args, model, trainer.processing_class)


def _engine_of_arguments(trainer: Any, end_ids: Collection[int]) -> Any:
    tokenizer = trainer.processing_class
    if trainer.args.use_vllm:
        from trl_fast.rollout.vllm_engine import make_vllm_engine

        return make_vllm_engine(trainer.model, trainer.accelerator, tokenizer, trainer.args)
    policy = lambda: trainer.accelerator.unwrap_model(trainer.model)  # noqa: E731
    engine = TransformersEngine(policy, end_ids, tokenizer.pad_token_id, tokenizer)
    engine.try_out(trainer.args.sampling_settings())
    return engine
