"""Makes the engine that generates completions, as the arguments of GRPO and RLOO say."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from trl_fast.modeling.loading import base_model
from trl_fast.parallel.engines import engine_of
from trl_fast.parallel.gathering import gathered, is_sharded
from trl_fast.rollout import RolloutEngine, TransformersEngine

from .sampling import suppressed_tokens
from .tool_use import with_tools


def make_engine(trainer: Any, given: RolloutEngine | None, end_ids: Collection[int]) -> RolloutEngine:
    """Returns the engine that was given, or the one that a trainer's arguments ask for; around it the tools, if any.

    Args:
        trainer: with its model, accelerator, tokenizer and toolbox.
        given: a user's engine, or None.
        end_ids: tokens that end a completion.

    Raises:
        NotImplementedError: as in `with_tools`.
        ValueError: as in `TransformersEngine.try_out`; or tools, and ds3_gather_for_generation=False.
    """
    engine = given or _engine_of_arguments(trainer, end_ids)
    if trainer.toolbox is None:
        return engine
    by_layer = engine_of(trainer.accelerator).needs.shards_weights and not trainer.args.ds3_gather_for_generation
    if by_layer and isinstance(engine, TransformersEngine):
        raise ValueError(
            "ds3_gather_for_generation=False cannot be used with tools: processes that gather each layer for each "
            "token have to make equal numbers of turns, and completions call tools as often as they like; leave it "
            "True, or generate with vLLM"
        )
    model: Any = base_model(trainer.model)
    rollouts = trainer.environment_rollouts
    toolbox = trainer.toolbox if rollouts is None else rollouts.toolboxes
    workers = 1 if rollouts is None else trainer.args.environment_workers
    return with_tools(engine, toolbox, trainer.args, model, trainer.tokenizer, trainer.rollout_images, workers)


def _engine_of_arguments(trainer: Any, end_ids: Collection[int]) -> Any:
    if trainer.args.use_vllm:
        from trl_fast.rollout.vllm_engine import make_vllm_engine

        token = None if trainer.images is None else trainer.images.layout.image_token_id
        return make_vllm_engine(trainer.model, trainer.accelerator, trainer.tokenizer, trainer.args, token)
    engine = sampling_from_policy(trainer, end_ids)
    engine.try_out(trainer.args.sampling_settings())
    return engine


def sampling_from_policy(trainer: Any, end_ids: Collection[int]) -> TransformersEngine:
    """Returns an engine that samples from a trainer's policy by transformers.

    Sharded weights are gathered once a generation where ds3_gather_for_generation says so, else a layer at a time for
    each token, so that they need not fit whole.
    """
    tokenizer = trainer.tokenizer
    policy = lambda: trainer.accelerator.unwrap_model(trainer.model)  # noqa: E731
    weights = partial(_gathered_weights, trainer)
    return TransformersEngine(
        *(policy, end_ids, tokenizer.pad_token_id, tokenizer),
        gathered_weights=weights,
        image_layout=trainer.images and trainer.images.layout,
        suppressed=suppressed_tokens(trainer),
    )


@contextmanager
def _gathered_weights(trainer: Any) -> Iterator[bool]:
    """Enters a context in which the policy can generate; tells whether all processes have to do so together."""
    model = trainer.prepared_model
    together = is_sharded(model) and not trainer.args.ds3_gather_for_generation
    with gathered(model, part=trainer.model, layers=not together):
        yield together
