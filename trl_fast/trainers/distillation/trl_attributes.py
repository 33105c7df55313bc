"""Lists the attributes of TRL's DistillationTrainer, and where their values are kept here."""

from __future__ import annotations

from ..base.trl_attributes import argument, fixed_attribute
from ..online.trl_attributes import GROUP_ATTRIBUTES, GRPO_ATTRIBUTES

_SHARED = (
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "shuffle_dataset"),
    *("log_completions", "log_unique_prompts", "num_completions_to_print"),
    *("pad_to_multiple_of", "use_vllm", "vllm_mode"),
    *("generation_config", "generation_kwargs", "eos_token_ids", "chat_template_kwargs"),
    *("_tokenizer", "_is_vlm", "_step", "_buffered_inputs", "_current_train_step_time", "_logs"),
)
_OF_TOOLS = ("max_tool_calling_iterations", "tools", "chat_template", "_image_pad_token_id", "_video_pad_token_id")

DISTILLATION_ATTRIBUTES = {
    **{name: GROUP_ATTRIBUTES[name] for name in _SHARED},
    **{name: GRPO_ATTRIBUTES[name] for name in _OF_TOOLS},
    "beta": argument("beta"),
    "_tool_dict": fixed_attribute(
        lambda trainer: {} if trainer.toolbox is None else trainer.toolbox.functions, "the prompts tell of them"
    ),
}

_OTHER_COMPLETIONS = "give a rollout_func, or a rollout_engine, instead"
_OTHER_LOSS = "override _compute_loss() instead"
# Methods of TRL's trainers that nothing here calls, and what to do instead.
UNCALLED_HOOKS = {
    **dict.fromkeys(
        (
            *("_generate_and_score_completions", "_generate", "_generate_single_turn", "_tokenize_prompts"),
            *("_tool_call_loop", "_get_tool_suffix_ids", "generate_on_policy_outputs"),
        ),
        _OTHER_COMPLETIONS,
    ),
    **dict.fromkeys(("_get_last_hidden_state", "generalized_jsd_loss"), _OTHER_LOSS),
}

GKD_ATTRIBUTES = {name: argument(name) for name in ("lmbda", "seq_kd")}

GOLD_ATTRIBUTES = {
    **{name: argument(name) for name in ("num_generations", "use_uld_loss", "vllm_sync_frequency")},
    "log_completion_steps": argument("log_completions_steps"),
    "wandb_log_unique_prompts": argument("log_unique_prompts"),
    "pad_token_id": fixed_attribute(lambda trainer: trainer.tokenizer.pad_token_id, "it is the tokenizer's"),
}

SERVER_ATTRIBUTES = {name: argument(name) for name in ("loss_top_k", "loss_add_tail", "reverse_kl_top_1_mode")}
SERVER_UNCALLED_HOOKS = {
    **UNCALLED_HOOKS,
    **dict.fromkeys(
        (
            *("_get_teacher_token_logprobs_from_server", "_get_reverse_kl_top_1_tokens", "_reduce_divergence_loss"),
            *("_compute_server_sparse_top_1_divergence_loss", "_compute_server_forward_kl_loss"),
            *("_compute_sparse_top_1_divergence_loss", "_compute_prompt_length"),
        ),
        _OTHER_LOSS,
    ),
}

IW_OPD_ATTRIBUTES = {
    **SERVER_ATTRIBUTES,
    **{name: argument(name) for name in ("lmbda", "distillation_objective", "iw_opd_gamma", "iw_opd_epsilon")},
    **{name: argument(name) for name in ("num_generations", "vllm_sync_frequency", "log_completions_steps")},
    "use_teacher_server": fixed_attribute(lambda trainer: trainer.args.use_teacher_server, "give it to the config"),
    "teacher_model_server_url": fixed_attribute(
        lambda trainer: trainer.args.teacher_model_server_url, "the server is spoken to; give it to the config"
    ),
}
IW_OPD_UNCALLED_HOOKS = {
    **SERVER_UNCALLED_HOOKS,
    **dict.fromkeys(
        (
            *("_generate_student_completions", "_generate_with_model", "_fill_buffer", "_store_completions_in_buffer"),
            *("_get_completion_lengths", "_build_sequence_batch"),
        ),
        _OTHER_COMPLETIONS,
    ),
    **dict.fromkeys(
        ("_compute_iw_opd_loss", "_compute_local_sparse_top_1_divergence_loss", "_get_teacher_logits"), _OTHER_LOSS
    ),
}
