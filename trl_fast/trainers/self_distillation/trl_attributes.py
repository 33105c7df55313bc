"""Lists the attributes of TRL's self-distillation trainers, and where their values are kept here."""

from __future__ import annotations

from ..base.trl_attributes import TRLAttribute, argument
from ..online.trl_attributes import GROUP_ATTRIBUTES

_SHARED = (
    *("max_completion_length", "temperature", "shuffle_dataset", "num_generations", "num_generations_eval"),
    *("num_iterations", "use_vllm", "generation_config", "generation_kwargs", "eos_token_ids"),
    *("chat_template_kwargs", "_tokenizer", "_step", "_buffered_inputs"),
)
_READ_BEFORE = "the prompts were prepared with it; give it to the config"

SELF_DISTILLATION_ATTRIBUTES = {
    **{name: GROUP_ATTRIBUTES[name] for name in _SHARED},
    "max_prompt_length": TRLAttribute("args.max_prompt_length", fixed=_READ_BEFORE),
    "use_teacher_server": TRLAttribute("args.use_teacher_server", fixed="there is no teacher server"),
    "teacher_model": TRLAttribute(
        read=lambda trainer: trainer.model if trainer.reference.model is None else trainer.reference.model,
        fixed="give teacher_model_kind to the config",
    ),
}
SDFT_ATTRIBUTES = {
    **SELF_DISTILLATION_ATTRIBUTES,
    **{name: argument(name) for name in ("num_loss_tokens_to_skip", "generate_from_teacher")},
}

SDPO_ATTRIBUTES = {
    **SELF_DISTILLATION_ATTRIBUTES,
    **{name: argument(name) for name in ("loss_type", "importance_sampling_level", "scale_rewards")},
    "beta": TRLAttribute("args.beta", fixed="the loss has no KL term"),
}

_OTHER_COMPLETIONS = "give a rollout_engine instead"
_OTHER_LOSS = "override _compute_loss() instead"
# Methods of TRL's trainers that nothing here calls, and what to do instead.
UNCALLED_HOOKS = {
    **dict.fromkeys(
        ("sample_rollouts", "_generate", "_generate_transformers", "_generate_vllm", "_tokenize_prompts"),
        _OTHER_COMPLETIONS,
    ),
    **dict.fromkeys(
        (
            *("_compute_self_distillation_loss", "_compute_teacher_student_logits", "_forward_logits"),
            *("_compute_server_distillation_loss", "_log_self_distillation_metric"),
        ),
        _OTHER_LOSS,
    ),
    "_prepare_training_batch": "override make_samples() instead",
    "_compute_rollout_logps": "override policy_logprobs() instead",
    "_setup_teacher_model": "give teacher_model_kind to the config",
    "_get_teacher_context_for_self_distillation": "give teacher_model_kind to the config",
}
_OTHER_CONTEXTS = "override add_contexts() instead, which gives the samples teacher_prompt_ids"
SDPO_UNCALLED_HOOKS = {
    **UNCALLED_HOOKS,
    "_prepare_training_batch": "override make_samples() or compute_advantages() instead",
    "_compute_policy_loss": _OTHER_LOSS,
    "_tokenize_prompts_untruncated": _OTHER_CONTEXTS,
    **dict.fromkeys(
        ("_record_reward_diagnostics", "_record_completion_metrics", "_warn_on_inactive_self_distillation"),
        "override compute_advantages() instead",
    ),
}
