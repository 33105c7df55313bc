"""From prepared preference rows to a batch."""

from dataclasses import dataclass
from typing import Any

import torch

from .packing import TokenBatch, pack_trees
from .token_trees import Tree

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class DataCollatorForPreference:
    """Collate rows with `prompt_ids`, `chosen_ids` and `rejected_ids` into a `TokenBatch`.

    Sequence 2i is row i's prompt followed by its chosen completion, sequence 2i + 1 by its rejected one, each cut to
    `max_length` tokens by `truncation_mode` (`keep_start` or `keep_end`). `layout` is one of `packing.LAYOUTS`;
    `pad_token_id` and `pad_to_multiple_of` matter where there is padding. Precomputed reference log-probabilities,
    `ref_chosen_logps` and `ref_rejected_logps`, ride along in `extras` as float32 (P,).
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    layout: str = "padded"

    def __call__(self, examples: list[dict[str, Any]]) -> TokenBatch:
        trees = [Tree(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in examples]
        batch = pack_trees(
            trees, self.layout, self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of
        )
        for column in REFERENCE_COLUMNS:
            if column in examples[0]:
                batch.extras[column] = torch.tensor([row[column] for row in examples], dtype=torch.float32)
        return batch
