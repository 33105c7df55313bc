"""Defines what the configs of GRPO and RLOO share: groups, rewards, and when completions are made."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_fast.settings.older_names import older_name

from ..base.reference_config import ReferenceConfig
from .group_config import RewardedGroupConfig

logger = logging.getLogger(__name__)


@dataclass
class OnlineConfig(RewardedGroupConfig, ReferenceConfig):
    """Holds the arguments of the methods that compare completions of their own policy.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio"),
        *("loss", "grad_norm", "learning_rate"),
    )

    cast_lm_head_to_fp32: bool = False
    """Keep the head's weights in float32 and compute its logits in float32."""

    # transformers' continuous batching.
    use_transformers_continuous_batching: bool = False
    """Has no effect, and a line says so: generation computes each prompt once for all of its completions by itself."""

    transformers_continuous_batching_config: dict[str, Any] | str | None = None
    """Has no effect: see use_transformers_continuous_batching."""

    # The update.
    beta: float = 0.0
    """Weight of the KL divergence from the reference; 0: none, and no reference is loaded."""

    skip_zero_advantages: bool = True
    """Leave completions whose gradient is zero out of the update.

    Their advantage is zero, and there is no KL or entropy term. Losses and gradients are the same; the entropy metric
    is that of the others.
    """

    keep_groups_together: bool = True
    """Put completions of a prompt into one micro-batch, so that the prompt is computed once.

    This is done where the gradient of a step is the same anyway. Metrics that are means over micro-batches differ a
    little.
    """

    # Names of older TRL versions, and of other methods.
    max_new_tokens: int | None = older_name(now="max_completion_length")
    max_prompt_length: int | None = older_name("it works (longer prompts lose their beginning).")
    use_liger_loss: bool | None = older_name("the fused head is always on, so it has no effect.")
    wandb_log_unique_prompts: bool | None = older_name(now="log_unique_prompts")
    vllm_guided_decoding_regex: str | None = older_name(now="vllm_structured_outputs_regex")
    use_transformers_paged: bool | None = older_name(now="use_transformers_continuous_batching")

    _VALID_DICT_FIELDS = [
        *RewardedGroupConfig._VALID_DICT_FIELDS,
        *("ref_model_init_kwargs", "transformers_continuous_batching_config"),
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_transformers_continuous_batching:
            logger.warning(
                "use_transformers_continuous_batching=True has no effect: generation computes each prompt once for "
                "all of its completions by itself. Completions are of the same distribution."
            )
        if self.sync_ref_model and self.beta == 0:
            raise ValueError(
                f"sync_ref_model=True with beta={self.beta}: without a KL term there is no reference model to sync; "
                "set beta above 0 or sync_ref_model=False"
            )
