"""Lists the attributes of TRL's online trainers, and where their values are kept here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from peft import PeftModel

from trl_fast.modeling.loading import base_model

from ..base.trl_attributes import TRLAttribute, argument, change_argument

_ARGUMENTS = (
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("mask_truncated_completions", "shuffle_dataset"),
    *("log_completions", "log_multimodal", "log_unique_prompts", "num_completions_to_print"),
)
_GRPO_ARGUMENTS = (
    *("loss_type", "importance_sampling_level", "multi_objective_aggregation", "scale_rewards"),
    *("off_policy_mask_threshold", "top_entropy_quantile"),
    *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
)
_MADE_BEFORE = "what it says was done when the trainer was made; give it to the config"
_MADE_ONCE = (
    *("num_iterations", "pad_to_multiple_of", "use_transformers_continuous_batching"),
    *("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"),
)
_SET_BY_DATA = "the datasets tell whether there are images"
_OF_FACTORY = "environments are made by the environment_factory that the trainer was given"


def _set_beta(trainer: Any, value: float) -> None:
    old, policy = trainer.args.beta, trainer.accelerator.unwrap_model(trainer.model)
    if value and trainer.ref_model is None and not isinstance(policy, PeftModel):
        raise ValueError(
            f"beta={value}: {type(trainer).__name__} was made with beta=0 and has no reference model for a KL term; "
            "make it with a beta above 0, and change that"
        )
    change_argument(trainer, "beta", value)
    if value and not old:
        # The completions at hand were not scored by the reference.
        trainer.generation.slices = None


def _set_epsilon(trainer: Any, value: float) -> None:
    if trainer.args.epsilon_high is None:
        trainer.args.epsilon_high = trainer.args.epsilon
    change_argument(trainer, "epsilon", value)


def _set_num_generations(trainer: Any, value: int) -> None:
    size = trainer.args.generation_batch_size
    if trainer.is_in_train and value != trainer.args.num_generations:
        raise ValueError(
            f"num_generations={value}: prompts are read for groups of {trainer.args.num_generations} completions "
            "until training ends; change it before train()"
        )
    if value < 2 or size % value:
        raise ValueError(f"num_generations={value}: expected a divisor of generation_batch_size={size}, at least 2")
    change_argument(trainer, "num_generations", value)


def _set_num_generations_eval(trainer: Any, value: int) -> None:
    change_argument(trainer, "num_generations_eval", value)


def _set_correction(trainer: Any, value: bool) -> None:
    change_argument(trainer, "vllm_importance_sampling_correction", value)


def _set_entropy_coef(trainer: Any, value: float) -> None:
    if trainer.entropy is not None:
        trainer.entropy.coefficient = value
    elif value:
        raise ValueError(
            f"entropy_coef={value}: GRPOTrainer was made without an entropy bonus; make it with an entropy_coef "
            "above 0, and change that"
        )


def _set_tool_iterations(trainer: Any, value: int | None) -> None:
    change_argument(trainer, "max_tool_calling_iterations", value)
    if trainer.toolbox is not None:
        trainer.loop.engine.max_iterations = value


def _of_rewards(name: str, setter: str) -> TRLAttribute:
    """Returns an attribute of the reward sources, with the method of `ChangeableRewards` that exchanges it."""

    def write(trainer: Any, value: Any) -> None:
        getattr(trainer.reward_functions, setter)(value)

    def read(trainer: Any) -> Any:
        found = trainer.reward_functions
        return getattr(found, name, found.functions if name == "reward_funcs" else [None] * len(found))

    return TRLAttribute(read=read, write=write)


def _of_entropy(name: str, otherwise: Any) -> TRLAttribute:
    def read(trainer: Any) -> Any:
        return otherwise(trainer) if trainer.entropy is None else getattr(trainer.entropy, name)

    return TRLAttribute(read=read, fixed="the controller of the entropy bonus keeps it")


def _fixed(read: Callable[[Any], Any], reason: str = _MADE_BEFORE) -> TRLAttribute:
    return TRLAttribute(read=read, fixed=reason)


def _constant(value: Any, reason: str) -> TRLAttribute:
    return TRLAttribute(read=lambda trainer: value, fixed=reason)


def _token_of_images(trainer: Any, kind: str) -> int | None:
    """Returns the token that stands for images or videos; None where there are no images, or no such token."""
    if trainer.images is None:
        return None
    return getattr(base_model(trainer.accelerator.unwrap_model(trainer.model)).config, f"{kind}_token_id", None)


def _tools(trainer: Any) -> list[Callable]:
    if trainer.environment_rollouts is not None:
        kinds = trainer.environment_rollouts.environments.kinds.values()
        return list(dict.fromkeys(tool for kind in kinds for tool in kind.tools))
    return [] if trainer.toolbox is None else [*trainer.toolbox.functions.values()]


def _standalone_tools(trainer: Any) -> list[Callable]:
    if trainer.environment_rollouts is None:
        return _tools(trainer)
    kind = next(iter(trainer.environment_rollouts.environments.kinds.values()))
    return [tool for tool in kind.tools if getattr(tool, "__name__", "") not in kind.methods]


def _environments(trainer: Any) -> list[Any] | None:
    """Returns the environments of the last generation's completions; None before there is one."""
    rollouts = trainer.environment_rollouts
    return None if rollouts is None else rollouts.environments.instances or None


