"""Lists the modules and names of TRL that trl_fast answers, with their places.

What it does not answer, and why, is in gone.py.
"""

from __future__ import annotations

from trl_fast.trainers.methods import METHODS, Method

# The version whose names and behaviour these are.
TRL_VERSION = "1.16.0"

_HELPERS = "trl_fast.dropin.helpers"


def _places(module: str, *names: str) -> dict[str, str]:
    return {name: f"{module}:{name}" for name in names}


_DATASET_ARGUMENTS = _places("trl_fast", "DatasetMixtureConfig", "ScriptArguments", "TrlParser", "get_dataset")
_SCRIPTS = {**_DATASET_ARGUMENTS, **_places("trl_fast", "init_zero_verbose")}
_OLDER_SCRIPT_ARGUMENTS = _places(
    f"{_HELPERS}.older_arguments",
    *("DPOScriptArguments", "DpoScriptArguments", "SFTScriptArguments", "SftScriptArguments"),
)
_OLDER_COMMANDS = {
    **_SCRIPTS,
    **_OLDER_SCRIPT_ARGUMENTS,
    **_places(f"{_HELPERS}.older_arguments", "RewardScriptArguments"),
    **_places(f"{_HELPERS}.scripts", "get_git_commit_hash"),
}
_GONE_CONFIGS = _places(
    f"{_HELPERS}.older_arguments",
    *(f"{name}Config" for name in ("NashMD", "PRM", "XPO")),
)
_F_DIVERGENCES = _places(f"{_HELPERS}.older_arguments", "FDivergenceConstants", "FDivergenceType")

_MODEL_CONFIG = _places("trl_fast", "ModelConfig")
_MODEL_ARGUMENTS = {
    **_MODEL_CONFIG,
    **_places("trl_fast", "get_kbit_device_map", "get_peft_config", "get_quantization_config"),
}
_CALLBACKS = _places(
    "trl_fast",
    *("BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback", "WeaveCallback"),
)
_BEMA_FOR_REFERENCE = _places("trl_fast", "BEMACallback", "DPOTrainer")
_COMPLETION_ONLY = _places(f"{_HELPERS}.completion_only", "DataCollatorForCompletionOnlyLM")

_DATA = {
    **_places(
        "trl_fast",
        "apply_chat_template",
        "extract_prompt",
        "is_conversational",
        "is_conversational_from_value",
        "maybe_apply_chat_template",
        "maybe_convert_to_chatml",
        "maybe_extract_prompt",
        "maybe_unpair_preference_dataset",
        "pack_dataset",
        "unpair_preference_dataset",
    ),
    **_places("trl_fast.data", "truncate_dataset"),
    **_places("trl_fast.data.tokenization", "common_prefix_length"),
    **_places("trl_fast.data.dataset_types", "get_dataset_column_names"),
    **_places("trl_fast.data.images", "prepare_multimodal_messages"),
    **_places(f"{_HELPERS}.chat", "prepare_multimodal_messages_vllm"),
    "DatasetType": "trl_fast.data.dataset_types:DatasetOrDict",
    "IterableDatasetType": "trl_fast.data.dataset_types:DatasetOrDict",
}
_CHAT_TEMPLATES = {
    **_places(
        "trl_fast",
        "add_response_schema",
        "clone_chat_template",
        "get_training_chat_template",
        "has_generation_markers",
        "is_chat_template_prefix_preserving",
        "is_chat_template_stop_token_trained",
        "parse_response",
        "supports_tool_calling",
    ),
    **_places("trl_fast.rollout.tool_templates", "ProcessingClassT"),
}
_ACCURACY_REWARDS = _places(
    "trl_fast.rewards", "accuracy_reward", "get_cosine_scaled_reward", "reasoning_accuracy_reward"
)
_FORMAT_REWARDS = _places("trl_fast.rewards", "think_format_reward")
_OTHER_REWARDS = _places("trl_fast.rewards", "get_repetition_penalty_reward", "get_soft_overlong_punishment")

