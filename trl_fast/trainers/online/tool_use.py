"""What a trainer adds whose policy may call tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import is_conversational
from trl_fast.rollout import Rollout, RolloutEngine, Toolbox, ToolLoop, ToolRollout
from trl_fast.rollout.responses import find_response_template, parse_message

from ..grpo_config import GRPOConfig


class ToolUse:
    """The part of an online trainer that has a toolbox: prompts, rollouts, messages and metrics of it."""

    toolbox: Toolbox | None = None

    def _open_toolbox(self, tools: list[Callable] | None, tokenizer: PreTrainedTokenizerBase) -> None:
        if tools:
            self.toolbox = Toolbox(tools)
            find_response_template(tokenizer)

    def template_kwargs(self, args: GRPOConfig) -> dict[str, Any]:
        """Arguments of the chat template for the prompts, which tell the policy of its tools."""
        tools = {"tools": self.toolbox.schemas} if self.toolbox else {}
        return {**super().template_kwargs(args), **tools}

    def _with_tools(self, engine: RolloutEngine, model: PreTrainedModel) -> RolloutEngine:
        args = self.args
        if not self.toolbox:
            return engine
        if args.use_vllm and args.vllm_mode == "server" and args.world_size > 1:
            raise NotImplementedError(
                f"tools with vllm_mode='server' and {args.world_size} processes, which ask the server together but "
                "need not have equally many turns; use vllm_mode='colocate'"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return ToolLoop(
            engine,
            self.toolbox,
            self.processing_class,
            max_iterations=args.max_tool_calling_iterations,
            max_positions=(args.vllm_max_model_length if args.use_vllm else None) or positions,
            chat_template_kwargs=args.chat_template_kwargs,
        )

    def _read_completions(self, prompts: list, rollout: Rollout) -> list:
        """As in the base; conversations as the messages that they are, with tool calls and reasoning."""
        if isinstance(rollout, ToolRollout):
            return rollout.messages
        tokenizer = self.processing_class
        if tokenizer.response_template is None or not is_conversational({"prompt": prompts[0]}):
            return super()._read_completions(prompts, rollout)
        pairs = zip(rollout.completion_ids, rollout.prompt_ids, strict=True)
        return [[parse_message(tokenizer, completion, prompt)] for completion, prompt in pairs]

    def _record_lengths(self, rollout: Rollout, mask: list[torch.Tensor] | None) -> torch.Tensor:
        """As in the base; and how often tools were called, and how often that failed."""
        cut_off = super()._record_lengths(rollout, mask)
        if isinstance(rollout, ToolRollout):
            counts = torch.tensor([[rollout.calls, rollout.failures, len(cut_off)]], device=self.accelerator.device)
            calls, failures, completions = self.accelerator.gather(counts).sum(0).tolist()
            self.record_value("tools/call_frequency", calls / completions)
            self.record_value("tools/failure_frequency", failures / calls if calls else 0.0)
        return cut_off
