"""Prepares, runs and saves PPO's value model, which is trained beside the policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import TokenBatch
from trl_fast.modeling.adapters import adapter_refusal, check_reads_last_token
from trl_fast.modeling.checkpointing import enable_checkpointing
from trl_fast.modeling.classifier_head import attach_classifier_head, read_head, state_batch
from trl_fast.modeling.layouts import LayoutRequest, choose_layout_or_pad
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.value_model import check_classifier, make_value_model
from trl_fast.parallel.agreement import together
from trl_fast.rollout.samples import Samples

from ..base.model_setup import set_up_layers
from ..checkpoints.parts import WEIGHTS_FILE, WeightsPart
from .config import PPOConfig

VALUE_FOLDER = "value_model"


class Critic:
    """Holds the value model, set up as the policy is, in the best batch layout that it runs.

    Args:
        model: a sequence classifier with one label, or a PeftModel of one.
        args: the trainer's.
        processing_class: the policy's tokenizer.
        sequences: a few, to try the model out on.
        vocab_size: the tokens that the policy may sample.

    Raises:
        ValueError, TypeError: the model is not of the right kind.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        sequences: list[list[int]],
        vocab_size: int,
    ) -> None:
        inner = base_model(model)
        check_classifier(inner, "value_model", vocab_size)
        self.pad_token_id = processing_class.pad_token_id
        inner.config.get_text_config().pad_token_id = self.pad_token_id
        attach_classifier_head(inner)
        together(lambda: set_up_layers(model, args))
        check_reads_last_token(model)
        request = LayoutRequest(
            args.batch_layout, without_dropout=args.disable_dropout, pads_because=adapter_refusal(model)
        )
        self.layout = choose_layout_or_pad(inner, request, sequences)
        if args.gradient_checkpointing:
            enable_checkpointing(inner, dict(args.gradient_checkpointing_kwargs or {}) or None)
            if isinstance(model, PeftModel):
                model.enable_input_require_grads()
        self.plain = model.train()
        self.call: Callable[..., torch.Tensor] = model
        self.device = args.device
        self._writes = args.should_save

    def join(self, call: Callable[..., torch.Tensor], accelerator: Accelerator) -> None:
        """Has the model called by `call`, as a part of what the accelerator prepares.

        call: returns the numbers (M,) of the head at the M tokens that its keywords mark.
        """
        self.call = call
        self._weights = WeightsPart(VALUE_FOLDER, self.plain, accelerator, writes=self._writes)

    def trained_weights(self) -> dict[str, torch.nn.Parameter]:
        """Returns the weights that are trained, by name."""
        return {name: weight for name, weight in self.plain.named_parameters() if weight.requires_grad}

    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Raises ValueError if a user's optimizer, None for none, lacks weights of the value model."""
        if optimizer is None:
            return
        known = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if not all(id(weight) in known for weight in self.trained_weights().values()):
            raise ValueError("optimizers: the optimizer lacks weights of value_model; give it those of both models")

    def batch(self, samples: Samples, has_end: torch.Tensor) -> TokenBatch:
        """Returns the batch that `values` reads at every state of S samples; has_end: (S,) bool, as in `States`."""
        return state_batch(samples.batch(self.layout, self.pad_token_id), has_end).to(self.device)

    def values(self, batch: TokenBatch) -> torch.Tensor:
        """Computes the values (M,) float32 of the batch's states; differentiable."""
        return read_head(self.call, batch)

    @torch.no_grad()
    def score(self, samples: Samples, has_end: torch.Tensor, size: int) -> list[torch.Tensor]:
        """Computes the values of the states of S completions, `size` at a time, as float32 vectors on the CPU.

        has_end: (S,) bool, as in `losses.ppo.States`.
        """
        found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
        order = samples.grouped(range(len(samples)))
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            values = self.values(self.batch(samples.select(chunk), has_end[chunk])).cpu()
            counts = [len(samples.completion_ids[index]) + int(has_end[index]) for index in chunk]
            for index, part in zip(chunk, values.split(counts), strict=True):
                found[index] = part
        return found

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the model into a folder of its own, from which `from_pretrained` loads a plain one too."""
        self._weights.save_to_checkpoint(folder)
        if self._writes:
            base_model(self.plain).config.save_pretrained(folder / VALUE_FOLDER)

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the weights.

        Raises:
            ValueError: there are none.
        """
        path = folder / VALUE_FOLDER / WEIGHTS_FILE
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: {folder} has no value model ({path.name} in {path.parent})")
        self._weights.load_from_checkpoint(folder)


def value_model_like(reward_model: object, policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Makes a value model: a copy of the reward model; if that is no single model, of the policy, with a new head."""
    known = reward_model if isinstance(reward_model, PreTrainedModel) else None
    return make_value_model(base_model(policy), known)
