"""Generates completions of an evaluation dataset's prompts, for callbacks that show them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer

from trl_fast.data import maybe_apply_chat_template


class PromptCompletions:
    """Generates completions of the prompts of a trainer's evaluation dataset.

    Args:
        trainer: its eval_dataset must have the column "prompt", of texts or of conversations.
        generation_config: None means the model's own.
        num_prompts: only the first so many; None means all.
        asker: who asks, for messages.

    Raises:
        ValueError: there is no evaluation dataset with a column "prompt", or it has fewer rows than num_prompts.
    """

    def __init__(
        self, trainer: Trainer, generation_config: GenerationConfig | None, num_prompts: int | None, asker: str
    ) -> None:
        dataset = trainer.eval_dataset
        if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
            raise ValueError(
                f"{asker} needs a trainer whose eval_dataset is a Dataset with a column 'prompt'; "
                f"it has {getattr(dataset, 'column_names', dataset)}"
            )
        if num_prompts is not None and not 0 < num_prompts <= len(dataset):
            raise ValueError(f"num_prompts must be between 1 and the dataset's {len(dataset)} rows, got {num_prompts}")
        self._trainer, self._generation_config = trainer, generation_config
        self._prompts = dataset["prompt"][:num_prompts]

    def generate(self, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> tuple[list[str], list[str]]:
        """Returns all prompts as texts, and their completions; each process generates its share of them."""
        accelerator = self._trainer.accelerator
        with accelerator.split_between_processes(self._prompts) as prompts:
            texts = [maybe_apply_chat_template({"prompt": prompt}, tokenizer)["prompt"] for prompt in prompts]
            model = accelerator.unwrap_model(self._trainer.model_wrapped)
            completions = self._generate(model, tokenizer, texts, batch_size)
        return gather_object(texts), gather_object(completions)

    def _generate(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int
    ) -> list[str]:
        given = self._generation_config
        options: dict[str, Any] = {"use_cache": True} if given is None else {"generation_config": given}
        completions = []
        with torch.no_grad(), _evaluating(model):
            for start in range(0, len(prompts), batch_size):
                batch = tokenizer(
                    prompts[start : start + batch_size],
                    return_tensors="pt",
                    padding=True,
                    padding_side="left",
                    truncation=True,
                    return_token_type_ids=False,
                ).to(model.device)
                tokens = model.generate(**batch, **options)
                completions += tokenizer.batch_decode(
                    tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
                )
        return completions


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off, and the gradient checkpointing that forbids a cache of keys and values."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
