"""Describes what is trained, and how: all that a simulated step depends on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from transformers import PretrainedConfig

from trl_fast.data.images.inputs import ImageInput
from trl_fast.ops import HeadOptions
from trl_fast.settings.batch_layouts import LAYOUT_CHOICES
from trl_fast.settings.ranges import check_ranges
from trl_fast.trainers.base.config import BaseConfig, activation_budget
from trl_fast.trainers.methods import METHODS

from .gpu_facts import DEFAULT_CAPABILITY

# Methods of other systems' steps that a plan is compared with.
COMPARED_METHODS = ("dpo", "sft", "reward", "grpo")
# Methods whose policy samples what it learns from; of the first two, completions of a prompt are compared.
GROUP_METHODS = ("grpo", "rloo", "gmpo")
_COMPLETIONS_OF_A_ROW = {"dpo": 2, "reward": 2, "orpo": 2, "cpo": 2, "tpo": 3}
# Methods of a second model that is never the trained one without an adapter.
TEACHER_METHODS = ("distillation", "gkd", "gold", "iw_opd")
# Methods whose teacher is a server that another machine runs.
TOLD_METHODS = ("server_distillation",)
# Methods whose model is its own teacher.
SELF_TAUGHT_METHODS = ("sdft", "sdpo")
# Methods that sample several completions of a prompt, for several micro-batches.
SAMPLING_TOGETHER = (*GROUP_METHODS, *TEACHER_METHODS, *TOLD_METHODS, *SELF_TAUGHT_METHODS)
ONLINE_METHODS = (*SAMPLING_TOGETHER, "ppo", "online_dpo", "a2po")
# Their arguments that limit a completion, where those are not max_completion_length.
_LENGTH_SETTINGS = {"ppo": "response_length", "online_dpo": "max_new_tokens"}
DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("gpu", "cpu")
# Weights of linear layers in 4 or 8 bits, as bitsandbytes keeps them.
QUANTIZATIONS = ("4bit", "8bit")
# What a plan of sampled completions takes for a prompt's tokens where nothing is said.
DEFAULT_PROMPT_TOKENS = 512
# How several devices share a run where nothing is said, by its name in `sharding.SHARINGS`.
DEFAULT_ENGINE = "fsdp2"
# Whose step: ours, TRL 1.16's, or the usual one before fused heads, with the logits of a whole batch.
OURS, TRL, FULL_LOGITS = "trl_fast", "TRL", "full logits"


@dataclass(frozen=True, eq=False)
class PlannedTeacher:
    """Holds a teacher's config and the dtype of its weights, one of DTYPES."""

    config: PretrainedConfig
    dtype: str


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Describes a training run. Names and defaults are those of the trainers' arguments, where they have them.

    - `method`: one of METHODS; `system`: whose step it is, OURS, TRL or FULL_LOGITS.
    - `max_length`: tokens of every sequence, prompt and completion together.
    - `images`: those of a prompt, which its first tokens stand for.
    - `prompt_share`: which share of a sequence (dpo) or of what both texts of a pair start with (reward) is prompt.
    - `dtype`: of the weights; `bf16`: whether products are computed in bfloat16 by autocast.
    - `lora_r`: None trains all weights; `lora_target_modules`: None takes PEFT's choice for the architecture.
    - `quantization`: of frozen weights, one of QUANTIZATIONS; `nested_quantization`: of its constants too.
    - `optim`: the optimizer's name in transformers; see `planned_optimizers`.
    - `num_gpus`: devices that share the run; `engine`: how, one of `sharding.SHARINGS`.
    - `tiled_mlp`: tokens of a tile, None for whole rows.
    - `num_generations`, `beta`: None takes the method's default (grpo, rloo).
    - `steps_per_generation`: None takes the accumulation steps (grpo, rloo, distillation).
    - `teacher`: of distillation; None: one as large as the student. `lmbda`, `seq_kd`: the share of micro-batches that
      the student samples, and whether the teacher samples the others; `use_uld_loss`: gold's.
    - `loss_top_k`: server_distillation's. `use_teacher_server`: iw_opd's, whose teacher then is another machine's.
    - `teacher_model_kind`, `distillation_mode`, `distillation_topk`: sdft's and sdpo's.
    - `num_mini_batches`, `local_rollout_forward_batch_size`: ppo's.
    - `generates`: False where another process samples (vLLM).
    - `fused_head`: False takes the slow path of `modeling.scoring`, with the model's own logits.
    - `fused_layers`: whether norms, gated MLPs and so on run in one pass each; other systems' layers do not.
    - `device`: whose choices of kernels and tile sizes are simulated, one of DEVICES; `capability`: of a GPU.
    """

    config: PretrainedConfig
    method: str = "dpo"
    system: str = OURS
    max_length: int = 1024
    images: tuple[ImageInput, ...] = ()
    prompt_share: float = 0.5
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    dtype: str = "bfloat16"
    bf16: bool = True
    lora_r: int | None = None
    lora_target_modules: str | tuple[str, ...] | None = None
    lora_modules_to_save: tuple[str, ...] | None = None
    lora_exclude_modules: str | tuple[str, ...] | None = None
    use_dora: bool = False
    quantization: str | None = None
    nested_quantization: bool = False
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = True
    activation_budget_bytes: int | None = None
    activation_offloading: bool = False
    tiled_mlp: int | None = None
    batch_layout: str = "auto"
    fused_head: bool = True
    fused_layers: Literal["auto", True, False] = "auto"
    head_grad: str = "exact"
    head_workspace_bytes: int | None = None
    precompute_ref_log_probs: bool = False
    teacher: PlannedTeacher | None = None
    lmbda: float = 1.0
    seq_kd: bool = False
    use_uld_loss: bool = False
    loss_top_k: int = 1
    use_teacher_server: bool = False
    teacher_model_kind: str = "base"
    distillation_mode: str = "topk_logits"
    distillation_topk: int | None = 100
    num_generations: int | None = None
    steps_per_generation: int | None = None
    num_iterations: int = 1
    beta: float | None = None
    num_mini_batches: int = 1
    local_rollout_forward_batch_size: int = 64
    num_ppo_epochs: int = 4
    generates: bool = True
    num_gpus: int = 1
    engine: str = DEFAULT_ENGINE
    device: str = "gpu"
    capability: tuple[int, int] = DEFAULT_CAPABILITY

    def __post_init__(self) -> None:
        choices = {"method": tuple(METHODS), "dtype": DTYPES, "device": DEVICES, "batch_layout": LAYOUT_CHOICES}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization={self.quantization!r} is unknown; expected {', '.join(QUANTIZATIONS)}")
        if self.quantization is not None and self.lora_r is None:
            raise ValueError(f"weights in {self.quantization} cannot train: give use_peft=True, for an adapter")
        if self.system != OURS and self.method not in COMPARED_METHODS:
            raise ValueError(f"system={self.system!r} has no step of method={self.method!r} to compare with")
        # Other methods have no groups, and do not look at the number.
        group_method = self.method if self.method in SAMPLING_TOGETHER else GROUP_METHODS[0]
        fields = METHODS[group_method].config_class().__dataclass_fields__
        for name in ("num_generations", "beta"):
            if getattr(self, name) is None and name in fields:
                object.__setattr__(self, name, fields[name].default)
        if self.system != OURS:
            object.__setattr__(self, "fused_layers", False)
        check_ranges(self)
        HeadOptions(head_grad=self.head_grad).check(torch.device("cuda" if self.device == "gpu" else "cpu"))

    def but(self, **changes: object) -> TrainingSetup:
        """Returns the same with some fields changed."""
        return replace(self, **changes)

    @functools.cached_property
    def without_checkpointing(self) -> TrainingSetup:
        """Returns the same whose layers save all that backward needs; always the same one, as caches go by it."""
        return self.but(gradient_checkpointing=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    # What else the trainers' set-up of layers asks for.
    disable_dropout: ClassVar[bool] = True
    use_liger_kernel: ClassVar[bool] = False
    keeps_attention: ClassVar[bool] = False

    @property
    def activation_budget(self) -> int | None:
        """Returns the bytes of results that gradient checkpointing keeps, at most; only ours does. None: its default.

        On a GPU it takes for that, and for whole layers, only what a step leaves free: what the step needs is less.
        """
        if self.system != OURS or not self.gradient_checkpointing or self.device == "gpu":
            return 0
        return activation_budget(self.activation_budget_bytes, self.activation_offloading)

    @property
    def leaves_whole_layers(self) -> bool:
        """Tells whether layers are left uncheckpointed where memory holds what they save."""
        checkpoints = self.system == OURS and self.gradient_checkpointing and self.device == "gpu"
        # PPO's two models share the memory, and how they do is not planned.
        may = not self.activation_offloading and self.activation_budget_bytes != 0 and self.method != "ppo"
        return checkpoints and may

    @property
    def image_tokens(self) -> int:
        """Counts the tokens that stand for a prompt's images."""
        return sum(image.num_tokens for image in self.images)

    def prompt_tokens(self, max_length: int) -> int:
        """Returns how many tokens of a sequence are prompt: its share, and with images a token more than these."""
        return max(round(max_length * self.prompt_share), self.image_tokens + bool(self.images))

    @property
    def max_positions(self) -> int | None:
        """Returns the positions that the model was made for, if its config tells."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @functools.cached_property
    def of_teacher(self) -> TrainingSetup:
        """Returns the setup whose model is the teacher: whole weights of its own, which read the same rows."""
        own = PlannedTeacher(self.config, self.dtype) if self.teacher is None else self.teacher
        return self.but(method="sft", config=own.config, dtype=own.dtype, lora_r=None, quantization=None)

    @property
    def needs_reference_model(self) -> bool:
        """Tells whether a second model holds the weights of the reference policy, or of a teacher, during training."""
        if self.method in SELF_TAUGHT_METHODS and self.teacher_model_kind == "live":
            return False
        return self.needs_reference and (self.lora_r is None or self.has_teacher)

    @property
    def has_teacher(self) -> bool:
        """Tells whether a teacher's model stands beside the trained one."""
        return self.method in TEACHER_METHODS and not self.use_teacher_server

    @property
    def needs_reference(self) -> bool:
        """Tells whether a reference policy, or a teacher, scores during training."""
        if self.method in ("dpo", "kto", "bco"):
            return not self.precompute_ref_log_probs
        taught = self.has_teacher or self.method in SELF_TAUGHT_METHODS
        return taught or self.method in ("ppo", "online_dpo", "a2po") or self.kl_weight != 0

    @property
    def kl_weight(self) -> float:
        """Returns the weight of the KL divergence from the reference policy (grpo, rloo); 0 for other methods."""
        return self.beta if self.method in GROUP_METHODS else 0.0

    @property
    def completions_of_a_row(self) -> int:
        """Returns how many completions a row of data has, which are learned from together; 1 where it is not pairs."""
        return _COMPLETIONS_OF_A_ROW.get(self.method, 1)

    @property
    def group_size(self) -> int:
        """Returns the number of completions of a prompt that are held against each other; 1 where none are."""
        if self.method == "online_dpo":
            return 2
        return self.num_generations if self.method in SAMPLING_TOGETHER else 1

    @property
    def completions_per_generation(self) -> int:
        """Counts the completions that a process samples before it learns from them."""
        steps = self.gradient_accumulation_steps
        if self.method == "ppo":
            return self.per_device_train_batch_size * steps * self.num_mini_batches
        if self.method == "online_dpo":
            return 2 * self.per_device_train_batch_size
        if self.method == "a2po":
            return self.per_device_train_batch_size
        return self.per_device_train_batch_size * (self.steps_per_generation or steps)

    @property
    def scores_old_policy(self) -> bool:
        """Tells whether the policy that sampled scores its completions: for RLOO's rewards, and for later updates."""
        generate_every = (self.steps_per_generation or self.gradient_accumulation_steps) * self.num_iterations
        return self.method == "rloo" or self.gradient_accumulation_steps % generate_every != 0

    @property
    def head_options(self) -> HeadOptions:
        """Returns the settings of the head."""
        return HeadOptions(workspace_bytes=self.head_workspace_bytes, head_grad=self.head_grad)

    def autocast(self) -> torch.autocast:
        """Returns the context of a forward pass. Fake tensors are on the CPU."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


class ModelArguments(Protocol):
    """Names the model's arguments that a setup is made from: those of the command line's `ModelConfig`."""

    dtype: str | None
    use_peft: bool
    lora_r: int
    lora_target_modules: list[str] | str | None
    lora_modules_to_save: list[str] | None
    lora_exclude_modules: list[str] | str | None
    use_dora: bool
    load_in_4bit: bool
    load_in_8bit: bool
    use_bnb_nested_quant: bool


def setup_from_training(
    method: str,
    training_args: BaseConfig,
    model_args: ModelArguments,
    config: PretrainedConfig,
    *,
    prompt_tokens: int | None = None,
    images: tuple[ImageInput, ...] = (),
    teacher: PlannedTeacher | None = None,
    longest: int | None = None,
    device: str = "gpu",
    num_gpus: int = 1,
    engine: str = DEFAULT_ENGINE,
) -> TrainingSetup:
    """Makes the setup of the run that a training command's arguments describe; every sequence has its longest length.

    Args:
        config: of the policy, see `model_shapes.model_config`.
        prompt_tokens: how many of a sequence's tokens are prompt. None: half of them; of sampled completions
            DEFAULT_PROMPT_TOKENS, and those of images.
        images: those of a prompt; their tokens are prompt tokens.
        teacher: of a distillation; None: one as large as the policy.
        longest: tokens of the data's longest sequence, where they are known; longer ones are not planned for.
        device: whose kernels to assume, one of DEVICES; num_gpus: how many share the run; engine: how they do.

    Raises:
        ValueError: an argument is missing, out of range, or does not go with another.
    """
    given = {name: getattr(training_args, name) for name in _SAME_NAMES if hasattr(training_args, name)}
    if method not in GROUP_METHODS:
        # It is no weight of a KL term.
        given.pop("beta", None)
    image_tokens = sum(image.num_tokens for image in images)
    max_length, share = _lengths(method, training_args, prompt_tokens, longest, image_tokens)
    dtype = (training_args.model_init_kwargs or {}).get("dtype", model_args.dtype)
    quantization = "4bit" if model_args.load_in_4bit else "8bit" if model_args.load_in_8bit else None
    return TrainingSetup(
        config=config,
        method=method,
        max_length=max_length,
        images=images,
        teacher=teacher,
        prompt_share=share,
        dtype=dtype_name(dtype, config),
        # Numbers of either 16-bit autocast take the same memory.
        bf16=bool(training_args.bf16 or training_args.fp16),
        quantization=quantization,
        nested_quantization=model_args.use_bnb_nested_quant,
        optim=str(getattr(training_args.optim, "value", training_args.optim)),
        precompute_ref_log_probs=_needs_no_reference(training_args),
        # Liger's kernels, which fuse the same layers, are planned as layers that are not fused.
        fused_layers=training_args.fused_layers if not training_args.use_liger_kernel else False,
        generates=not getattr(training_args, "use_vllm", False) and _samples(training_args),
        num_gpus=num_gpus,
        engine=engine,
        device=device,
        **_adapter(model_args),
        **given,
    )


def _adapter(model_args: ModelArguments) -> dict[str, Any]:
    """Returns the fields of a setup that tell of an adapter."""
    modules, excluded = model_args.lora_target_modules, model_args.lora_exclude_modules
    return {
        "lora_r": model_args.lora_r if model_args.use_peft else None,
        "lora_target_modules": tuple(modules) if isinstance(modules, list) else modules,
        "lora_modules_to_save": tuple(model_args.lora_modules_to_save or ()) or None,
        "lora_exclude_modules": tuple(excluded) if isinstance(excluded, list) else excluded,
        "use_dora": model_args.use_dora,
    }


# Arguments of training that a setup has under their names.
_SAME_NAMES = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("activation_budget_bytes", "activation_offloading", "tiled_mlp", "batch_layout"),
    *("head_grad", "head_workspace_bytes", "beta", "num_generations", "steps_per_generation", "num_iterations"),
    *("num_mini_batches", "local_rollout_forward_batch_size", "num_ppo_epochs", "lmbda", "seq_kd", "loss_top_k"),
    *("use_uld_loss", "use_teacher_server"),
    *("teacher_model_kind", "distillation_mode", "distillation_topk"),
)


def _lengths(
    method: str, training_args: Any, prompt_tokens: int | None, longest: int | None, image_tokens: int
) -> tuple[int, float]:
    """Returns the tokens of a sequence, and the share of them that is prompt."""
    if prompt_tokens is not None and prompt_tokens <= image_tokens > 0:
        raise ValueError(f"prompt_tokens={prompt_tokens}: the images of a prompt have {image_tokens} tokens")
    if method in ONLINE_METHODS:
        prompt = DEFAULT_PROMPT_TOKENS + image_tokens if prompt_tokens is None else prompt_tokens
        name = _LENGTH_SETTINGS.get(method, "max_completion_length")
        completion = getattr(training_args, name)
        if completion is None:
            raise ValueError(f"{name} is unset, so completions have no limit; give the length to plan for")
        if prompt < 1:
            raise ValueError(f"prompt_tokens={prompt}: a completion is sampled from at least one token")
        return prompt + completion, prompt / (prompt + completion)
    length = training_args.max_length
    if longest is not None:
        length = max(2, longest if length is None else min(length, longest))
    if length is None:
        raise ValueError("max_length is unset, so sequences have no limit; give the length to plan for")
    if length < 2:
        raise ValueError(f"max_length={length}: expected at least 2 tokens")
    if image_tokens and length < image_tokens + 2:
        raise ValueError(f"max_length={length} cuts the images of a sequence, which have {image_tokens} tokens")
    if prompt_tokens is None:
        return length, 0.5
    if method == "sft":
        raise ValueError(
            f"prompt_tokens={prompt_tokens} has no meaning for sft, which learns whole sequences; leave it out"
        )
    if not 0 <= prompt_tokens < length:
        raise ValueError(f"prompt_tokens={prompt_tokens}: expected a number from 0 to below max_length={length}")
    return length, prompt_tokens / length


def dtype_name(dtype: str | torch.dtype | None, config: PretrainedConfig) -> str:
    """Returns the name of the weights' dtype; "auto": the one that the model's config names."""
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None) or torch.float32
    return str(dtype).removeprefix("torch.")


def _needs_no_reference(training_args: Any) -> bool:
    """Says whether a method with a reference has its scores before training, or takes zeros for them."""
    return any(getattr(training_args, name, None) for name in ("precompute_ref_log_probs", "reference_free"))


def _samples(training_args: Any) -> bool:
    """Says whether completions are sampled at all: distillation may take those of its dataset."""
    return getattr(training_args, "lmbda", 1.0) > 0 or bool(getattr(training_args, "seq_kd", False))
