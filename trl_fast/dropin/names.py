"""Lists the modules and names of TRL that trl_fast answers, with their places, and what is said about the others."""

from __future__ import annotations

from trl_fast.trainers.methods import METHODS

# The version whose names and behaviour these are.
TRL_VERSION = "1.16.0"


def _places(module: str, *names: str) -> dict[str, str]:
    return {name: f"{module}:{name}" for name in names}


def _method_modules() -> dict[str, dict[str, str]]:
    """Lists the modules `NAME_config` and `NAME_trainer` of each method, in each package of TRL that has them."""
    modules: dict[str, dict[str, str]] = {}
    for method in METHODS.values():
        config, trainer = ({name: place} for name, place in method.exports.items())
        for package in method.trl_packages:
            modules[package] = {**modules.get(package, {}), **config, **trainer}
            modules[f"{package}.{method.name}_config"] = config
            modules[f"{package}.{method.name}_trainer"] = {**trainer, **method.trl_names}
    return modules


_ARGUMENTS = _places("trl_fast", "DatasetMixtureConfig", "ScriptArguments", "TrlParser", "get_dataset")
_MODEL_ARGUMENTS = _places(
    "trl_fast", "ModelConfig", "get_kbit_device_map", "get_peft_config", "get_quantization_config"
)
_CALLBACKS = _places(
    "trl_fast", "BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback"
)
_TRUNCATE_DATASET = _places("trl_fast.data", "truncate_dataset")
_REFERENCE = _places("trl_fast", "create_reference_model")
_VERBOSITY = _places("trl_fast", "init_zero_verbose")
_ACCURACY_REWARDS = _places(
    "trl_fast.rewards", "accuracy_reward", "get_cosine_scaled_reward", "reasoning_accuracy_reward"
)
_FORMAT_REWARDS = _places("trl_fast.rewards", "think_format_reward")
_OTHER_REWARDS = _places("trl_fast.rewards", "get_repetition_penalty_reward", "get_soft_overlong_punishment")
_DISABLE_DROPOUT = {"disable_dropout_in_model": "trl_fast.modeling.loading:disable_dropout"}

# Module of TRL: names and their places in trl_fast. `trl` and `trl.trainer` have all public names of trl_fast besides.
MODULES: dict[str, dict[str, str]] = {
    **_method_modules(),
    "trl": _TRUNCATE_DATASET,
    "trl.trainer": _DISABLE_DROPOUT,
    "trl.trainer.callbacks": _CALLBACKS,
    "trl.trainer.model_config": _places("trl_fast", "ModelConfig"),
    "trl.trainer.utils": {
        **_MODEL_ARGUMENTS,
        **_DISABLE_DROPOUT,
        **_places("trl_fast.modeling.chat_template", "SIMPLE_CHAT_TEMPLATE"),
        **_places("trl_fast.data.repeat_sampler", "RepeatSampler"),
        **_places("trl_fast.ops", "selective_log_softmax"),
    },
    "trl.models": {**_REFERENCE, **_places("trl_fast", "setup_chat_format")},
    "trl.models.utils": {**_REFERENCE, **_places("trl_fast", "setup_chat_format")},
    "trl.models.modeling_base": _REFERENCE,
    "trl.data_utils": {
        **_TRUNCATE_DATASET,
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
    },
    "trl.chat_template_utils": _places("trl_fast", "clone_chat_template", "get_training_chat_template"),
    "trl.rewards": {**_ACCURACY_REWARDS, **_FORMAT_REWARDS, **_OTHER_REWARDS},
    "trl.rewards.accuracy_rewards": _ACCURACY_REWARDS,
    "trl.rewards.format_rewards": _FORMAT_REWARDS,
    "trl.rewards.other_rewards": _OTHER_REWARDS,
    "trl.scripts": {**_ARGUMENTS, **_VERBOSITY},
    "trl.scripts.utils": {**_ARGUMENTS, **_VERBOSITY, **_places("trl_fast.cli.arguments", "DatasetConfig")},
    "trl.commands": {},
    "trl.commands.cli_utils": {**_ARGUMENTS, **_VERBOSITY},
    "trl.experimental": {},
    "trl.experimental.utils": {**_REFERENCE, **_TRUNCATE_DATASET},
}


