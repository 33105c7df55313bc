"""Defines DPOConfig: TRL's arguments and defaults, and the names that older scripts use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_fast.settings.batch_layouts import PACKED, PADDED
from trl_fast.settings.choices import TRUNCATION_MODES, check_choice
from trl_fast.settings.older_names import deprecated, older_name

from .base.preference_config import PreferenceConfig

if TYPE_CHECKING:
    from trl_fast.losses.dpo import DPOLossConfig


@dataclass
class DPOConfig(PreferenceConfig):
    """Holds the arguments of DPOTrainer. Those of the loss are explained in `trl_fast.losses.dpo`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which end of a sequence longer than max_length stays.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    padding_free: bool = field(default=False, metadata={"help": "The same as batch_layout=packed."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One loss or several: sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, "
        "aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm."},
    )  # fmt: skip
    loss_weights: list[float] | None = field(default=None, metadata={"help": "One weight a loss; default 1 each."})
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight in [0, 1] of tokens beyond the length both completions have."}
    )
    f_divergence_type: str = field(
        default="reverse_kl", metadata={"help": "reverse_kl, forward_kl, js_divergence or alpha_divergence."}
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "The alpha of alpha_divergence."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Noise rate of the robust, exo_pair, aot losses."})
    use_weighting: bool = field(default=False, metadata={"help": "WPO: weight pairs by the policy's likelihood."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss's mixture."})

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
