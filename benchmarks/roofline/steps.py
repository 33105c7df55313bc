"""Counts whole optimizer steps of the trainers, ours and TRL's, on fake models of real sizes.

A trainer is made on the CPU with a tiny model of the family and makes a real batch. Then the model of the real size,
which has shapes only, is set up as the trainer set up the tiny one and takes its place, and the trainer's own
`training_step` runs on the GPU that is not there; clipping and the optimizer follow. Sampling and rewards of GRPO are
not counted, nor is logging.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import send_to_device
from datasets import disable_progress_bars, enable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Trainer, masking_utils
from transformers.utils import logging as transformers_logging
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

import trl_fast
from tests.support.tokenizer import build_tokenizer
from trl_fast.modeling.fused_layers import FUSED_LAYERS
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.reference_policy import freeze
from trl_fast.modeling.segment_attention import EAGER_SEGMENT_ATTENTION, SEGMENT_ATTENTION, use_segment_attention
from trl_fast.planning.fake_models import give_fake_memory, shortened
from trl_fast.planning.gpu_facts import Gpu
from trl_fast.planning.model_shapes import model_config

from ..step_workloads import GENERATIONS, SHAPES, Shape, completions, random_rewards, rows
from .fake_devices import CUDA
from .fake_gpu import answering, fake_gpu
from .operator_counter import Counter, Counts
from .triton_kernels import counted_kernels

METHODS = ("dpo", "sft", "grpo")
LIBRARIES = {"trl_fast": trl_fast, "trl": trl}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Step:
    """Names a method, a model of `planning.model_shapes`, and the rank of adapters (None: all weights)."""

    method: str
    model: str
    lora_r: int | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.model}{'' if self.lora_r is None else f' LoRA r={self.lora_r}'}"


# Those that are counted, with the rank of their adapters.
MODELS = {"qwen2.5-0.5b": None, "llama-3.2-1b": None, "llama-3.1-8b": 16}


@dataclass(frozen=True)
class StepCase:
    """Holds the counts of a step, ours and TRL's; peak memory beyond weights and the optimizer's averages.

    plain: ours without fused layers.
    """

    step: Step
    shape: Shape
    ours: Counts
    plain: Counts
    trl: Counts
    gpu: Gpu

    @property
    def name(self) -> str:
        return str(self.step)

    @property
    def trl_over_ours(self) -> float:
        return self.trl.milliseconds(self.gpu) / self.ours.milliseconds(self.gpu)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences libraries' progress bars and warnings within."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            enable_progress_bars()
            transformers_logging.set_verbosity(verbosity)


def count_step(step: Step, gpu: Gpu, shape: Shape | None = None, layers_of: int | None = None) -> StepCase:
    """Counts a step of both libraries. layers_of: only so many of the model's layers."""
    shape = shape or SHAPES[step.method]
    config = shortened(model_config(step.model), layers_of)
    ours, trls = (count_library(name, step, shape, config, gpu) for name in LIBRARIES)
    plain = count_library("trl_fast", step, shape, config, gpu, fused_layers=False)
    return StepCase(step, shape, ours, plain, trls, gpu)


