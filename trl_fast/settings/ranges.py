"""Checks the numbers of settings against one table for all configs, which says what numbers each setting takes.

A config calls `check_ranges(self)`. A field is looked up as "Owner.field", for the config's own class and those it
inherits from, then as "field". A field without an entry, such as one of a user's subclass, only has to be finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from numbers import Integral, Real
from typing import Any, cast


def annotation(owner: type, item: Field) -> str:
    """Returns the text of a field's annotation: that of the class, since transformers' parser changes the field's own.

    A user's subclass may have annotations that cannot be evaluated here, so their text is read.
    """
    written = (vars(each).get("__annotations__", {}) for each in owner.__mro__)
    return str(next((names[item.name] for names in written if item.name in names), item.type))


@dataclass(frozen=True)
class Range:
    """Describes the numbers that a setting takes.

    Args:
        low, high: the least and the largest number.
        above, below: whether `low` and `high` themselves are excluded.
        whole: whether only integers are taken.
        infinite: whether infinity is taken; NaN never is.
        many: whether the setting is a list of such numbers. or_one: or one such number.
        optional: whether None is taken; unset, the field's annotation says so.
        advice: what the message says besides: another setting, or the meaning of special values.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    infinite: bool = False
    many: bool = False
    or_one: bool = False
    optional: bool | None = None
    advice: str = ""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, Integral):
            if not isinstance(value, Real) or not (self.infinite or math.isfinite(value)):
                return False
            if self.whole and not float(value).is_integer():
                return False
        value = cast("float", value)
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        kind = "integer" if self.whole else "number" if self.infinite else "finite number"
        kind = f"{kind}s" if self.many else f"an {kind}" if self.whole else f"a {kind}"
        if self.low == -math.inf and self.high == math.inf:
            bounds = ""
        elif self.high == math.inf:
            bounds = f" {'>' if self.above else '>='} {self.low}"
        else:
            bounds = f" in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
        return f"{'a list of ' if self.many else ''}{kind}{bounds}"


