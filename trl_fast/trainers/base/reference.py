"""Makes the reference policy of a trainer, prepares it as the policy is, and scores with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from trl_fast.data import TokenBatch
from trl_fast.modeling.layouts import ChosenLayout, choose_layout_or_pad
from trl_fast.modeling.loading import base_model, load_causal_lm
from trl_fast.modeling.reference_policy import copy_adapter_as_reference, copy_as_reference, freeze, reference_scope
from trl_fast.modeling.scoring import ModelScores, attach_scoring, score
from trl_fast.modeling.segment_attention import follow_attention
from trl_fast.ops import TokenScores
from trl_fast.parallel.agreement import together
from trl_fast.parallel.engines import prepare_frozen
from trl_fast.settings.batch_layouts import AUTO, PADDED

from ..checkpoints.parts import WeightsPart
from .callbacks import SyncRefModelCallback
from .images import share_images
from .model_setup import LayerSettings, layout_request, router_coefficient, set_up_layers
from .reference_config import ReferenceConfig
from .trl_attributes import TRLAttribute

# Of all trainers with a reference.
REFERENCE_ATTRIBUTES = {"ref_model": TRLAttribute("reference.model")}


@torch.no_grad()
def reference_scores(
    model: Callable[..., ModelScores],
    batch: TokenBatch,
    *,
    policy: torch.nn.Module | None = None,
    adapter: str | None = None,
    **keywords: Any,
) -> TokenScores:
    """Scores a batch's N tokens under the reference policy, without gradient.

    Args:
        model: the reference, a model of its own or the policy, as it is called (wrapped or not).
        batch: the tokens.
        policy: the policy without what was wrapped around it, where the reference is the same model without its
            adapter, or with another one; None: the reference is a model of its own.
        adapter: the adapter that is the reference, as in `modeling.reference_policy.adapter_reference`.
        keywords: those of `modeling.scoring.score`.
    """
    with reference_scope(policy, adapter):
        return score(model, batch, **keywords).tokens


class ReferencePolicy:
    """Holds the policy that a trainer's loss is held against, scores with it, and lends it to callbacks.

    - `model`: that policy; None where it is the trainer's model without its adapter, or where there is none.

    A trainer calls `set_up` before it starts; `BaseTrainer.start` calls `start`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.model: Any = None

    def set_up(
        self,
        policy: Any,
        given: str | PreTrainedModel | None,
        args: ReferenceConfig,
        peft_config: PeftConfig | None,
        sequences: list[list[int]],
        *,
        wanted: bool = True,
        adapter_wanted: bool = True,
    ) -> tuple[PreTrainedModel | PeftModel, str]:
        """Returns the policy, adapted, and both models' batch layout; makes the reference.

        Args:
            policy: the model that is trained, with its adapter if it came with one.
            given: the argument `ref_model`.
            args, peft_config: the trainer's arguments.
            sequences: a few, to try the model out on.
            wanted: whether a copy of the policy is made where no reference is given and no adapter tells policy and
                reference apart.
            adapter_wanted: the same of an adapter that the policy came with.

        Raises:
            NotImplementedError: sync_ref_model with an adapter and no ref_model.
            ValueError: as in `BaseTrainer.adapt` and `BaseTrainer.choose_layout`.
        """
        trainer = self._trainer
        self.model = _made_reference(policy, given, args, peft_config, wanted)
        came_with_adapter = isinstance(policy, PeftModel)
        policy = trainer.adapt(policy, peft_config, args)
        if came_with_adapter:
            self._prepare_adapters(policy, args, adapter_wanted)
        layout = trainer.choose_layout(policy, args, sequences)
        if self.model is not None:
            self._prepare(base_model(policy), args)
            layout = self._layout_of_both(base_model(policy), args, sequences)
        trainer.router_aux_loss_coef = router_coefficient(base_model(policy), args.router_aux_loss_coef)
        return policy, layout

    def _prepare_adapters(self, policy: PeftModel, args: ReferenceConfig, wanted: bool) -> None:
        if args.model_adapter_name is not None:
            policy.set_adapter(args.model_adapter_name)
        # Training goes on from the adapter that the policy came with, so a frozen copy of it is the reference.
        if wanted and self.model is None and args.ref_adapter_name is None:
            copy_adapter_as_reference(policy)

    def _prepare(self, policy: PreTrainedModel, args: ReferenceConfig) -> None:
        inner: Any = base_model(self.model)
        attach_scoring(inner)
        inner.trl_fast_fused_head = policy.trl_fast_fused_head
        # Of another family, it gets the attention of the layout that it is tried out in.
        if type(inner) is type(policy):
            follow_attention(inner, policy)
        together(lambda: set_up_layers(inner, cast(LayerSettings, args), trains=False))

    def _layout_of_both(self, policy: PreTrainedModel, args: ReferenceConfig, sequences: list[list[int]]) -> str:
        """Returns the policy's layout, or the padded one where the reference is of another family that needs it.

        Raises:
            ValueError: the layout was asked for by name, and the reference cannot run it.
        """
        inner, trainer = base_model(self.model), self._trainer
        layout = trainer.layout.name
        if type(inner) is type(policy) or layout == PADDED:
            return layout
        request = replace(layout_request(trainer, inner, args), asked=layout)
        if choose_layout_or_pad(inner, request, sequences, trainer.readout) == layout:
            return layout
        reason = f"the reference, {type(inner).__name__}, runs padded rows only"
        if args.batch_layout != AUTO:
            raise ValueError(f"batch_layout={layout!r} cannot be used: {reason}; use 'auto' or {PADDED!r}")
        trainer.layout = ChosenLayout(PADDED, reason)
        return PADDED

    def start(self, callbacks: Iterable[Any]) -> None:
        """Puts the reference where the policy is, when the trainer has started with those callbacks."""
        trainer = self._trainer
        if self.model is not None:
            share_images(trainer, self.model)
            self.model = prepare_frozen(trainer.accelerator, self.model)
        for callback in callbacks:
            self.lend(callback)
        if self.model is not None and trainer.args.sync_ref_model:
            trainer.add_callback(SyncRefModelCallback(self.model, trainer.accelerator))
            self._save()

    def _save(self) -> None:
        """Puts the reference, which changes, into checkpoints."""
        trainer = self._trainer
        part = WeightsPart("reference", self.model, trainer.accelerator, writes=trainer.args.should_save)
        trainer.checkpoints.collective_parts.append(part)

    def lend(self, callback: Any) -> None:
        """Gives the reference to a callback that updates it.

        Raises:
            ValueError: it cannot be updated.
        """
        if not getattr(callback, "update_ref_model", False):
            return
        trainer = self._trainer
        if self.model is None or isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
            raise ValueError(
                f"{type(callback).__name__}(update_ref_model=True) needs a reference model of its own, and a policy "
                "without an adapter, whose weights it can take; leave update_ref_model out"
            )
        callback.ref_model = self.model
        self._save()

    def score(self, batch: TokenBatch, **kwargs: Any) -> TokenScores:
        """Scores a batch's N tokens; `kwargs` are those of `modeling.scoring.score`."""
        trainer = self._trainer
        model = trainer.called_policy if self.model is None else self.model
        policy = trainer.accelerator.unwrap_model(trainer.model) if self.model is None else None
        options = {"policy": policy, "adapter": trainer.args.ref_adapter_name, "head": trainer.head_options}
        with trainer.compute_loss_context_manager():
            return reference_scores(model, batch, **options, **kwargs)


def _made_reference(
    policy: Any,
    given: str | PreTrainedModel | None,
    args: ReferenceConfig,
    peft_config: PeftConfig | None,
    wanted: bool,
) -> PreTrainedModel | None:
    with_adapter = peft_config is not None or isinstance(policy, PeftModel)
    if args.sync_ref_model and with_adapter and given is None:
        raise NotImplementedError(
            "sync_ref_model=True needs a reference model of its own, but with PEFT the reference is the same model "
            "without its adapter; give a ref_model or set sync_ref_model=False"
        )
    if isinstance(given, str):
        options: Any = args.ref_model_init_kwargs or {"dtype": policy.dtype}
        return freeze(load_causal_lm(given, **{"trust_remote_code": args.trust_remote_code, **options}))
    if given is not None:
        return freeze(given)
    return None if with_adapter or not wanted else copy_as_reference(policy)