def count_library(
    library: str, step: Step, shape: Shape, config: PretrainedConfig, gpu: Gpu, **settings: object
) -> Counts:
    """Counts a step of one of LIBRARIES on a model of this config; settings: more of its trainer's."""
    counter = Counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainer, heads = _make_trainer(library, step, shape, config, folder, settings)
        stack.callback(_undo_fused_layers, trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        if step.method == "grpo":
            batch = _finished_rollout(library, trainer, batch)
        with answering(gpu, counter), _on_gpu(trainer):
            _put_in(library, trainer, config, _lora(step), heads)
        stack.callback(_undo_fused_layers, trainer.model)
        with fake_gpu(gpu, counter), counted_kernels(counter), _on_gpu(trainer):
            _run(trainer, batch, counter, is_on_gpu_already=step.method == "grpo")
    return counter.counts


def _undo_fused_layers(model: torch.nn.Module) -> None:
    """Gives transformers' functions that turn queries and keys back to all models: the next count may want them."""
    changes = changes_of(base_model(model))
    if FUSED_LAYERS in changes:
        changes.undo(FUSED_LAYERS)


def _lora(step: Step) -> LoraConfig | None:
    if step.lora_r is None:
        return None
    return LoraConfig(r=step.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")


def _make_trainer(
    library: str, step: Step, shape: Shape, config: PretrainedConfig, folder: str, more: dict[str, Any]
) -> tuple[Trainer, list[dict[str, Any]]]:
    """Returns a trainer of a tiny model, and what TRL's asks of the fused heads of its policy and of its reference."""
    stem, tokenizer = step.method.upper(), build_tokenizer()
    tiny = shortened(config, 2)
    tiny.update(_TINY)
    make = lambda: AutoModelForCausalLM.from_config(tiny, dtype=torch.bfloat16)  # noqa: E731
    settings: dict[str, Any] = {"max_length": 2 * (shape.prompt + shape.completion)}
    given: dict[str, Any] = {"peft_config": _lora(step)}
    if step.method == "dpo" and step.lora_r is None:
        # TRL would load a reference by the model's name, and this one has none.
        given["ref_model"] = make()
    if step.method == "grpo":
        settings = {"max_completion_length": shape.completion, "num_generations": GENERATIONS}
        given |= {"rollout_func": completions(shape, tokenizer), "reward_funcs": random_rewards}
    args = getattr(LIBRARIES[library], f"{stem}Config")(
        folder,
        **settings,
        per_device_train_batch_size=shape.batch,
        bf16=True,
        use_cpu=True,
        report_to="none",
        optim="adamw_torch_fused",
        dataloader_pin_memory=False,
        **more,
    )
    heads: list[dict[str, Any]] = []
    module = importlib.import_module(f"trl.trainer.{step.method}_trainer")
    with patch.object(module, "add_fused_lm_head", lambda model, **asked: heads.append(asked)):
        trainer = getattr(LIBRARIES[library], f"{stem}Trainer")(
            model=make(),
            args=args,
            train_dataset=rows(step.method, shape, shape.batch),
            processing_class=tokenizer,
            **given,
        )
    # What `train` sets.
    trainer.current_gradient_accumulation_steps = 1
    return trainer, heads


def _finished_rollout(library: str, trainer: Trainer, batch: Any) -> Any:
    """Returns the micro-batch of an update whose completions are there: TRL's on the GPU, ours as samples."""
    inputs = trainer._prepare_inputs(batch)
    if library == "trl":
        trainer._prepare_inputs = lambda given: given
        return inputs
    samples = trainer.generation.current
    trainer._prepare_inputs = lambda _: trainer._micro_batch(samples)
    return batch


def _put_in(
    library: str, trainer: Trainer, config: PretrainedConfig, lora: LoraConfig | None, heads: list[dict[str, Any]]
) -> None:
    """Gives the trainer models of the real size, without memory, set up as its own were."""
    policy, reference = _meta(config), None if getattr(trainer, "ref_model", None) is None else _meta(config)
    if library == "trl":
        policy = _as_trl(policy, lora, trainer, heads[0])
        reference = None if reference is None else _as_trl(reference, None, trainer, heads[1])
    else:
        attention = base_model(trainer.model).config._attn_implementation
        policy = trainer.adapt(policy, lora, trainer.args)
        if attention in (SEGMENT_ATTENTION, EAGER_SEGMENT_ATTENTION):
            use_segment_attention(base_model(policy))
        trainer.ref_model = None if reference is None else freeze(reference)
        if reference is not None:
            trainer.reference._prepare(base_model(policy), trainer.args)
    if trainer.args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model, trainer.ref_model = policy.train(), reference


def _meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _as_trl(
    model: PreTrainedModel, lora: LoraConfig | None, trainer: Trainer, head: dict[str, Any]
) -> torch.nn.Module:
    """Sets a model up as TRL 1.16's trainers do theirs (DPOTrainer.__init__ and its like)."""
    add_fused_lm_head(model, **head)
    if lora is not None:
        model = get_peft_model(model, lora)
        if trainer.args.gradient_checkpointing:
            model.enable_input_require_grads()
    disable_dropout_in_model(model)
    return model


@contextmanager
def _on_gpu(trainer: Trainer) -> Iterator[None]:
    """Lets accelerate and the trainer's arguments, within, take the GPU for their device."""
    states = [state._shared_state for state in (PartialState, AcceleratorState)]
    before = [state.get("device") for state in states]
    with ExitStack() as stack:
        # Real masks are looked at; those of fake tensors would be taken for a graph's and always be built.
        stack.enter_context(patch.object(masking_utils, "is_tracing", lambda *_: False))
        trainer.args.__dict__["_setup_devices"] = CUDA
        for state in states:
            state["device"] = CUDA
        if hasattr(trainer, "updates"):
            trainer.updates = replace(trainer.updates, device=CUDA)
        try:
            yield
        finally:
            for state, device in zip(states, before, strict=True):
                state["device"] = device


def _run(trainer: Trainer, batch: Any, counter: Counter, *, is_on_gpu_already: bool) -> None:
    """Runs two steps and counts the second, when the optimizer has its averages and memory is known."""
    for model in filter(None, (trainer.ref_model, trainer.model)):
        give_fake_memory(model, CUDA)
    if trainer.ref_model is not None:
        trainer.ref_model = trainer.accelerator.prepare_model(trainer.ref_model, False, evaluation_mode=True)
    model = trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model, False)
    trainer.optimizer = None
    trainer.create_optimizer()
    if is_on_gpu_already:
        batch = send_to_device(batch, CUDA)
    _step(trainer, model, batch)
    counter.start()
    _step(trainer, model, batch)


def _step(trainer: Trainer, model: torch.nn.Module, batch: Any) -> None:
    # As accelerate's loader sends it.
    batch = send_to_device(batch, CUDA, non_blocking=trainer.accelerator.non_blocking)
    (inputs,), count = trainer.get_batch_samples(iter([batch]), 1, CUDA)
    trainer.training_step(model, inputs, count)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
