"""Lets a policy call tools while it generates: the toolbox, and the engine around the policy's own."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.rollout import RolloutEngine, RolloutImages, Toolbox, ToolLoop
from trl_fast.rollout.responses import find_response_template

from .config import OnlineConfig


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


def with_tools(
    engine: RolloutEngine,
    toolbox: Toolbox,
    args: OnlineConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    images: RolloutImages | None = None,
) -> ToolLoop:
    """Returns an engine that runs the tools that completions call.

    images: reads those of results; None: the model reads none.

    Raises:
        NotImplementedError: several processes share a server.
    """
    if args.use_vllm and args.vllm_mode == "server" and args.world_size > 1:
        raise NotImplementedError(
            f"tools with vllm_mode='server' and {args.world_size} processes, which ask the server together but "
            "need not have equally many turns; use vllm_mode='colocate'"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return ToolLoop(
        engine,
        toolbox,
        tokenizer,
        max_iterations=args.max_tool_calling_iterations,
        max_positions=(args.vllm_max_model_length if args.use_vllm else None) or positions,
        chat_template_kwargs=args.chat_template_kwargs,
        images=images,
    )