def _until(version: str, advice: str) -> str:
    return f"TRL had it until {version}; {advice}"


def _older(advice: str) -> str:
    return f"it is a name of an older TRL; {advice}"


_EXPERIMENTAL = "trl_fast does not have it; TRL 1.16 keeps it under trl.experimental"
_DROPPED = "trl_fast does not have it either"
_ADAPTER_ONLY = "quantised and LoRA models need no such preparation here: give peft_config to the trainer"

# Names that left TRL, or that TRL has and trl_fast deliberately has not, with what to do.
GONE: dict[str, str] = {
    "DataCollatorForCompletionOnlyLM": _until(
        "0.19",
        "give a dataset of prompts and completions, or set completion_only_loss or assistant_only_loss in SFTConfig",
    ),
    "ConstantLengthDataset": _older("set packing=True in SFTConfig"),
    "pack_examples": _until("0.19", "use pack_dataset"),
    "prepare_model_for_kbit_training": _older(_ADAPTER_ONLY),
    "peft_module_casting_to_bf16": _older(_ADAPTER_ONLY),
    "FDivergenceType": _until("0.28", "give DPOConfig(f_divergence_type=...) a string such as 'reverse_kl'"),
    "FDivergenceConstants": _until("0.28", "give DPOConfig(f_alpha_divergence_coef=...) the number"),
    "DPODataCollatorWithPadding": _older("leave it out: DPOTrainer makes its own collator"),
    "RewardDataCollatorWithPadding": _older("leave it out: RewardTrainer makes its own collator"),
    "prepare_multimodal_messages": "trl_fast trains text models only so far, and messages of text need no preparation",
    "WeaveCallback": "trl_fast does not have it; set report_to='wandb' and add a LogCompletionsCallback",
    "PPOv2Trainer": _until("0.12", "it became PPOTrainer"),
    "PPOv2Config": _until("0.12", "it became PPOConfig"),
    "LengthSampler": _older("use random.randrange"),
    "set_seed": "use transformers.set_seed",
    **dict.fromkeys(
        (
            "AutoModelForCausalLMWithValueHead",
            "AutoModelForSeq2SeqLMWithValueHead",
            "PreTrainedModelWrapper",
            *(f"{method}{kind}" for method in ("BCO", "NashMD", "PRM", "XPO") for kind in ("Config", "Trainer")),
        ),
        _until("0.28, then for a while under trl.experimental", _DROPPED),
    ),
    **dict.fromkeys(
        (f"{method}{kind}" for method in ("CPO", "GKD", "ORPO", "OnlineDPO") for kind in ("Config", "Trainer")),
        _until("0.28", _EXPERIMENTAL),
    ),
    "MergeModelCallback": _until("0.26", _EXPERIMENTAL),
    **dict.fromkeys(
        (
            "AllTrueJudge",
            "BaseBinaryJudge",
            "BaseJudge",
            "BasePairwiseJudge",
            "BaseRankJudge",
            "HfPairwiseJudge",
            "OpenAIPairwiseJudge",
            "PairRMJudge",
            "WinRateCallback",
        ),
        _until("0.28", _DROPPED),
    ),
    "BestOfNSampler": _until("0.24", "generate with num_return_sequences and choose the best by its reward"),
    **dict.fromkeys(
        (
            "AlignPropConfig",
            "AlignPropTrainer",
            "DDPOConfig",
            "DDPOTrainer",
            "DefaultDDPOStableDiffusionPipeline",
            "IterativeSFTConfig",
            "IterativeSFTTrainer",
        ),
        _until("0.23", _DROPPED),
    ),
    "TextEnvironment": _until("0.20", _DROPPED),
    "TextHistory": _until("0.20", _DROPPED),
}

# The same for whole modules.
GONE_MODULES: dict[str, str] = {
    "trl.experimental": "trl_fast does not have TRL's experimental methods; run the script with TRL itself",
    "trl.core": _older(_DROPPED),
    "trl.extras": "trl_fast does not have it; torch's own profiler does the same",
    "trl.environment": _until("0.20", _DROPPED),
    "trl.generation": "trl_fast does not have it: it is TRL's own machinery around vLLM",
    "trl.kernels": "trl_fast does not have it: its kernels are in trl_fast.ops",
    "trl.cli": "use the command trl-fast",
}
