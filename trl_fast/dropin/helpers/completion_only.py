"""Finds completions in texts by the words before them, as scripts for TRL up to 0.19 do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Collates tokenized rows into padded tensors, with labels for what follows the words of a response only.

    Without an instruction template, all after the last response template of a row is learned. With one, the answers of
    a conversation are: what follows each response template up to the next instruction template. A row without a
    template in it teaches nothing, which is said.

    Args:
        tokenizer: of the rows.
        response_template: what an answer begins with, as text or as token ids, such as "### Response:\\n".
        instruction_template: what a question begins with, text or token ids.
        mlm: False; a causal language model predicts the next token.
        ignore_index: the label of what is not learned.
        padding_free: no padding; the trainer packs rows by itself, so this changes nothing.
        kwargs: of transformers' DataCollatorForLanguageModeling.
    """

    def __init__(
        self,
        response_template: str | list[int],
        instruction_template: str | list[int] | None = None,
        tokenizer: Any = None,
        *,
        mlm: bool = False,
        ignore_index: int = -100,
        padding_free: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, mlm=mlm, **kwargs)
        warnings.warn(
            "`DataCollatorForCompletionOnlyLM` is a name of TRL up to 0.19; it works; datasets of prompts and "
            "completions, or completion_only_loss and assistant_only_loss in SFTConfig, are the present way.",
            FutureWarning,
            stacklevel=2,
        )
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.response_token_ids = self._ids(response_template)
        self.instruction_token_ids = None if instruction_template is None else self._ids(instruction_template)
        self.ignore_index = ignore_index
        self.padding_free = padding_free

    def _ids(self, template: str | list[int]) -> list[int]:
        tokenizer: Any = self.tokenizer
        return tokenizer.encode(template, add_special_tokens=False) if isinstance(template, str) else list(template)

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Returns `input_ids`, `attention_mask` and `labels`, (B, T) int64 each."""
        kept: list[Any] = [
            {key: row[key] for key in ("input_ids", "attention_mask") if key in row} for row in examples
        ]
        batch = super().torch_call(kept)
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learned = self._learned(row)
            labels[~learned] = self.ignore_index
        return batch

    def _learned(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns which of a row's tokens (T,) belong to an answer, (T,) bool."""
        learned = torch.zeros(len(ids), dtype=torch.bool)
        answers = _places(ids, self.response_token_ids)
        questions = None if self.instruction_token_ids is None else _places(ids, self.instruction_token_ids)
        for kind, places in (("response", answers), ("instruction", questions)):
            if places == []:
                template = self.response_template if kind == "response" else self.instruction_template
                tokenizer: Any = self.tokenizer
                warnings.warn(
                    f"A row has no {kind} template {template!r} and teaches nothing: {tokenizer.decode(ids)[:200]!r}",
                    stacklevel=4,
                )
                return learned
        if questions is None:
            learned[answers[-1] + len(self.response_token_ids) :] = True
            return learned
        for place in answers:
            start = place + len(self.response_token_ids)
            end = next((question for question in questions if question >= start), len(ids))
            learned[start:end] = True
        return learned


def _places(ids: torch.Tensor, searched: Sequence[int]) -> list[int]:
    """Returns where in the tokens (T,) the searched ones begin."""
    if len(ids) < len(searched):
        return []
    windows = ids.unfold(0, len(searched), 1)
    return (windows == ids.new_tensor(searched)).all(-1).nonzero().flatten().tolist()
