"""Defines what the configs of DPO and KTO share: preference data and a reference."""

from __future__ import annotations

from dataclasses import dataclass

from trl_fast.settings.older_names import older_name

from .reference_config import ReferenceConfig


@dataclass
class PreferenceConfig(ReferenceConfig):
    """Holds the arguments of a trainer on preference data, whose reference may be scored beforehand.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    precompute_ref_log_probs: bool = False
    """Score the datasets with the reference once, before training, and cache the log-probabilities.

    The reference then needs no memory during training.
    """

    precompute_ref_batch_size: int | None = None
    """Batch size of that scoring. None: the per-device batch size of training or evaluation."""

    beta: float = 0.1
    """How strongly the reference holds the policy back; higher: the policy stays closer to it."""

    # Names of older TRL versions.
    max_prompt_length: int | None = older_name(
        "it works (longer prompts lose their beginning); max_length alone is the present way."
    )
    max_completion_length: int | None = older_name(
        "it works (longer completions lose their end); max_length alone is the present way."
    )
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder=True: encoder-decoder models are not supported, only causal ones")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model=True changes the reference during training, so precompute_ref_log_probs=True would "
                "use stale numbers; switch one of them off"
            )
