"""Weighs rows by how likely their prompts are among those of good completions: BCO's distribution matching."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_fast.data import AnyDataset
from trl_fast.data.tokenization import template_options
from trl_fast.data.unpaired_preference import LABEL, PROMPT_WEIGHT
from trl_fast.losses.density_ratio import LogisticRegression, density_ratios, fit_logistic

logger = logging.getLogger(__name__)


@dataclass
class PromptWeights:
    """Holds what makes embeddings of prompts, and the classifier that is fitted to those of the training rows.

    Args:
        embed: TRL's embedding_func: from `input_ids` and `attention_mask` (B, T) int64 to embeddings (B, d) float.
        tokenizer: its tokenizer; without special tokens, as in TRL.
    """

    embed: Callable[..., torch.Tensor]
    tokenizer: PreTrainedTokenizerBase
    classifier: LogisticRegression | None = field(default=None, init=False)

    def weighed(self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str) -> Dataset:
        """Returns a prepared dataset with the weights of its rows in a column: 1 of those that are good.

        The classifier is fitted to the first dataset. args: a BCOConfig.

        Raises:
            ValueError: the dataset is a stream, has no texts of prompts, or the one to fit has one kind of rows only.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"embedding_func: the {name} dataset is a stream (IterableDataset), but the prompts of all rows are "
                "looked at before training; give a datasets.Dataset"
            )
        if PROMPT_WEIGHT in dataset.column_names:
            return dataset
        if "prompt" not in dataset.column_names:
            raise ValueError(f"embedding_func: the {name} dataset has no column 'prompt' with the texts to embed")
        labels = np.array(dataset.with_format(None)[LABEL]).astype(bool)
        if self.classifier is None:
            self._fit(dataset, labels, processing_class, args, name)
        assert self.classifier is not None  # fitted now
        weights, bad = np.ones(len(dataset)), np.flatnonzero(~labels)
        found = [
            self.classifier.probabilities(each) for each in self._embeddings(dataset, bad, processing_class, args)
        ]
        if found:
            ratios = density_ratios(torch.cat(found), args.min_density_ratio, args.max_density_ratio)
            weights[bad] = ratios.cpu().numpy()
        return dataset.add_column(PROMPT_WEIGHT, weights.tolist())

    def _fit(
        self, dataset: Dataset, labels: np.ndarray, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> None:
        if labels.all() or not labels.any():
            raise ValueError(
                f"embedding_func: all {len(labels)} rows of the {name} dataset have the label {bool(labels[0])}, so "
                "there is nothing to tell their prompts from; leave it out"
            )
        rng = np.random.default_rng(args.seed)
        kinds = [rng.permutation(np.flatnonzero(labels == kind))[: args.prompt_sample_size] for kind in (True, False)]
        good, bad = (torch.cat(list(self._embeddings(dataset, rows, processing_class, args))) for rows in kinds)
        marks = torch.cat([torch.ones(len(good)), torch.zeros(len(bad))]).bool().to(good.device)
        self.classifier = fit_logistic(torch.cat([good, bad]), marks)
        right = [((self.classifier.probabilities(each) > 0.5) == kind) for each, kind in ((good, True), (bad, False))]
        shares = [each.double().mean().item() for each in right]
        logger.info(f"embedding_func: {shares[0]:.0%} of good and {shares[1]:.0%} of bad prompts are told apart.")

    @torch.no_grad()
    def _embeddings(
        self, dataset: Dataset, rows: Sequence[int] | np.ndarray, processing_class: PreTrainedTokenizerBase, args: Any
    ) -> Iterator[torch.Tensor]:
        """Yields the embeddings (B, d) of the prompts of those rows, a batch at a time."""
        size = args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            examples = [dataset[int(row)] for row in rows[start : start + size]]
            texts = [_prompt_text(example, processing_class) for example in examples]
            encoded = self.tokenizer(
                texts, add_special_tokens=False, padding=True, truncation=True, return_tensors="pt"
            ).to(args.device)
            yield self.embed(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])


def _prompt_text(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> str:
    prompt = example["prompt"]
    if isinstance(prompt, str):
        return prompt
    options = template_options(example)
    return str(processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options))