_REFERENCE = _places("trl_fast", "create_reference_model")
_CHAT_FORMAT = _places("trl_fast", "clone_chat_template", "setup_chat_format")
_WRAPPED_MODEL = _places(
    f"{_HELPERS}.models", "prepare_deepspeed", "prepare_fsdp", "prepare_peft_model", "unwrap_model_for_generation"
)
_SELECTIVE_CHECKPOINTING = _places(f"{_HELPERS}.checkpointing", "enable_selective_activation_checkpointing")
_OFFLOADING = _places(f"{_HELPERS}.checkpointing", "get_act_offloading_ctx_manager")
_ADAPTERS = {
    **_places("peft", "prepare_model_for_kbit_training"),
    **_places(f"{_HELPERS}.models", "peft_module_casting_to_bf16"),
}
_SELECTIVE = _places("trl_fast.ops", "selective_log_softmax", "selective_log_softmax_and_entropy")
_MASKED = _places(f"{_HELPERS}.tensors", "masked_mean", "masked_var", "masked_whiten")
_FIRST_UTILITIES = {
    **_places(f"{_HELPERS}.models", "ensure_master_addr_port"),
    "disable_dropout_in_model": "trl_fast.modeling.loading:disable_dropout",
    **_places("trl_fast", "get_peft_config", "get_quantization_config"),
}
_UTILITIES = {
    **_FIRST_UTILITIES,
    **_MODEL_ARGUMENTS,
    **_ADAPTERS,
    **_SELECTIVE,
    **_COMPLETION_ONLY,
    **_places(
        f"{_HELPERS}.tensors",
        "entropy_from_logits",
        "exact_div",
        "first_true_indices",
        "flush_left",
        "flush_right",
        "nanmax",
        "nanmin",
        "nanstd",
        "pad",
        "pad_to_length",
        "shuffle_sequence_dict",
        "split_tensor_dict",
        "truncate_response",
        "truncate_right",
    ),
    **_places(
        f"{_HELPERS}.callables",
        "get_callable_name",
        "identity",
        "is_async_callable",
        "remove_none_values",
        "shutdown_event_loop_in_daemon",
        "start_event_loop_in_daemon",
    ),
    "TListOrMapping": f"{_HELPERS}.callables:Nested",
    **_places(
        f"{_HELPERS}.models",
        "compute_accuracy",
        "create_model_from_path",
        "empty_cache",
        "get_config_model_id",
        "global_then_local_main_first",
        "hash_module",
        "use_adapter",
    ),
    **_places(f"{_HELPERS}.chat", "print_prompt_completions_sample"),
    **_places("trl_fast.data.images", "strip_images_from_messages"),
    **_places(
        f"{_HELPERS}.trackers",
        "generate_model_card",
        "get_comet_experiment_url",
        "get_trackio_space_url",
        "log_table_to_comet_experiment",
    ),
    **_places(
        f"{_HELPERS}.throughput",
        "adjusted_mfu",
        "compute_flops_per_token",
        "compute_mfu",
        "get_peak_flops",
        "get_peak_flops_per_device",
    ),
    **_places("trl_fast.modeling.chat_template", "SIMPLE_CHAT_TEMPLATE"),
    **_places("trl_fast.data.repeat_sampler", "RepeatSampler"),
    "repeat_iterable_dataset": "trl_fast.data.repeat_sampler:repeat_stream",
}
_PROFILING = _places(f"{_HELPERS}.profiling", "ProfilingContext", "profiling_context", "profiling_decorator")
# Of transformers, which older TRL took them from.
_TRANSFORMERS_PACKAGES = _places(
    "transformers.utils", "is_bitsandbytes_available", "is_peft_available", "is_rich_available", "is_sklearn_available"
)
_TRANSFORMERS_DEVICES = {
    "is_npu_available": "transformers.utils:is_torch_npu_available",
    "is_xpu_available": "transformers.utils:is_torch_xpu_available",
    "is_pil_available": "transformers.utils:is_vision_available",
    "is_torchvision_available": "transformers.utils:is_torchvision_available",
    "is_wandb_available": "transformers.integrations:is_wandb_available",
}
_PACKAGES = {
    **_TRANSFORMERS_PACKAGES,
    **_TRANSFORMERS_DEVICES,
    "is_llmblender_available": f"{_HELPERS}.packages:is_llm_blender_available",
    **_places(
        f"{_HELPERS}.packages",
        "LIGER_KERNEL_MIN_VERSION",
        "PACKAGE_DISTRIBUTION_MAPPING",
        "TRLExperimentalWarning",
        "suppress_experimental_warning",
        "suppress_warning",
        *(
            f"is_{name}_available"
            for name in (
                *("aiohttp", "deepspeed", "diffusers", "fastapi", "harbor", "jmespath", "joblib", "liger_kernel"),
                *("llm_blender", "math_verify", "mergekit", "openreward", "pydantic", "requests", "unsloth"),
                *("uvicorn", "vllm", "vllm_ascend", "weave"),
            )
        ),
    ),
}
_FORMATTING = _places(
    f"{_HELPERS}.formatting",
    "conversations_formatting_function",
    "get_formatting_func_from_dataset",
    "instructions_formatting_function",
)
_SET_SEED = _places("transformers", "set_seed")
_ONLINE_NAMES = {
    "shuffle_tensor_dict": f"{_HELPERS}.tensors:shuffle_sequence_dict",
    "EnvironmentFactory": "trl_fast.rollout.environments:EnvironmentFactory",
    "RewardFunc": "trl_fast.rollout.reward_source:GivenReward",
    "RolloutFunc": "collections.abc:Callable",
}
# `from trl.trainer.NAME_trainer import ...` gives what TRL's own trainers import, too.
_IN_TRAINER_MODULES = {**_UTILITIES, **_DATA, **_CHAT_TEMPLATES, **_PROFILING, **_PACKAGES, **_REFERENCE, **_CALLBACKS}
_IN_TRAINER_MODULES |= {**_WRAPPED_MODEL, **_OFFLOADING, **_SELECTIVE_CHECKPOINTING, **_MASKED}


