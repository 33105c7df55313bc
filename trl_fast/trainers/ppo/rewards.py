"""Makes PPO's reward sources: models that read the policy's tokens, and functions as GRPO takes them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.losses.advantages import summed_rewards
from trl_fast.modeling.loading import base_model, is_quantized, load_reward_model
from trl_fast.modeling.reference_policy import freeze
from trl_fast.modeling.value_model import check_classifier
from trl_fast.rollout import GivenReward, RewardFunctions, RewardSource
from trl_fast.rollout.token_rewards import TokenRewardModel

from .config import PPOConfig


class CompleteRewards(RewardFunctions):
    """Asks reward sources, without gradient, which have to give every completion a number."""

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns rewards (N, R) float32 on the CPU, as `RewardFunctions` does.

        Raises:
            RuntimeError: a source raised; its own error is the cause.
            ValueError: as in `RewardFunctions`, or a completion got no number from any source.
        """
        rewards = super().__call__(*args, **kwargs).cpu()
        missing = summed_rewards(rewards, self.weights.cpu()).isnan()
        if missing.any():
            raise ValueError(
                f"reward_model: {', '.join(self.names)} returned None for completion "
                f"{missing.nonzero()[0].item()}; PPO needs a number for each"
            )
        return rewards


def load_reward_by_name(name_or_path: str, args: PPOConfig) -> PreTrainedModel:
    """Loads a reward model as `model_init_kwargs` say; where they are silent, in its own dtype, on one device.

    Raises:
        ValueError, OSError: as in `modeling.loading.load_reward_model`.
    """
    given = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    return load_reward_model(name_or_path, **{"dtype": "auto", "device_map": None, **given})


def make_rewards(
    reward_model: GivenReward | list[GivenReward] | None,
    processing_class: PreTrainedTokenizerBase,
    args: PPOConfig,
    sequences: list[list[int]],
    vocab_size: int,
) -> CompleteRewards:
    """Makes the reward sources.

    sequences: a few, to try models out on. vocab_size: the tokens that the policy may sample.

    Raises:
        ValueError, TypeError: there is nothing, or a model or function is not of the right kind.
    """
    if reward_model is None:
        raise ValueError(
            "reward_model is missing; give a sequence classifier with num_labels=1, its name, or reward functions"
        )
    sources: list[RewardSource] = []
    for source in reward_model if isinstance(reward_model, list | tuple) else [reward_model]:
        if isinstance(source, str):
            source = load_reward_by_name(source, args)
        if isinstance(source, torch.nn.Module):
            check_classifier(base_model(source), "reward_model", vocab_size)
            model = freeze(source) if is_quantized(source) else freeze(source).to(args.device)
            size = args.local_rollout_forward_batch_size
            source = TokenRewardModel(model, args.batch_layout, processing_class.pad_token_id, sequences, size)
        elif not callable(source):
            raise TypeError(
                "reward_model: expected a classifier of transformers, its name, functions, or a list of those, got "
                f"{type(source).__name__}"
            )
        sources.append(source)
    return CompleteRewards(sources, device=args.device, timeout=args.reward_timeout)