FINITE = Range()
FINITE_LIST = Range(many=True)
INTEGER = Range(whole=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
COUNT = Range(1, whole=True)
COUNT_FROM_0 = Range(0, whole=True)
PORT = Range(1, 65535, whole=True)

_NONE_MEANS_NO_LIMIT = "None is no limit"
_EPOCHS_OR_STEPS = "0 or -1: as num_train_epochs says"
_SHARE_OF_STEPS = "below 1 it is a share of all steps"

RANGES: dict[str, Range] = {
    # transformers.TrainingArguments
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": Range(1, whole=True, advice="1 accumulates nothing"),
    "num_train_epochs": NOT_NEGATIVE,
    "max_steps": Range(-1, whole=True, advice=_EPOCHS_OR_STEPS),
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": Range(0, advice=_SHARE_OF_STEPS),
    "warmup_ratio": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": Range(0, 1, below=True),
    "adam_beta2": Range(0, 1, below=True),
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": Range(0, advice="0 switches clipping off"),
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "torch_empty_cache_steps": COUNT,
    "logging_steps": Range(0, advice=f"{_SHARE_OF_STEPS}; logging_strategy='no' logs nothing"),
    "eval_steps": Range(0, advice=f"{_SHARE_OF_STEPS}; eval_strategy='no' evaluates nothing"),
    "save_steps": Range(0, advice=f"{_SHARE_OF_STEPS}; save_strategy='no' saves nothing"),
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": COUNT,
    "save_total_limit": Range(-1, whole=True, advice="0 and -1 are no limit"),
    # numpy's generator takes no others; those of data_seed are torch's.
    "seed": Range(0, 2**32 - 1, whole=True),
    "data_seed": Range(-(2**63), 2**64 - 1, whole=True),
    "dataloader_num_workers": COUNT_FROM_0,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "local_rank": Range(-1, whole=True, advice="-1: one process"),
    # All trainers
    "dataset_num_proc": COUNT_FROM_0,
    "max_length": Range(1, whole=True, advice=_NONE_MEANS_NO_LIMIT),
    "pad_to_multiple_of": Range(1, whole=True, advice="'auto' does not pad"),
    "router_aux_loss_coef": NOT_NEGATIVE,
    "activation_budget_bytes": Range(0, whole=True, advice="0 keeps nothing"),
    "tiled_mlp": Range(1, whole=True, advice="True: 4096 tokens, False: whole rows"),
    "head_workspace_bytes": COUNT,
    # SFT
    "max_seq_length": Range(1, whole=True, advice=_NONE_MEANS_NO_LIMIT),
    "dataset_batch_size": INTEGER,
    "num_of_sequences": INTEGER,
    "chars_per_token": FINITE,
    # Methods with a reference
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "precompute_ref_batch_size": COUNT,
    "beta": NOT_NEGATIVE,
    "max_prompt_length": COUNT,
    "max_completion_length": COUNT,
    "max_target_length": COUNT,
    "label_pad_token_id": INTEGER,
    "padding_value": INTEGER,
    # DPO
    "loss_weights": FINITE_LIST,
    "ld_alpha": Range(0, 1, advice="None does not weigh by length"),
    "f_alpha_divergence_coef": FINITE,
    "label_smoothing": SHARE,
    # Methods without a reference
    "cpo_alpha": NOT_NEGATIVE,
    "alpha": FINITE,
    "simpo_gamma": FINITE,
    "tpo_alpha": NOT_NEGATIVE,
    "tpo_l_gamma": FINITE,
    # BCO
    "prompt_sample_size": COUNT,
    "min_density_ratio": NOT_NEGATIVE,
    "max_density_ratio": NOT_NEGATIVE,
    "discopop_tau": POSITIVE,
    "rpo_alpha": FINITE,
    # KTO
    "KTOConfig.beta": POSITIVE,
    # A number of epochs.
    "OnlineDPOConfig.beta": Range(0, above=True, many=True, or_one=True),
    "KTOLossConfig.beta": POSITIVE,
    "desirable_weight": NOT_NEGATIVE,
    "undesirable_weight": NOT_NEGATIVE,
    # Reward models
    "center_rewards_coefficient": Range(0, advice="a negative one would drive rewards away from zero"),
    # GRPO and RLOO: sampling
    "num_generations": Range(
        2, whole=True, optional=False, advice="a completion is compared with the others of its prompt"
    ),
    "DistillationConfig.num_generations": COUNT,
    "SelfDistillationConfig.num_generations": COUNT,
    # Of any method: its config has been checked.
    "TrainingSetup.num_generations": COUNT,
    "capability": Range(0, whole=True, many=True),
    "num_generations_eval": COUNT,
    "SamplingConfig.max_completion_length": Range(1, whole=True, optional=False),
    "generation_batch_size": COUNT,
    "steps_per_generation": COUNT,
    "temperature": Range(0, above=True, advice="for greedy decoding use generation_kwargs={'do_sample': False}"),
    "top_p": Range(0, 1, above=True, advice="1 keeps all tokens"),
    "top_k": Range(-1, whole=True, advice="0 and -1 keep all tokens"),
    "min_p": SHARE,
    "repetition_penalty": Range(0, above=True, advice="1 is none"),
    "max_new_tokens": COUNT,
    "num_completions_to_print": COUNT_FROM_0,
    "max_tool_calling_iterations": COUNT_FROM_0,
    # GRPO, RLOO and PPO: users' functions
    "reward_timeout": Range(0, above=True, advice=_NONE_MEANS_NO_LIMIT),
    "tool_timeout": Range(0, above=True, advice=_NONE_MEANS_NO_LIMIT),
    "environment_timeout": Range(0, above=True, advice=_NONE_MEANS_NO_LIMIT),
    "environment_workers": COUNT,
    # GRPO and RLOO: vLLM
    "vllm_server_port": PORT,
    "vllm_group_port": PORT,
    "vllm_server_timeout": NOT_NEGATIVE,
    "teacher_server_timeout": NOT_NEGATIVE,
    "vllm_gpu_memory_utilization": Range(0, 1, above=True),
    "vllm_max_model_length": COUNT,
    "vllm_tensor_parallel_size": COUNT,
    "vllm_importance_sampling_clip_max": Range(0, above=True, advice="None is no bound"),
    "vllm_importance_sampling_clip_min": Range(0, advice="None is no bound"),
    "vllm_importance_sampling_cap": Range(0, above=True, advice="None is no bound"),
    # GRPO and RLOO: the update
    "num_iterations": COUNT,
    "epsilon": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "delta": Range(0, above=True, advice="None is no bound"),
    # Penalties have negative weights.
    "reward_weights": FINITE_LIST,
    "reward_clip_range": Range(infinite=True, many=True, advice="an infinite bound is none"),
    "sapo_temperature_neg": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
    "vespo_k_pos": NOT_NEGATIVE,
    "vespo_lambda_pos": NOT_NEGATIVE,
    "vespo_k_neg": NOT_NEGATIVE,
    "vespo_lambda_neg": NOT_NEGATIVE,
    "top_entropy_quantile": SHARE,
    "off_policy_mask_threshold": FINITE,
    "entropy_coef": FINITE,
    "entropy_coef_min": FINITE,
    "entropy_coef_max": FINITE,
    "entropy_coef_delta": NOT_NEGATIVE,
    "entropy_target": FINITE,
    # Distillation
    "DistillationConfig.beta": SHARE,
    "lmbda": SHARE,
    "teacher_top_k": COUNT,
    "loss_top_k": COUNT_FROM_0,
    "iw_opd_gamma": NOT_NEGATIVE,
    "iw_opd_epsilon": POSITIVE,
    "GKDConfig.max_completion_length": COUNT,
    "vllm_sync_frequency": COUNT,
    "uld_hybrid_matched_weight": NOT_NEGATIVE,
    "uld_hybrid_unmatched_weight": NOT_NEGATIVE,
    "uld_crossentropy_weight": NOT_NEGATIVE,
    "uld_distillation_weight": NOT_NEGATIVE,
    "uld_student_temperature": POSITIVE,
    "uld_teacher_temperature": POSITIVE,
    "log_completions_steps": COUNT,
    # SDFT and SDPO
    "distillation_alpha": SHARE,
    "distillation_topk": COUNT,
    "distillation_is_clip": Range(0, above=True, advice="None is no bound"),
    "teacher_update_rate": SHARE,
    "teacher_sync_steps": COUNT,
    "num_loss_tokens_to_skip": COUNT_FROM_0,
    "distillation_weight": SHARE,
    "success_reward_threshold": FINITE,
    "max_reprompt_len": COUNT,
    "diagnostics_warning_interval": Range(0, whole=True, advice="0 warns of nothing"),
    "diagnostics_flat_tolerance": NOT_NEGATIVE,
    # PPO
    "num_mini_batches": COUNT,
    "total_episodes": COUNT,
    "local_rollout_forward_batch_size": COUNT,
    "num_sample_generations": COUNT_FROM_0,
    "response_length": COUNT,
    "stop_token_id": COUNT_FROM_0,
    "PPOConfig.temperature": POSITIVE,
    # A*-PO
    "A2POConfig.max_completion_length": Range(1, whole=True, optional=False),
    "num_value_samples": COUNT,
    "beta1": POSITIVE,
    "beta2": POSITIVE,
    "OnlineDPOConfig.max_completion_length": COUNT,
    "missing_eos_penalty": NOT_NEGATIVE,
    "num_ppo_epochs": COUNT,
    "kl_coef": NOT_NEGATIVE,
    "kl_target": Range(0, above=True, advice="None keeps kl_coef fixed"),
    "kl_horizon": POSITIVE,
    "cliprange": POSITIVE,
    "cliprange_value": POSITIVE,
    "vf_coef": NOT_NEGATIVE,
    "gamma": SHARE,
    "lam": SHARE,
    # Mixtures of datasets
    "fraction": NOT_NEGATIVE,
    "test_split_size": Range(0, above=True, advice="below 1 a share of the rows, else their number"),
    # Adapters of the command line, and `trl-fast plan`
    "lora_r": COUNT,
    "lora_alpha": NOT_NEGATIVE,
    "lora_dropout": SHARE,
    "prompt_share": Range(0, 1, below=True),
    "num_gpus": COUNT,
    "images_per_prompt": COUNT,
    "prompt_tokens": COUNT_FROM_0,
}


def range_of(owner: type, name: str) -> Range | None:
    """Returns the range of a field of a dataclass; None if the table has none for it."""
    keys = [*(f"{each.__name__}.{name}" for each in owner.__mro__), name]
    return next((RANGES[key] for key in keys if key in RANGES), None)


def check_ranges(settings: Any) -> None:
    """Checks each field of a dataclass against its range; an integer written as a float (8.0) becomes an integer (8).

    Raises:
        ValueError: a value is out of range, NaN, infinite or no number; one line with the field, the range, the value
            and a remedy.
    """
    for item in fields(settings):
        value, allowed = getattr(settings, item.name), range_of(type(settings), item.name)
        if allowed is None:
            _check_finite(item, value)
        elif value is not None or not _takes_none(type(settings), item, allowed):
            _check(type(settings), item, value, allowed)
            if allowed.whole and not allowed.many and not isinstance(value, Integral):
                object.__setattr__(settings, item.name, int(value))


def _takes_none(owner: type, item: Field, allowed: Range) -> bool:
    if allowed.optional is not None:
        return allowed.optional
    text = annotation(owner, item)
    return "None" in text or "Optional" in text


def _check(owner: type, item: Field, value: Any, allowed: Range) -> None:
    if allowed.many and not (allowed.or_one and isinstance(value, Real)):
        good = isinstance(value, (list, tuple)) and all(each in allowed for each in value)
    else:
        good = value in allowed
    if not good:
        raise _refused(
            item, value, f"{allowed}{' or None' if _takes_none(owner, item, allowed) else ''}", allowed.advice
        )


def _check_finite(item: Field, value: Any) -> None:
    bad = next((number for number in _floats(value) if not math.isfinite(number)), None)
    if bad is not None:
        raise _refused(item, value, "finite numbers" if isinstance(value, (Mapping, list, tuple)) else str(FINITE), "")


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        yield from (number for each in value.values() for number in _floats(each))
    elif isinstance(value, (list, tuple)):
        yield from (number for each in value for number in _floats(each))


def _refused(item: Field, value: Any, expected: str, advice: str) -> ValueError:
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*(e[-+]?\d+)?", value.lower()):
        advice = "give a number, not text (YAML reads 1e-5 as text; write 1.0e-5)"
    if not advice:
        default = item.default if item.default_factory is MISSING else item.default_factory()
        advice = "give such a value" if default is MISSING else f"left out, it is {default!r}"
    return ValueError(f"{item.name}: expected {expected}, got {value!r}; {advice}")
