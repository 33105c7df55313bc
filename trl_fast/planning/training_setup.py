"""Describes what is trained, and how: all that a simulated step depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import PretrainedConfig

from trl_fast.modeling.selective_checkpointing import DEFAULT_BUDGET_BYTES
from trl_fast.ops import HeadOptions
from trl_fast.settings.batch_layouts import LAYOUT_CHOICES
from trl_fast.settings.ranges import check_ranges
from trl_fast.trainers.base.config import activation_budget
from trl_fast.trainers.methods import METHODS

# Methods of other systems' steps that a plan is compared with.
COMPARED_METHODS = ("dpo", "sft", "reward")
# Methods whose policy samples what it learns from; of the first two, completions of a prompt are compared.
GROUP_METHODS = ("grpo", "rloo")
ONLINE_METHODS = (*GROUP_METHODS, "ppo")
DTYPES = ("bfloat16", "float32")
DEVICES = ("gpu", "cpu")
# Whose step: ours, TRL 1.16's, or the usual one before fused heads, with the logits of a whole batch.
OURS, TRL, FULL_LOGITS = "trl_fast", "TRL", "full logits"


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Describes a training run. Names and defaults are those of the trainers' arguments, where they have them.

    - `method`: one of METHODS; `system`: whose step it is, OURS, TRL or FULL_LOGITS.
    - `prompt_share`: which share of a sequence (dpo) or of what both texts of a pair start with (reward) is prompt.
    - `dtype`: of the weights; `bf16`: whether products are computed in bfloat16 by autocast.
    - `lora_r`: None trains all weights; `lora_target_modules`: None takes PEFT's choice for the architecture.
    - `tiled_mlp`: tokens of a tile, None for whole rows.
    - `num_generations`, `beta`: None takes the method's default (grpo, rloo).
    - `steps_per_generation`: None takes the accumulation steps (grpo, rloo).
    - `num_mini_batches`, `local_rollout_forward_batch_size`: ppo's.
    - `fused_head`: False takes the slow path of `modeling.scoring`, with the model's own logits.
    - `device`: whose choices of kernels and tile sizes are simulated, one of DEVICES.
    """

    config: PretrainedConfig
    method: str = "dpo"
    system: str = OURS
    prompt_share: float = 0.5
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    dtype: str = "bfloat16"
    bf16: bool = True
    lora_r: int | None = None
    lora_target_modules: str | tuple[str, ...] | None = None
    gradient_checkpointing: bool = True
    activation_budget_bytes: int | None = None
    activation_offloading: bool = False
    tiled_mlp: int | None = None
    batch_layout: str = "auto"
    fused_head: bool = True
    head_grad: str = "exact"
    head_workspace_bytes: int | None = None
    precompute_ref_log_probs: bool = False
    num_generations: int | None = None
    steps_per_generation: int | None = None
    num_iterations: int = 1
    beta: float | None = None
    num_mini_batches: int = 1
    local_rollout_forward_batch_size: int = 64
    device: str = "gpu"

    def __post_init__(self) -> None:
        choices = {"method": tuple(METHODS), "dtype": DTYPES, "device": DEVICES, "batch_layout": LAYOUT_CHOICES}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}")
        if self.system != OURS and self.method not in COMPARED_METHODS:
            raise ValueError(f"system={self.system!r} has no step of method={self.method!r} to compare with")
        # Other methods have no groups, and do not look at the number.
        group_method = self.method if self.method in GROUP_METHODS else GROUP_METHODS[0]
        for name in ("num_generations", "beta"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, METHODS[group_method].config_class().__dataclass_fields__[name].default)
        check_ranges(self)
        HeadOptions(head_grad=self.head_grad).check(torch.device("cuda" if self.device == "gpu" else "cpu"))

    def but(self, **changes: object) -> TrainingSetup:
        """Returns the same with some fields changed."""
        return replace(self, **changes)

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
    def activation_budget(self) -> int:
        """Returns the bytes of results that gradient checkpointing keeps, at most; only ours does.

        On a GPU it takes for that, and for whole layers, only what a step leaves free: what the step needs is less.
        """
        if self.system != OURS or not self.gradient_checkpointing or self.device == "gpu":
            return 0
        budget = activation_budget(self.activation_budget_bytes, self.activation_offloading)
        return DEFAULT_BUDGET_BYTES if budget is None else budget

    @property
    def leaves_whole_layers(self) -> bool:
        """Tells whether layers are left uncheckpointed where memory holds what they save."""
        checkpoints = self.system == OURS and self.gradient_checkpointing and self.device == "gpu"
        # PPO's two models share the memory, and how they do is not planned.
        may = not self.activation_offloading and self.activation_budget_bytes != 0 and self.method != "ppo"
        return checkpoints and may

    @property
    def max_positions(self) -> int | None:
        """Returns the positions that the model was made for, if its config tells."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def needs_reference_model(self) -> bool:
        """Tells whether a second model holds the reference policy's weights during training."""
        return self.needs_reference and self.lora_r is None

    @property
    def needs_reference(self) -> bool:
        """Tells whether a reference policy scores during training."""
        if self.method in ("dpo", "kto"):
            return not self.precompute_ref_log_probs
        return self.method == "ppo" or self.kl_weight != 0

    @property
    def kl_weight(self) -> float:
        """Returns the weight of the KL divergence from the reference policy (grpo, rloo); 0 for other methods."""
        return self.beta if self.method in GROUP_METHODS else 0.0

    @property
    def group_size(self) -> int:
        """Returns the number of completions of a prompt (grpo, rloo); 1 for other methods."""
        return self.num_generations if self.method in GROUP_METHODS else 1

    @property
    def completions_per_generation(self) -> int:
        """Counts the completions that a process samples before it learns from them."""
        steps = self.gradient_accumulation_steps
        if self.method == "ppo":
            return self.per_device_train_batch_size * steps * self.num_mini_batches
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
