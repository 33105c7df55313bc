"""Defines DPOConfig: TRL's arguments and defaults, and the names that older scripts use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trl_fast.settings.batch_layouts import PACKED, PADDED
from trl_fast.settings.choices import TRUNCATION_MODES, check_choice, one_of
from trl_fast.settings.older_names import deprecated, older_name

from .base.preference_config import PreferenceConfig

if TYPE_CHECKING:
    from trl_fast.losses.dpo import DPOLossConfig


@dataclass
class DPOConfig(PreferenceConfig):
    """Holds the arguments of DPOTrainer: learning from pairs of a chosen and a rejected completion.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`; `beta` and `loss_type`,
    which are explained in `trl_fast.losses.dpo`; `precompute_ref_log_probs` to save the reference's memory.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    unit: ClassVar[str] = "pairs"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen"),
        *("grad_norm", "learning_rate", "eval_loss"),
    )

    truncation_mode: str = one_of(TRUNCATION_MODES, default="keep_start")
    """Which end of a sequence longer than max_length stays: keep_start or keep_end."""

    padding_free: bool = False
    """The same as batch_layout='packed': one row without padding."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    """Loss, or several that are added up with loss_weights.

    sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
    discopop, sft, sigmoid_norm.
    """

    loss_weights: list[float] | None = None
    """Weights of the losses, one for each of loss_type. None: 1 each."""

    ld_alpha: float | None = None
    """LD-DPO: weight in [0, 1] of the tokens beyond the length that both completions have. None: 1."""

    f_divergence_type: str = "reverse_kl"
    """Divergence from the reference: reverse_kl, forward_kl, js_divergence or alpha_divergence.

    Others than reverse_kl go with the losses of the reward difference: sigmoid, sigmoid_norm, hinge, ipo, exo_pair,
    robust, discopop, sft.
    """

    f_alpha_divergence_coef: float = 0.5
    """The alpha of f_divergence_type='alpha_divergence'."""

    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be flipped, in [0, 0.5): for the robust, exo_pair and aot losses."""

    use_weighting: bool = False
    """WPO: weight pairs by the policy's length-normalised likelihood of them (arXiv 2406.11827)."""

    discopop_tau: float = 0.05
    """Temperature of the mixture in the discopop loss."""

    # Names of older TRL versions.
    max_target_length: int | None = older_name(
        "it works (longer completions lose their end); max_length alone is the present way.",
        now="max_completion_length",
    )
    reference_free: bool | None = older_name("it works (the reference log-probs are zero).")
    rpo_alpha: float | None = older_name("it became loss_type=[..., 'sft'] with loss_weights=[..., rpo_alpha].")
    tools: list[str] | None = older_name("give them in the dataset's column 'tools'.")

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        self._translate_older_names()
        check_choice(self, "truncation_mode")
        self.loss_config()

    def _translate_older_names(self) -> None:
        if self.tools is not None:
            raise ValueError("tools: give them in the dataset's column 'tools', a list or JSON for each row")
        if self.rpo_alpha is not None:
            weights = list(self.loss_weights or [1.0] * len(self.loss_type))
            self.loss_type = [*self.loss_type, "sft"]
            self.loss_weights = [*weights, self.rpo_alpha]
            self.rpo_alpha = None
        if self.truncation_mode == "keep_end":
            deprecated(
                type(self).__name__, "truncation_mode='keep_end'", "it works; 'keep_start' is the present default."
            )
        if self.padding_free:
            if self.batch_layout == PADDED:
                raise ValueError("padding_free=True contradicts batch_layout='padded'; choose one of them")
            self.batch_layout = PACKED

    def loss_config(self) -> DPOLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
        from trl_fast.losses.dpo import DPOLossConfig

        return DPOLossConfig(
            loss_type=tuple(self.loss_type),
            loss_weights=self.loss_weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
            discopop_tau=self.discopop_tau,
        )
