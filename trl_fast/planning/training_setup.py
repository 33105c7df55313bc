"""What is trained, and how: all that a simulated step depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from trl_fast.modeling.selective_checkpointing import DEFAULT_BUDGET_BYTES
from trl_fast.ops.linear_logprob import DEFAULT_SPARSE_THRESHOLD, check_head_grad
from trl_fast.settings.batch_layouts import LAYOUT_CHOICES
from trl_fast.settings.ranges import check_ranges
from trl_fast.trainers.base.config import activation_budget

METHODS = ("dpo", "sft", "reward")
DTYPES = ("bfloat16", "float32")
DEVICES = ("gpu", "cpu")
# Whose step: ours, TRL 1.16's, or the usual one before fused heads, with the logits of a whole batch.
OURS, TRL, FULL_LOGITS = "trl_fast", "TRL", "full logits"


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """A training run. The names and defaults are those of the trainers' arguments, where they have them.

    - `method`: one of METHODS; `system`: whose step it is, OURS, TRL or FULL_LOGITS.
    - `prompt_share`: which share of a sequence (dpo) or of what both texts of a pair start with (reward) is prompt.
    - `dtype`: of the weights; `bf16`: whether products are computed in bfloat16 by autocast.
    - `lora_r`: None trains all weights; `lora_target_modules`: None takes PEFT's choice for the architecture.
    - `tiled_mlp`: tokens of a tile, None for whole rows.
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
    device: str = "gpu"

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "dtype": DTYPES, "device": DEVICES, "batch_layout": LAYOUT_CHOICES}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}")
        check_ranges(self)
        check_head_grad(
            self.head_grad, DEFAULT_SPARSE_THRESHOLD, torch.device("cuda" if self.device == "gpu" else "cpu")
        )

    def but(self, **changes: object) -> TrainingSetup:
        """The same with some fields changed."""
        return replace(self, **changes)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    @property
    def activation_budget(self) -> int:
        """Bytes of results that gradient checkpointing keeps, at most; only ours does.

        On a GPU it takes for that, and for whole layers, only what a step leaves free: what the step needs is less.
        """
        if self.system != OURS or not self.gradient_checkpointing or self.device == "gpu":
            return 0
        budget = activation_budget(self.activation_budget_bytes, self.activation_offloading)
        return DEFAULT_BUDGET_BYTES if budget is None else budget

    @property
    def leaves_whole_layers(self) -> bool:
        """Whether layers are left uncheckpointed where memory holds what they save."""
        checkpoints = self.system == OURS and self.gradient_checkpointing and self.device == "gpu"
        return checkpoints and not self.activation_offloading and self.activation_budget_bytes != 0

    @property
    def max_positions(self) -> int | None:
        """The positions that the model was made for, if its config tells."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def needs_reference_model(self) -> bool:
        """Whether a second model holds the reference policy's weights during training."""
        return self.method == "dpo" and self.lora_r is None and not self.precompute_ref_log_probs

    def autocast(self) -> torch.autocast:
        """The context of a forward pass. Fake tensors are on the CPU."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)
