"""Sorts the flags of the training commands into groups, and says which flags people use most.

`--help` shows the common ones, `--help all` every one; `trl-fast init` writes the common ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from trl_fast.settings.field_docs import FieldDoc

# The group of the fields that the method's own config and those of its kind have.
METHOD = "Loss and method"
# The group of what a command has besides training's flags, such as those of `trl-fast preview`.
COMMAND = "This command"
# The group of what no other group has, such as fields that only newer versions of transformers have.
OTHERS = "Others"
# Dataclasses whose fields are the same for all methods; an empty text for flags of no dataclass.
_SHARED = {"", "TrainingArguments", "BaseConfig", "ScriptArguments", "ModelConfig", "DatasetMixtureConfig"}


@dataclass(frozen=True)
class FlagGroup:
    """Describes a group of flags.

    Args:
        title: the group's heading.
        common: names of flags that most people use, in the order in which they are shown.
        others: patterns of the names of its other flags.
    """

    title: str
    common: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Says whether a flag of this name is in the group."""
        return name in self.common or any(fnmatch(name, pattern) for pattern in self.others)


# The first group that has a flag lists it.
GROUPS = (
    FlagGroup(COMMAND),
    FlagGroup(
        "Model",
        ("model_name_or_path", "teacher_model_name_or_path", "sft_model_path", "reward_model_path", "dtype")
        + ("attn_implementation",),
        (
            "teacher_model_*",
            "model_revision",
            "model_init_kwargs",
            "trust_remote_code",
            "disable_dropout",
            "cast_lm_head_to_fp32",
        )
        + ("router_aux_loss_coef", "use_cache", "chat_template_path", "eos_token"),
    ),
    FlagGroup(
        "Adapter and quantisation",
        ("use_peft", "lora_r", "lora_target_modules", "load_in_4bit"),
        ("lora_*", "use_rslora", "use_dora", "load_in_8bit", "*bnb_*", "*_adapter_name"),
    ),
    FlagGroup(
        "Data",
        ("dataset_name", "dataset_train_split", "max_length", "packing", "completion_only_loss")
        + ("assistant_only_loss",),
        ("dataset*", "streaming", "test_split_size", "truncation_mode", "*packing*", "shuffle_dataset")
        + ("chat_template_kwargs", "remove_unused_columns", "label_names", "length_column_name")
        + ("train_sampling_strategy", "dataloader_*"),
    ),
    FlagGroup(
        METHOD,
        (
            "loss_type",
            "divergence",
            "beta",
            "lmbda",
            "precompute_ref_log_probs",
            "desirable_weight",
            "undesirable_weight",
        )
        + ("center_rewards_coefficient", "reward_funcs", "reward_model_name_or_path", "num_generations")
        + (
            "max_completion_length",
            "max_new_tokens",
            "response_length",
            "total_episodes",
            "temperature",
            "epsilon",
            "kl_coef",
        )
        + ("num_ppo_epochs", "stop_token"),
    ),
    FlagGroup("Generation with vLLM", ("use_vllm", "vllm_mode"), ("vllm_*",)),
    FlagGroup(
        "Batch and memory",
        ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16"),
        ("batch_layout", "padding_free", "pad_to_multiple_of", "activation_*", "gradient_checkpointing_kwargs")
        + ("balance_batches", "fused_layers", "tiled_mlp", "head_*", "fp16", "tf32", "auto_find_batch_size")
        + ("torch_*", "*liger*"),
    ),
    FlagGroup(
        "Optimizer",
        ("learning_rate", "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type"),
        ("lr_*", "optim*", "adam_*", "weight_decay", "max_grad_norm", "label_smoothing_factor", "neftune_*")
        + ("average_tokens_across_devices", "*seed", "full_determinism"),
    ),
    FlagGroup(
        "Evaluation",
        ("eval_strategy", "eval_steps", "dataset_test_split"),
        ("eval_*", "*_eval", "per_device_eval_batch_size", "num_generations_eval", "*batch_eval*")
        + ("prediction_loss_only", "include_for_metrics"),
    ),
    FlagGroup(
        "Logging",
        ("logging_steps", "report_to", "log_completions"),
        (
            "log*",
            "run_*",
            "disable_tqdm",
            "project",
            "trackio_*",
            "include_num_input_tokens_seen",
            "num_completions_to_print",
        )
        + ("num_sample_generations", "skip_memory_metrics", "debug"),
    ),
    FlagGroup(
        "Saving and resuming",
        ("output_dir", "save_strategy", "save_steps", "resume_from_checkpoint", "push_to_hub"),
        ("save_*", "hub_*", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
        + ("ignore_data_skip", "restore_callback_*", "enable_jit_checkpoint"),
    ),
    FlagGroup(
        "Devices and processes",
        ("num_processes", "accelerate_config"),
        ("use_cpu", "deepspeed", "ds3_*", "fsdp*", "ddp_*", "accelerator_config", "parallelism_config", "local_rank")
        + ("ignore_bias_buffers",),
    ),
    FlagGroup(OTHERS),
)
# What stands in a group other than the one whose pattern it fits.
_ELSEWHERE = {"dataset_test_split": "Evaluation", "log_completions_hub_repo": "Logging"}


def group_of(doc: FieldDoc) -> str:
    """Returns the title of the group that a flag is listed in."""
    if doc.name in _ELSEWHERE:
        return _ELSEWHERE[doc.name]
    named = next((group.title for group in GROUPS if group.has(doc.name)), None)
    if named is None and doc.owner not in _SHARED:
        return METHOD if doc.owner.endswith("Config") else COMMAND
    return named or OTHERS


def is_common(doc: FieldDoc) -> bool:
    """Says whether a flag is one of those that most people use."""
    has_effect = not doc.text.startswith("Has no effect")
    return has_effect and (group_of(doc) == COMMAND or any(doc.name in group.common for group in GROUPS))


def grouped(docs: Iterable[FieldDoc]) -> dict[str, list[FieldDoc]]:
    """Returns the flags of each group that has any, by its title: common ones first, in their order."""
    found: dict[str, list[FieldDoc]] = {group.title: [] for group in GROUPS}
    for doc in docs:
        found[group_of(doc)].append(doc)
    order = {name: place for group in GROUPS for place, name in enumerate(group.common)}
    for members in found.values():
        members.sort(key=lambda doc: order.get(doc.name, len(order)))
    return {title: members for title, members in found.items() if members}
