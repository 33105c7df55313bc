"""Dataset formats → token trees → packed batches."""

from .checks import (
    TOKEN_COLUMNS,
    check_completions,
    check_head_vocabulary,
    check_preference_columns,
    check_preference_row,
    check_token_ids,
    check_tokenizer,
)
from .collator import DataCollatorForPreference
from .formats import (
    extract_prompt,
    is_conversational,
    maybe_extract_prompt,
    prepare_preference_dataset,
    tokenize_preference,
)
from .packing import LAYOUTS, TokenBatch, pack_trees
from .trees import TRUNCATION_MODES, Tree, truncate_tree
from .validation import ValidationReport, validate

__all__ = [
    "LAYOUTS",
    "TOKEN_COLUMNS",
    "TRUNCATION_MODES",
    "DataCollatorForPreference",
    "TokenBatch",
    "Tree",
    "ValidationReport",
    "check_completions",
    "check_head_vocabulary",
    "check_preference_columns",
    "check_preference_row",
    "check_token_ids",
    "check_tokenizer",
    "extract_prompt",
    "is_conversational",
    "maybe_extract_prompt",
    "pack_trees",
    "prepare_preference_dataset",
    "tokenize_preference",
    "truncate_tree",
    "validate",
]
