"""Turns rows of datasets into token trees, and trees into packed batches."""

from .assistant_turns import turn_chat_template
from .chat_template import (
    apply_chat_template,
    is_conversational_from_value,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
)
from .dataset_packing import pack_dataset, truncate_dataset
from .dataset_types import AnyDataset
from .dict_batch import DictBatch, DictCollator
from .formats import extract_prompt, is_conversational, maybe_extract_prompt
from .packing import LAYOUTS, TokenBatch, pack_trees
from .preference import (
    DataCollatorForPreference,
    DataCollatorForTriplePreference,
    PreferenceCollator,
    prepare_preference_dataset,
)
from .reward_modeling import (
    DataCollatorForReward,
    RewardCollator,
    prepare_reward_dataset,
    reward_batch,
    tokenize_reward,
)
from .row_checks import TOKEN_COLUMNS, check_preference_columns, check_preference_row
from .sft_batch import (
    DataCollatorForLanguageModeling,
    LabelledCollator,
    labelled_batch,
    pack_labelled,
    unpacked,
)
from .sft_dataset import SFTFormat, SFTLength, prepare_sft_dataset, tokenize_sft
from .token_checks import check_completions, check_token_ids, longest_sequence
from .token_trees import Tree
from .tokenization import tokenize_preference, tokenize_unpaired
from .tokenizer_checks import check_head_vocabulary, check_tokenizer
from .training_chat_template import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from .unpaired_preference import (
    DataCollatorForUnpairedPreference,
    UnpairedCollator,
    maybe_unpair_preference_dataset,
    prepare_unpaired_dataset,
    unpair_preference_dataset,
)
from .validation import ValidationReport, validate

__all__ = [
    "AnyDataset",
    "LAYOUTS",
    "TOKEN_COLUMNS",
    "SFTFormat",
    "SFTLength",
    "DataCollatorForLanguageModeling",
    "DataCollatorForPreference",
    "DataCollatorForReward",
    "DataCollatorForTriplePreference",
    "DataCollatorForUnpairedPreference",
    "DictBatch",
    "DictCollator",
    "LabelledCollator",
    "PreferenceCollator",
    "RewardCollator",
    "TokenBatch",
    "Tree",
    "UnpairedCollator",
    "ValidationReport",
    "apply_chat_template",
    "check_completions",
    "check_head_vocabulary",
    "check_preference_columns",
    "check_preference_row",
    "check_token_ids",
    "check_tokenizer",
    "extract_prompt",
    "get_training_chat_template",
    "has_generation_markers",
    "is_conversational",
    "is_conversational_from_value",
    "labelled_batch",
    "longest_sequence",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "pack_dataset",
    "pack_labelled",
    "pack_trees",
    "prepare_preference_dataset",
    "prepare_reward_dataset",
    "prepare_sft_dataset",
    "prepare_unpaired_dataset",
    "reward_batch",
    "tokenize_preference",
    "tokenize_reward",
    "tokenize_sft",
    "tokenize_unpaired",
    "is_chat_template_stop_token_trained",
    "truncate_dataset",
    "unpair_preference_dataset",
    "turn_chat_template",
    "unpacked",
    "validate",
]
