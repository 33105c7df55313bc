"""One optimizer step on fake tensors, through the very code that trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from trl_fast.data import TokenBatch
from trl_fast.losses.dpo import DPOLossConfig, PreferenceTable, dpo_loss
from trl_fast.losses.reward import reward_loss
from trl_fast.losses.sft import OUTPUTS, nll_loss
from trl_fast.modeling.classifier_head import rewards
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.reference_policy import freeze, reference_scope
from trl_fast.modeling.scoring import ModelScores, score
from trl_fast.ops.device import simulated_device

from .baseline_steps import baseline_loss
from .example_batches import make_batch
from .fake_models import decoder_layers, give_fake_memory, meta_model, planned_model, prepare
from .gpu_facts import GPU_KERNELS, KINDS_BY_CODE, flash_workspace, planned_facts
from .memory_timeline import FORWARD_STAGE, GRADIENTS, HEAD_STAGE, OPTIMIZER, REFERENCE, WEIGHTS, Timeline
from .memory_tracker import CUDA_GRANULARITY, MemoryTracker
from .training_setup import OURS, TrainingSetup

REFERENCE_STAGE = "reference pass"
LAST_LAYER, MIDDLE_LAYERS, FIRST_LAYER = "last layer backward", "layers backward", "first layer backward"
EMBEDDING_STAGE = "embedding backward"
OPTIMIZER_STAGE = "optimizer"


def simulate(setup: TrainingSetup, max_length: int, layers: int | None = None) -> Timeline:
    """The memory of one optimizer step on a micro-batch of sequences of `max_length` tokens.

    The step is not the first one: the optimizer has its averages already. `layers`: only that many of the model's.

    Raises:
        ValueError: the batch_layout cannot be, or the architecture cannot be simulated.
    """
    model, layout = planned_model(setup, max_length, layers)
    reference = None
    if setup.needs_reference_model:
        reference = freeze(prepare(meta_model(setup, layers), setup.but(gradient_checkpointing=False), layout))
    batch = make_batch(setup, max_length, layout)
    on_gpu = setup.device == "gpu"
    tracker = MemoryTracker(
        CUDA_GRANULARITY if on_gpu else 1,
        flash_workspace if on_gpu else None,
        GPU_KERNELS if on_gpu else (),
        KINDS_BY_CODE,
    )
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, simulated_device(planned_facts(setup.device)):
        with tracker.labelling(REFERENCE):
            if reference is not None:
                give_fake_memory(reference)
        with tracker.labelling(WEIGHTS):
            give_fake_memory(model)
        optimizer = _optimizer(setup, model, tracker)
        _mark_stages(model, tracker)
        _run(setup, model, reference, batch, optimizer, tracker)
    return replace(tracker.timeline(), results=base_model(model).trl_fast_selective_checkpointing.budget.asked)


def _run(
    setup: TrainingSetup,
    model: PreTrainedModel | PeftModel,
    reference: PreTrainedModel | None,
    batch: TokenBatch,
    optimizer: torch.optim.Optimizer,
    tracker: MemoryTracker,
) -> None:
    find = _LOSSES[setup.method] if setup.system == OURS else baseline_loss
    loss = find(setup, model, reference, batch, tracker)
    loss.backward()
    trained = [weight for weight in model.parameters() if weight.grad is not None]
    for weight in trained:
        tracker.label(weight.grad, GRADIENTS)
    tracker.enter(OPTIMIZER_STAGE)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(
    setup: TrainingSetup, model: PreTrainedModel | PeftModel, tracker: MemoryTracker
) -> torch.optim.Optimizer:
    """The trainers' default optimizer as it is after a step; with gradients if they accumulate over micro-batches."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, fused=True)
    with tracker.labelling(GRADIENTS):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
    with tracker.labelling(OPTIMIZER):
        optimizer.step()
    if setup.gradient_accumulation_steps == 1:
        optimizer.zero_grad()
    return optimizer


def _mark_stages(model: PreTrainedModel | PeftModel, tracker: MemoryTracker) -> None:
    """Hooks that tell the tracker where in the step the model is."""
    layers = decoder_layers(model)

    def enter_on_gradient(tensor: torch.Tensor, stage: str) -> None:
        if tracker.stage == FORWARD_STAGE and tensor.requires_grad:
            tensor.register_hook(lambda _: tracker.enter(stage))

    def before_first(_module, args, kwargs) -> None:
        enter_on_gradient(args[0] if args else kwargs["hidden_states"], EMBEDDING_STAGE)

    def after(stage: str) -> Callable:
        return lambda _module, _args, out: enter_on_gradient(out[0] if isinstance(out, tuple) else out, stage)

    layers[0].register_forward_pre_hook(before_first, with_kwargs=True)
    for number, layer in enumerate(layers):
        last, first = number == len(layers) - 1, number == 0
        layer.register_forward_hook(after(LAST_LAYER if last else FIRST_LAYER if first else MIDDLE_LAYERS))

    def after_backbone(*_: object) -> None:
        if tracker.stage == FORWARD_STAGE:
            tracker.enter(HEAD_STAGE)

    base_model(model).base_model.register_forward_hook(after_backbone)


# ---- our losses, as the trainers' compute_loss has them


def _score(
    setup: TrainingSetup, model: torch.nn.Module, batch: TokenBatch, outputs: tuple[str, ...], **options: object
) -> ModelScores:
    with setup.autocast():
        return score(
            model,
            batch,
            outputs=outputs,
            workspace_bytes=setup.head_workspace_bytes,
            head_grad=setup.head_grad,
            **options,
        )


def _dpo_loss(setup, model, reference, batch, tracker) -> torch.Tensor:
    table, config = PreferenceTable(batch.branch, batch.offset, batch.branch_lengths), DPOLossConfig()
    tracker.enter(REFERENCE_STAGE)
    if setup.precompute_ref_log_probs:
        ref_logprobs = torch.zeros(len(batch))
    else:
        with torch.no_grad(), reference_scope(model):
            tokens = _score(setup, model if reference is None else reference, batch, ("logprobs",)).tokens
        ref_logprobs = table.sequence_logprobs(tokens.logprobs)
    tracker.enter(FORWARD_STAGE)
    return _score(
        setup,
        model,
        batch,
        config.outputs,
        token_loss=lambda scores, rows: dpo_loss(scores, table, ref_logprobs, config, rows),
        group_sizes=batch.group_sizes,
    ).loss


def _sft_loss(setup, model, reference, batch, tracker) -> torch.Tensor:
    tracker.enter(FORWARD_STAGE)
    scored = _score(setup, model, batch, OUTPUTS, token_loss=lambda scores, _: nll_loss(scores.logprobs))
    return scored.loss / len(batch.targets)


def _reward_loss(setup, model, reference, batch, tracker) -> torch.Tensor:
    tracker.enter(FORWARD_STAGE)
    with setup.autocast():
        found = rewards(model, batch)
    return reward_loss(found)


_LOSSES = {"dpo": _dpo_loss, "sft": _sft_loss, "reward": _reward_loss}
