"""Reads sampled tokens as what reward functions see: texts, or the messages of a conversation."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from trl_fast.data import is_conversational
from trl_fast.rollout import Rollout, ToolRollout
from trl_fast.rollout.responses import parse_message


class CompletionReader:
    """Turns completions' tokens into texts, or into messages where prompts are conversations.

    Args:
        tokenizer: decodes the tokens.
        parses_messages: whether tool calls and reasoning are told from the rest of a message, where the tokenizer has
            a response template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, parses_messages: bool) -> None:
        self._tokenizer, self._parses_messages = tokenizer, parses_messages

    def read(self, prompts: list, rollout: Rollout) -> list:
        """Returns each completion as a text, or as a list of messages."""
        if rollout.completions is not None:
            return rollout.completions
        if isinstance(rollout, ToolRollout):
            return rollout.messages
        conversational = is_conversational({"prompt": prompts[0]})
        if conversational and self._parses_messages and self._tokenizer.response_template is not None:
            pairs = zip(rollout.completion_ids, rollout.prompt_ids, strict=True)
            return [[parse_message(self._tokenizer, completion, prompt)] for completion, prompt in pairs]
        texts = self._tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
