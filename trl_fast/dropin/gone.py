"""Says why names and modules of TRL, present and past, are not answered here, and what to do instead."""

from __future__ import annotations


def _until(version: str, advice: str) -> str:
    return f"TRL had it until {version}; {advice}"


def _older(advice: str) -> str:
    return f"it is a name of an older TRL; {advice}"


_EXPERIMENTAL = "trl_fast does not have it; TRL 1.16 keeps it under trl.experimental"
_DROPPED = "trl_fast does not have it either"
_OWN_COLLATOR = "leave it out: the trainer makes its own collator"
_PIXELS = "TRL's own way to cut the pixels of a batch; trl_fast keeps images by row (trl_fast.data.images)"
_TEMPLATE_TEXTS = (
    "trl_fast keeps no copies of models' chat templates: it marks the assistant's words in the tokenizer's own "
    "(get_training_chat_template) and finds out how it writes tool calls (add_response_schema)"
)
_FUSED_HEAD = "TRL's own way to score tokens; here trl_fast.ops.linear_logprob does it, outside of the model's forward"
_SHARDED = (
    "TRL's own way to weights that DeepSpeed or FSDP shards; here the trainers gather them by themselves, and "
    "unwrap_model_for_generation does"
)

_ADAPTER = (
    "it makes GRPOTrainer's dataset, environment_factory and reward_funcs of the package {0}'s tasks, and reads "
    "nothing of TRL's trainers; import it from TRL itself, and GRPOTrainer from trl_fast, in a script run by python"
)
_ASYNCHRONOUS = (
    "it samples from a vLLM server while it trains, with the weights of earlier steps{0}; trl_fast samples between "
    "updates: use {1} with use_vllm=True"
)
# Modules of trl.experimental in TRL 1.16, why they are not here, and what to do instead.
_EXPERIMENTS = {
    "async_distillation": _ASYNCHRONOUS.format(", and asks a second one for the teacher", "DistillationTrainer"),
    "async_grpo": _ASYNCHRONOUS.format("", "GRPOTrainer"),
    "harbor": _ADAPTER.format("harbor"),
    "merge_model_callback": "it hands checkpoints to the package mergekit; call mergekit on the folder that "
    "save_model wrote, or in the on_save of a callback of your own",
    "openreward": _ADAPTER.format("openreward"),
}

# Names, which may be patterns as of file names, and what is said of them. The first that fits counts.
GONE: dict[str, str] = {
    "ConstantLengthDataset": _older("set packing=True in SFTConfig"),
    "pack_examples": _until("0.19", "use pack_dataset"),
    "DPODataCollatorWithPadding": _older(_OWN_COLLATOR),
    "PreferenceCollator": _older(_OWN_COLLATOR),
    "RewardDataCollatorWithPadding": _older(_OWN_COLLATOR),
    "DataCollatorForChatML": _older("give SFTTrainer a dataset of messages and leave the collator out"),
    "DataCollatorForVisionLanguageChatML": _older(_OWN_COLLATOR),
    "*split_pixel_values_by_grid": _PIXELS,
    "PPOv2Trainer": _until("0.12", "it became PPOTrainer"),
    "PPOv2Config": _until("0.12", "it became PPOConfig"),
    "PolicyAndValueWrapper": _older("PPOTrainer holds policy and value model by itself"),
    "INVALID_LOGPROB": _older("PPOTrainer masks padding by itself"),
    "OnPolicyConfig": _older("use PPOConfig, or the config of the method"),
    "LengthSampler": _older("use random.randrange"),
    "add_fused_lm_head": _FUSED_HEAD,
    "FusedCausalLMOutput": _FUSED_HEAD,
    "patch_chunked_lm_head": _older(_FUSED_HEAD),
    "maybe_gather_lm_head_ctx": _SHARDED,
    "add_hooks": _SHARDED,
    "remove_hooks": _SHARDED,
    "iter_params": _SHARDED,
    "get_all_parameters": _SHARDED,
    "DistributedBackend": _SHARDED,
    "OffloadActivations": "trl_fast offloads activations by itself; use get_act_offloading_ctx_manager, or set "
    "activation_offloading=True in the trainer's config",
    "NoOpManager": "use contextlib.nullcontext",
    "build_teacher_request_inputs": "TRL's own way to cut a padded batch for a teacher's server; "
    "trl_fast.rollout.teacher_server asks about lists of tokens",
    "DTensor": "import it from torch.distributed.tensor",
    "suppress_seqcls_warning": "it hides a warning of transformers while TRL loads a model; leave it out",
    **dict.fromkeys(
        (
            "AutoModelForCausalLMWithValueHead",
            "AutoModelForSeq2SeqLMWithValueHead",
            "PreTrainedModelWrapper",
            *(f"{method}Trainer" for method in ("PRM",)),
        ),
        _until("0.28, then for a while under trl.experimental", _DROPPED),
    ),
    **dict.fromkeys(
        ("XPOTrainer", "NashMDTrainer"),
        "TRL had it until 0.28, then for a while under trl.experimental, as a subclass of OnlineDPOTrainer; neither "
        "TRL 1.16 nor trl_fast has it: use OnlineDPOTrainer",
    ),
    "MergeModelCallback": _until("0.26", _EXPERIMENTAL),
    **dict.fromkeys(("*Judge", "WinRateCallback"), _until("0.28", _DROPPED)),
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

# The same for whole modules, with all that is below them.
GONE_MODULES: dict[str, str] = {
    **{f"trl.experimental.{name}": said for name, said in _EXPERIMENTS.items()},
    **{f"trl.experimental.{name}": GONE["XPOTrainer"] for name in ("nash_md", "xpo")},
    **{f"trl.experimental.{name}": GONE["*Judge"] for name in ("judges", "winrate_callback")},
    "trl.experimental.prm": GONE["PRMTrainer"],
    "trl.experimental": "trl_fast does not have it; run the script with TRL itself",
    "trl.chat_template_utils": _TEMPLATE_TEXTS,
    "trl.core": _older("its functions were those of the PPOTrainer of TRL up to 0.11; see PPOTrainer and PPOConfig"),
    "trl.extras.best_of_n_sampler": GONE["BestOfNSampler"],
    "trl.extras.vllm_client": _until("0.25", "set use_vllm=True in the trainer's config"),
    "trl.environment": GONE["TextEnvironment"],
    "trl.generation": "it is TRL's own machinery around vLLM; trl_fast.rollout has its own: set use_vllm=True in the "
    "trainer's config",
    "trl.kernels": "its kernels are those of TRL's own losses; trl_fast's are behind the functions of trl_fast.ops",
    "trl.cli": "use the command trl-fast",
    "trl.distributed": _SHARDED,
    "trl.trainer.judges": GONE["*Judge"],
    "trl.mergekit_utils": _until("0.26", _EXPERIMENTAL),
    "trl.skills": "it is about assistants that write scripts for TRL, and no part of training",
}