def _method_modules() -> dict[str, dict[str, str]]:
    """Lists the modules `NAME_config` and `NAME_trainer` of each method, in each package of TRL that has them."""
    modules: dict[str, dict[str, str]] = {}
    for method in METHODS.values():
        config, trainer = ({name: place} for name, place in method.exports.items())
        for package in method.trl_packages:
            modules[package] = {**modules.get(package, {}), **config, **trainer}
            modules[f"{package}.{method.name}_config"] = {**config, **(_F_DIVERGENCES if method.name == "dpo" else {})}
            modules[f"{package}.{method.name}_trainer"] = {
                **_IN_TRAINER_MODULES,
                **config,
                **trainer,
                **method.trl_names,
                **(_ONLINE_NAMES if method.reward_argument == "reward_funcs" else {}),
            }
        if method.has_trl_script:
            modules[f"trl.scripts.{method.name}"] = _script(method)
    return modules


def _script(method: Method) -> dict[str, str]:
    script = {name: f"{_HELPERS}.scripts:{method.name}_{name}" for name in ("main", "make_parser")}
    if method.reward_argument == "reward_funcs":
        script[f"{method.name.upper()}ScriptArguments"] = "trl_fast.cli.rewards:RewardScriptArguments"
        script["reward_funcs_registry"] = f"{_HELPERS}.scripts:reward_funcs_registry"
    return script


_OLDER_PACKAGE_LEVEL = {
    **_places("trl_fast.data", "truncate_dataset"),
    **_COMPLETION_ONLY,
    **_OLDER_SCRIPT_ARGUMENTS,
    **_GONE_CONFIGS,
    **_F_DIVERGENCES,
    **_SET_SEED,
    **_TRANSFORMERS_DEVICES,
    **{name: place for name, place in _PACKAGES.items() if name.startswith("is_")},
}

