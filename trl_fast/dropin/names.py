"""Which modules TRL has, and where trl_fast has what is in them."""

from __future__ import annotations

# The version whose names and behaviour these are.
TRL_VERSION = "1.16.0"

_ARGUMENTS = dict.fromkeys(("DatasetMixtureConfig", "ScriptArguments", "TrlParser", "get_dataset"), "trl_fast")
_MODEL_ARGUMENTS = dict.fromkeys(
    ("ModelConfig", "get_kbit_device_map", "get_peft_config", "get_quantization_config"), "trl_fast"
)
_CALLBACKS = dict.fromkeys(
    ("BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback"), "trl_fast"
)

# Module of TRL: {name: module of trl_fast, with ":name" where it is called otherwise there}. `trl` and `trl.trainer`
# have all public names of trl_fast besides.
MODULES: dict[str, dict[str, str]] = {
    "trl": {"truncate_dataset": "trl_fast.data"},
    "trl.trainer": {"disable_dropout_in_model": "trl_fast.modeling.loading:disable_dropout"},
    "trl.trainer.callbacks": _CALLBACKS,
    "trl.trainer.dpo_config": {"DPOConfig": "trl_fast"},
    "trl.trainer.dpo_trainer": {"DPOTrainer": "trl_fast", "DataCollatorForPreference": "trl_fast.data"},
    "trl.trainer.kto_config": {"KTOConfig": "trl_fast"},
    "trl.trainer.kto_trainer": {
        "KTOTrainer": "trl_fast",
        "DataCollatorForUnpairedPreference": "trl_fast.data",
    },
    "trl.trainer.grpo_config": {"GRPOConfig": "trl_fast"},
    "trl.trainer.grpo_trainer": {"GRPOTrainer": "trl_fast"},
    "trl.trainer.rloo_config": {"RLOOConfig": "trl_fast"},
    "trl.trainer.rloo_trainer": {"RLOOTrainer": "trl_fast"},
    "trl.trainer.ppo_config": {"PPOConfig": "trl_fast"},
    "trl.trainer.ppo_trainer": {"PPOTrainer": "trl_fast"},
    "trl.trainer.sft_config": {"SFTConfig": "trl_fast"},
    "trl.trainer.sft_trainer": {"SFTTrainer": "trl_fast", "DataCollatorForLanguageModeling": "trl_fast.data"},
    "trl.trainer.reward_config": {"RewardConfig": "trl_fast"},
    "trl.trainer.reward_trainer": {
        "RewardTrainer": "trl_fast",
        "DataCollatorForPreference": "trl_fast.data:DataCollatorForReward",
    },
    "trl.trainer.model_config": {"ModelConfig": "trl_fast"},
    "trl.trainer.utils": {
        **_MODEL_ARGUMENTS,
        "SIMPLE_CHAT_TEMPLATE": "trl_fast.modeling.chat_template",
        "disable_dropout_in_model": "trl_fast.modeling.loading:disable_dropout",
        "RepeatSampler": "trl_fast.data.repeat_sampler",
        "selective_log_softmax": "trl_fast.ops",
    },
    "trl.models": dict.fromkeys(("create_reference_model", "setup_chat_format"), "trl_fast"),
    "trl.models.utils": dict.fromkeys(("create_reference_model", "setup_chat_format"), "trl_fast"),
    "trl.models.modeling_base": {"create_reference_model": "trl_fast"},
    "trl.data_utils": dict.fromkeys(
        (
            "apply_chat_template",
            "extract_prompt",
            "is_conversational",
            "is_conversational_from_value",
            "maybe_apply_chat_template",
            "maybe_convert_to_chatml",
            "maybe_extract_prompt",
            "maybe_unpair_preference_dataset",
            "pack_dataset",
            "truncate_dataset",
            "unpair_preference_dataset",
        ),
        "trl_fast.data",
    ),
    "trl.chat_template_utils": dict.fromkeys(("clone_chat_template", "get_training_chat_template"), "trl_fast"),
    "trl.rewards": dict.fromkeys(
        (
            "accuracy_reward",
            "get_cosine_scaled_reward",
            "get_repetition_penalty_reward",
            "get_soft_overlong_punishment",
            "reasoning_accuracy_reward",
            "think_format_reward",
        ),
        "trl_fast.rewards",
    ),
    "trl.rewards.accuracy_rewards": dict.fromkeys(
        ("accuracy_reward", "get_cosine_scaled_reward", "reasoning_accuracy_reward"), "trl_fast.rewards"
    ),
    "trl.rewards.format_rewards": {"think_format_reward": "trl_fast.rewards"},
    "trl.rewards.other_rewards": dict.fromkeys(
        ("get_repetition_penalty_reward", "get_soft_overlong_punishment"), "trl_fast.rewards"
    ),
    "trl.scripts": {**_ARGUMENTS, "init_zero_verbose": "trl_fast"},
    "trl.scripts.utils": {
        **_ARGUMENTS,
        "DatasetConfig": "trl_fast.cli.arguments",
        "init_zero_verbose": "trl_fast",
    },
    "trl.commands": {},
    "trl.commands.cli_utils": {**_ARGUMENTS, "init_zero_verbose": "trl_fast"},
    "trl.experimental": {},
    "trl.experimental.kto": dict.fromkeys(("KTOConfig", "KTOTrainer"), "trl_fast"),
    "trl.experimental.kto.kto_config": {"KTOConfig": "trl_fast"},
    "trl.experimental.kto.kto_trainer": {"KTOTrainer": "trl_fast"},
    "trl.experimental.ppo": dict.fromkeys(("PPOConfig", "PPOTrainer"), "trl_fast"),
    "trl.experimental.utils": {"create_reference_model": "trl_fast", "truncate_dataset": "trl_fast.data"},
}


def _until(last: str, what: str) -> str:
    return f"TRL had it until {last}; {what}"


def _older(what: str) -> str:
    return f"it is a name of an older TRL; {what}"


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
