"""DPOConfig: TRL's arguments and defaults, and the names that older scripts use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl_fast.losses.dpo import DPOLossConfig

from .base_config import BaseConfig, deprecated, older_name


@dataclass
class DPOConfig(BaseConfig):
    """Arguments of DPOTrainer. Those of the loss are explained in `trl_fast.losses.dpo`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which end of a sequence longer than max_length stays.",
            "choices": ["keep_start", "keep_end"],
        },
    )
    padding_free: bool = field(default=False, metadata={"help": "The same as batch_layout=packed."})
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Score the datasets with the reference once, before training, and cache the numbers."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size for that; default: the per-device batch size."}
    )
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
    beta: float = field(default=0.1, metadata={"help": "How strongly the reference holds the policy back."})
    use_weighting: bool = field(default=False, metadata={"help": "WPO: weight pairs by the policy's likelihood."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss's mixture."})
    sync_ref_model: bool = field(default=False, metadata={"help": "TR-DPO: let the reference follow the policy."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "The policy's share when it follows."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two such updates."})

    # Names of older TRL versions.
    max_prompt_length: int | None = older_name(
        "it works (longer prompts lose their beginning); max_length alone is the present way."
    )
    max_completion_length: int | None = older_name(
        "it works (longer completions lose their end); max_length alone is the present way."
    )
    max_target_length: int | None = older_name(
        "it works (longer completions lose their end); max_length alone is the present way.",
        now="max_completion_length",
    )
    reference_free: bool | None = older_name("it works (the reference log-probs are zero).")
    ref_model_init_kwargs: dict[str, Any] | str | None = older_name("it works for a ref_model given by name.")
    model_adapter_name: str | None = older_name("it works (the adapter is made active).")
    ref_adapter_name: str | None = older_name("it works (the adapter is the reference policy).")
    rpo_alpha: float | None = older_name("it became loss_type=[..., 'sft'] with loss_weights=[..., rpo_alpha].")
    label_pad_token_id: int | None = older_name("completions are found by length, so it has no effect.")
    padding_value: int | None = older_name("padding is masked by length, so it has no effect.")
    use_logits_to_keep: bool | None = older_name("only scored positions ever reach the head, so it has no effect.")
    base_model_attribute_name: str | None = older_name("the backbone is found by itself, so it has no effect.")
    use_liger_loss: bool | None = older_name("the fused head is always on, so it has no effect.")
    force_use_ref_model: bool | None = older_name("an explicit ref_model is always used, so it has no effect.")
    generate_during_eval: bool | None = older_name(
        "evaluation does not generate, so it has no effect; add a LogCompletionsCallback."
    )
    is_encoder_decoder: bool | None = older_name("only False works.")
    tools: list[str] | None = older_name("give them in the dataset's column 'tools'.")

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["ref_model_init_kwargs"]

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        self._translate_older_names()
        self._check_choice("truncation_mode", ("keep_start", "keep_end"))
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model=True changes the reference during training, so precompute_ref_log_probs=True would "
                "use stale numbers; switch one of them off"
            )
        self.loss_config()

    def _translate_older_names(self) -> None:
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder=True: encoder-decoder models are not supported, only causal ones")
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
            if self.batch_layout == "padded":
                raise ValueError("padding_free=True contradicts batch_layout='padded'; choose one of them")
            self.batch_layout = "packed"

    def loss_config(self) -> DPOLossConfig:
        """The part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
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