# Module of TRL: names and their places. `trl` and `trl.trainer` have all public names of trl_fast besides.
MODULES: dict[str, dict[str, str]] = {
    **_method_modules(),
    "trl": {
        **_OLDER_PACKAGE_LEVEL,
        **_places(f"{_HELPERS}.chat", "prepare_multimodal_messages_vllm"),
        **_places("trl_fast.data.images", "prepare_multimodal_messages"),
    },
    "trl.trainer": {
        **_FIRST_UTILITIES,
        **_COMPLETION_ONLY,
        **_GONE_CONFIGS,
        **_F_DIVERGENCES,
        **_places(f"{_HELPERS}.models", "compute_accuracy", "empty_cache", "peft_module_casting_to_bf16"),
    },
    "trl.trainer.callbacks": _CALLBACKS,
    "trl.trainer.model_config": _MODEL_CONFIG,
    "trl.trainer.utils": _UTILITIES,
    "trl.models": {
        **_REFERENCE,
        **_CHAT_FORMAT,
        **_WRAPPED_MODEL,
        **_SELECTIVE_CHECKPOINTING,
        **_OFFLOADING,
        **_places("peft", "prepare_model_for_kbit_training"),
    },
    "trl.models.utils": {
        **_REFERENCE,
        **_CHAT_FORMAT,
        **_WRAPPED_MODEL,
        **_ADAPTERS,
        **_places(f"{_HELPERS}.models", "disable_gradient_checkpointing", "enable_gradient_checkpointing"),
    },
    "trl.models.modeling_base": _REFERENCE,
    "trl.models.activation_offloading": _OFFLOADING,
    "trl.models.selective_activation_checkpointing": _SELECTIVE_CHECKPOINTING,
    "trl.core": {**_MASKED, **_SET_SEED, **_places(f"{_HELPERS}.tensors", "entropy_from_logits", "flatten_dict")},
    "trl.data_utils": _DATA,
    "trl.chat_template_utils": _CHAT_TEMPLATES,
    "trl.import_utils": _PACKAGES,
    "trl.extras": {},
    "trl.extras.profiling": _PROFILING,
    "trl.extras.dataset_formatting": _FORMATTING,
    "trl.kernels": {},
    "trl.kernels.logprob_entropy": _places("trl_fast.ops", "selective_log_softmax_and_entropy"),
    "trl.rewards": {**_ACCURACY_REWARDS, **_FORMAT_REWARDS, **_OTHER_REWARDS},
    "trl.rewards.accuracy_rewards": _ACCURACY_REWARDS,
    "trl.rewards.format_rewards": _FORMAT_REWARDS,
    "trl.rewards.other_rewards": _OTHER_REWARDS,
    "trl.scripts": _SCRIPTS,
    "trl.scripts.env": {"print_env": "trl_fast.cli.env:print_environment"},
    "trl.scripts.utils": {
        **_SCRIPTS,
        **_places("trl_fast.cli.arguments", "DatasetConfig"),
        **_places(f"{_HELPERS}.scripts", "get_git_commit_hash"),
    },
    "trl.scripts.vllm_serve": {
        "ScriptArguments": "trl_fast.cli.vllm_serve:VLLMServeArguments",
        "build_command": "trl_fast.cli.vllm_serve:build_command",
        "main": "trl_fast.cli.vllm_serve:serve",
        "make_parser": f"{_HELPERS}.scripts:make_serve_parser",
    },
    "trl.utils": _places("trl_fast", "ScriptArguments"),
    "trl.env_utils": {"strtobool": "transformers.utils.generic:strtobool"},
    "trl.commands": _OLDER_COMMANDS,
    "trl.commands.cli_utils": _OLDER_COMMANDS,
    "trl.experimental": {},
    "trl.experimental.bema_for_ref_model": _BEMA_FOR_REFERENCE,
    "trl.experimental.bema_for_ref_model.callback": _BEMA_FOR_REFERENCE,
    "trl.experimental.bema_for_ref_model.dpo_trainer": _BEMA_FOR_REFERENCE,
    "trl.experimental.utils": {
        **_REFERENCE,
        **_ADAPTERS,
        **_places("trl_fast.data", "truncate_dataset"),
        **_places(f"{_HELPERS}.tensors", "first_true_indices", "pad_to_length", "truncate_right"),
        **_places(f"{_HELPERS}.models", "empty_cache", "enable_gradient_checkpointing", "prepare_peft_model"),
    },
}