def _chooses_environments(trainer: Any) -> bool:
    return trainer.environment_rollouts is not None and trainer.environment_rollouts.environments.by_name


def _of_kinds(name: str) -> Callable[[Any], dict[str | None, Any] | None]:
    """Returns what reads an attribute of each kind of environments, by its name; None where there are none."""

    def read(trainer: Any) -> dict[str | None, Any] | None:
        rollouts = trainer.environment_rollouts
        kinds = {} if rollouts is None else rollouts.environments.kinds
        return {key: getattr(kind, name) for key, kind in kinds.items()} or None

    return read


GROUP_ATTRIBUTES = {
    **{name: argument(name) for name in _ARGUMENTS},
    **{name: TRLAttribute(f"args.{name}", fixed=_MADE_BEFORE) for name in _MADE_ONCE},
    "beta": TRLAttribute("args.beta", write=_set_beta),
    "epsilon_low": TRLAttribute("args.epsilon", write=_set_epsilon),
    "epsilon_high": TRLAttribute(
        read=lambda trainer: trainer.loss_config.upper,
        write=lambda trainer, value: change_argument(trainer, "epsilon_high", value),
    ),
    "num_generations": TRLAttribute("args.num_generations", write=_set_num_generations),
    "num_generations_eval": TRLAttribute(
        read=lambda trainer: trainer.args.generations("eval"), write=_set_num_generations_eval
    ),
    "reward_funcs": _of_rewards("reward_funcs", "set_sources"),
    "reward_processing_classes": _of_rewards("reward_processing_classes", "set_tokenizers"),
    "reward_func_names": _of_rewards("names", "set_names"),
    "reward_weights": _of_rewards("weights", "set_weights"),
    "generation_config": TRLAttribute("sampling.config"),
    "generation_kwargs": _fixed(lambda trainer: trainer.sampling.arguments(), "change generation_config"),
    "eos_token_ids": _fixed(lambda trainer: trainer.sampling.end_ids),
    "chat_template_kwargs": _fixed(lambda trainer: trainer.args.chat_template_kwargs or {}),
    "continuous_batching_config": _constant(None, "generation computes each prompt once by itself"),
    "aux_loss_enabled": _fixed(lambda trainer: bool(trainer.router_aux_loss_coef), "set router_aux_loss_coef"),
    "_tokenizer": _fixed(lambda trainer: trainer.tokenizer),
    "_is_vlm": _fixed(lambda trainer: trainer.images is not None, _SET_BY_DATA),
    "_step": TRLAttribute("generation.step"),
    "_buffered_inputs": TRLAttribute("generation.slices"),
    "_current_train_step_time": TRLAttribute("generation.step_time"),
    "_logs": _fixed(lambda trainer: trainer.completions_log.logs, "change its lists"),
    "_pending_extra_logs": _fixed(lambda trainer: trainer.loop.metrics.columns, "change its lists"),
    "_pending_metrics": _fixed(lambda trainer: trainer.loop.metrics.numbers, "change its lists"),
}

