"""Lets a policy call tools while it generates: the toolbox, and the engine around the policy's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.rollout import RolloutEngine, RolloutImages, Toolbox, ToolLoop
from trl_fast.rollout.responses import find_response_template

from .config import OnlineConfig
from .environments import most_positions, open_environments


def open_toolbox(
    tools: list[Callable] | None, tokenizer: PreTrainedTokenizerBase, args: OnlineConfig
) -> Toolbox | None:
    """Returns the tools as a toolbox, None without tools.

    Raises:
        ValueError, TypeError: a tool cannot be described, or the tokenizer's messages cannot be read.
    """
    if not tools:
        return None
    toolbox = Toolbox(tools, args.tool_timeout)
    find_response_template(tokenizer)
    return toolbox


def open_tools(
    trainer: Any, tools: list[Callable] | None, environment_factory: Any, tokenizer: PreTrainedTokenizerBase, args: Any
) -> None:
    """Gives a trainer its toolbox and its environments; None where there are none.

    Raises:
        NotImplementedError: the trainer's method has no tools.
        ValueError, TypeError, RuntimeError: as in `open_toolbox` and `open_environments`.
    """
    for name, given in (("tools", tools), ("environment_factory", environment_factory)):
        if given and not trainer.has_tools:
            raise NotImplementedError(f"{name}: {type(trainer).__name__} has none; use GRPOTrainer")
    trainer.environment_rollouts = environments = open_environments(environment_factory, tools, tokenizer, args)
    trainer.toolbox = open_toolbox(tools, tokenizer, args) if environments is None else environments.toolbox


def with_tools(
    engine: RolloutEngine,
    toolbox: Toolbox | Callable[[int], Sequence[Toolbox]],
    args: OnlineConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    images: RolloutImages | None = None,
    workers: int = 1,
) -> ToolLoop:
    """Returns an engine that runs the tools that completions call.

    toolbox, workers: as in `ToolLoop`. images: reads those of results; None: the model reads none.

    Raises:
        NotImplementedError: several processes share a server.
    """
    if args.use_vllm and args.vllm_mode == "server" and args.world_size > 1:
        raise NotImplementedError(
            f"tools with vllm_mode='server' and {args.world_size} processes, which ask the server together but "
            "need not have equally many turns; use vllm_mode='colocate'"
        )
    return ToolLoop(
        engine,
        toolbox,
        tokenizer,
        max_iterations=args.max_tool_calling_iterations,
        max_positions=most_positions(model, args),
        chat_template_kwargs=args.chat_template_kwargs,
        images=images,
        workers=workers,
    )
