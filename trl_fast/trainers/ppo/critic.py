"""PPO's other models: the value model that is trained beside the policy, and what rewards completions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import TokenBatch
from trl_fast.modeling.checkpointing import enable_checkpointing
from trl_fast.modeling.classifier_head import attach_classifier_head, read_head, state_batch
from trl_fast.modeling.layouts import LayoutRequest, choose_layout_or_pad
from trl_fast.modeling.loading import base_model, is_quantized, load_reward_model
from trl_fast.modeling.reference_policy import freeze
from trl_fast.modeling.value_model import check_classifier
from trl_fast.rollout import RewardFunctions
from trl_fast.rollout.samples import Samples
from trl_fast.rollout.token_rewards import TokenRewardModel

from ..base.model_setup import set_up_layers
from .config import PPOConfig

RewardSource = Callable[..., list] | str | PreTrainedModel
WEIGHTS_FILE = "model.safetensors"


def load_reward_source(name_or_path: str, args: PPOConfig) -> PreTrainedModel:
    """A reward model by name, as `model_init_kwargs` say; where they are silent, its own dtype, on one device.

    Raises:
        ValueError, OSError: as in `modeling.loading.load_reward_model`.
    """
    given = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    return load_reward_model(name_or_path, **{"dtype": "auto", "device_map": None, **given})


def make_reward_functions(
    reward_model: RewardSource | list[RewardSource] | None,
    processing_class: PreTrainedTokenizerBase,
    args: PPOConfig,
    sequences: list[list[int]],
) -> RewardFunctions:
    """What gives completions their rewards: models that read the policy's tokens, and functions as GRPO takes them.

    sequences: a few, to try models out on.

    Raises:
        ValueError, TypeError: there is nothing, or a model or function is not of the right kind.
    """
    if reward_model is None:
        raise ValueError(
            "reward_model is missing; give a sequence classifier with num_labels=1, its name, or reward functions"
        )
    sources: list[Any] = []
    for source in reward_model if isinstance(reward_model, list | tuple) else [reward_model]:
        if isinstance(source, str):
            source = load_reward_source(source, args)
        if isinstance(source, torch.nn.Module):
            check_classifier(base_model(source), "reward_model", len(processing_class))
            model = freeze(source) if is_quantized(source) else freeze(source).to(args.device)
            size = args.local_rollout_forward_batch_size
            source = TokenRewardModel(model, args.batch_layout, processing_class.pad_token_id, sequences, size)
        elif not callable(source):
            raise TypeError(
                "reward_model: expected a classifier of transformers, its name, functions, or a list of those, got "
                f"{type(source).__name__}"
            )
        sources.append(source)
    return RewardFunctions(sources, device=args.device)


class Critic:
    """The value model: prepared as the policy is, in the best batch layout that it runs.

    Args:
        model: a sequence classifier with one label, or a PeftModel of one.
        args: the trainer's.
        processing_class: the policy's tokenizer.
        sequences: a few, to try the model out on.

    Raises:
        ValueError, TypeError: the model is not of the right kind.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        sequences: list[list[int]],
    ) -> None:
        inner = base_model(model)
        check_classifier(inner, "value_model", len(processing_class))
        self.pad_token_id = processing_class.pad_token_id
        inner.config.get_text_config().pad_token_id = self.pad_token_id
        attach_classifier_head(inner)
        set_up_layers(model, args)
        request = LayoutRequest(args.batch_layout, without_dropout=args.disable_dropout)
        self.layout = choose_layout_or_pad(inner, request, sequences)
        if args.gradient_checkpointing:
            enable_checkpointing(inner, dict(args.gradient_checkpointing_kwargs or {}) or None)
            if isinstance(model, PeftModel):
                model.enable_input_require_grads()
        self.plain = model.train()
        self.model: torch.nn.Module = model
        self.device = args.device

    def prepare(self, accelerator: Accelerator) -> None:
        """Moves the model to its device and wraps it for mixed precision and several processes."""
        self.model = accelerator.prepare_model(self.plain)

    def batch(self, samples: Samples, has_end: torch.Tensor) -> TokenBatch:
        """The batch that `values` reads at every state of the samples (`losses.ppo.States`)."""
        return state_batch(samples.batch(self.layout, self.pad_token_id), has_end).to(self.device)

    def values(self, batch: TokenBatch) -> torch.Tensor:
        """Values (M,) float32 of the batch's states; differentiable."""
        return read_head(self.model, batch)

    @torch.no_grad()
    def score(self, samples: Samples, has_end: torch.Tensor, size: int) -> list[torch.Tensor]:
        """Values of each completion's states, `size` completions at a time; vectors on the CPU."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
        order = samples.grouped(range(len(samples)))
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            values = self.values(self.batch(samples.select(chunk), has_end[chunk])).cpu()
            counts = [len(samples.completion_ids[index]) + int(has_end[index]) for index in chunk]
            for index, part in zip(chunk, values.split(counts), strict=True):
                found[index] = part
        return found

    def save(self, folder: Path) -> None:
        """Writes the model into a folder of its own, from which `from_pretrained` loads a plain one too."""
        folder.mkdir(parents=True, exist_ok=True)
        base_model(self.plain).config.save_pretrained(folder)
        save_model(self.plain, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Takes the weights over that `save` wrote.

        Raises:
            ValueError: there are none.
        """
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: {folder.parent} has no value model ({path.name} in {folder})")
        load_model(self.plain, path)