GRPO_ATTRIBUTES = {
    **{name: argument(name) for name in _GRPO_ARGUMENTS},
    "vllm_importance_sampling_correction": TRLAttribute(
        "args.vllm_importance_sampling_correction", write=_set_correction
    ),
    "max_tool_calling_iterations": TRLAttribute(
        read=lambda trainer: trainer.args.max_tool_calling_iterations or sys.maxsize, write=_set_tool_iterations
    ),
    "use_adaptive_entropy": TRLAttribute("args.use_adaptive_entropy", fixed=_MADE_BEFORE),
    "entropy_coef": TRLAttribute(
        read=lambda trainer: trainer.args.entropy_coef if trainer.entropy is None else trainer.entropy.coefficient,
        write=_set_entropy_coef,
    ),
    "tools": _fixed(_tools),
    "_standalone_tools": _fixed(_standalone_tools),
    "chat_template": _constant(None, "conversations go on from their own tokens, whatever the template"),
    "environment_factories": _fixed(_of_kinds("factory"), _OF_FACTORY),
    "environments": _fixed(_environments, _OF_FACTORY),
    "_multi_environment": _fixed(_chooses_environments, _OF_FACTORY),
    "_env_tools": _fixed(_of_kinds("tools"), _OF_FACTORY),
    "_environment_pool": _fixed(_of_kinds("pool"), _OF_FACTORY),
    "_image_pad_token_id": _fixed(lambda trainer: _token_of_images(trainer, "image"), _SET_BY_DATA),
    "_video_pad_token_id": _fixed(lambda trainer: _token_of_images(trainer, "video"), _SET_BY_DATA),
    "_entropy_bonus_enabled": _fixed(lambda trainer: trainer.args.has_entropy_bonus),
    "_last_world_entropy": _of_entropy("last_entropy", lambda trainer: float("inf")),
    "_entropy_window_stats": _of_entropy("_window", lambda trainer: None),
}

RLOO_ATTRIBUTES = {name: argument(name) for name in ("normalize_advantages", "reward_clip_range")}

_ALIKE = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "use_vllm", "vllm_mode"),
    *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "reward_funcs", "reward_processing_classes"),
    *("reward_func_names", "reward_weights", "generation_config", "generation_kwargs", "eos_token_ids", "_tokenizer"),
)
ONLINE_DPO_ATTRIBUTES = {
    **{name: GROUP_ATTRIBUTES[name] for name in _ALIKE},
    "max_length": argument("max_length"),
    "vllm_model_impl": TRLAttribute("args.vllm_model_impl", fixed=_MADE_BEFORE),
    "num_generations": _constant(2, "a pair is two completions"),
    "is_vision_model": _fixed(lambda trainer: trainer.images is not None, _SET_BY_DATA),
}

# Methods of TRL's trainers, older releases included, that nothing here calls, and what to override instead.
UNCALLED_HOOKS = {
    "get_off_policy_mask": "override _compute_loss() instead",
    "get_gamma_weights": "override _compute_loss() instead",
    "_tool_call_loop": "override _generate() instead, or give a rollout_func",
    "_get_tool_suffix_ids": "override _generate() instead, or give a rollout_func",
    "_get_per_token_logps": "its name is _get_per_token_logps_and_entropies() now, which returns three values",
    "_get_last_hidden_state": "override _get_per_token_logps_and_entropies() instead",
    "compute_liger_loss": "override _compute_loss() instead",
    "_move_model_to_vllm": "give a rollout_engine with a sync_weights() of its own",
    "_sync_fsdp_params_to_vllm": "give a rollout_engine with a sync_weights() of its own",
    "_sync_fsdp1_params_to_vllm": "give a rollout_engine with a sync_weights() of its own",
    "_sync_fsdp2_params_to_vllm": "give a rollout_engine with a sync_weights() of its own",
    "_fix_param_name_to_vllm": "give a rollout_engine with a sync_weights() of its own",
}
