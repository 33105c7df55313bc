"""Forecasts a run that is about to start: the memory and the time of a step, from the trainer itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel

from trl_fast.data.token_checks import longest_sequence
from trl_fast.input_errors import error_line
from trl_fast.modeling.loading import base_model
from trl_fast.ops.device import device_facts
from trl_fast.parallel.engines import Engine, engine_of
from trl_fast.trainers.base.config import BaseConfig
from trl_fast.trainers.base.prepared_datasets import shows_tokens
from trl_fast.trainers.base.trainer import BaseTrainer
from trl_fast.trainers.run_report.forecast import Forecast

from .gpu_facts import gpu_of_device
from .memory_timeline import highest
from .peak_estimates import stage_peaks, whole_layers
from .planned_layers import installed_kernels
from .shallow_models import shallow_models
from .step_times import planned_work
from .training_setup import (
    DEFAULT_ENGINE,
    ONLINE_METHODS,
    TEACHER_METHODS,
    PlannedTeacher,
    TrainingSetup,
    dtype_name,
    setup_from_training,
)

# Engines of `parallel.engines` by their names in `sharding.SHARINGS`.
_ENGINES = {
    Engine.DDP: "ddp",
    Engine.ZERO1: "zero1",
    Engine.ZERO2: "zero2",
    Engine.ZERO3: "zero3",
    Engine.FSDP1: "fsdp1",
    Engine.FSDP2: "fsdp2",
    Engine.TP: "tp",
}
# A simulation takes seconds, which a run of fewer weights than these is not worth.
FEWEST_WEIGHTS = 10_000_000
# No more layers are simulated at a time: a run should not wait for them.
MOST_LAYERS = 12


def forecast(trainer: BaseTrainer) -> Forecast:
    """Forecasts a step of a trainer before it trains, as `trl-fast plan` does, in a few seconds.

    What cannot be forecast is None, and the note says why: a forecast never stops a run. Random numbers are as before.
    """
    weights = sum(weight.numel() for weight in trainer.accelerator.unwrap_model(trainer.model).parameters())
    if weights < FEWEST_WEIGHTS:
        return Forecast(None, None, f"the model is too small to simulate (less than {FEWEST_WEIGHTS:,} weights)")
    try:
        with _unnoticed():
            found = _simulated(_setup(trainer))
        if kernels := installed_kernels(base_model(trainer.accelerator.unwrap_model(trainer.model))):
            found = replace(found, note=f"{found.note}; without the kernels of {kernels}, which take less")
        return found
    # Whatever a model's own code or an unusual argument leads to.
    except Exception as error:
        return Forecast(None, None, f"it cannot be simulated ({error_line(error)})")


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Leaves random numbers as they were, and says nothing that the trainer has said already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _simulated(setup: TrainingSetup) -> Forecast:
    shallow = shallow_models(setup)
    if (setup.num_layers if shallow is None else shallow.more) > MOST_LAYERS:
        return Forecast(None, None, "its layers differ, and to simulate so many takes long: see trl-fast plan")
    size = highest(stage_peaks(setup, setup.max_length)).bytes
    tokens = f"sequences of {setup.max_length:,} tokens"
    if setup.device == "cpu":
        return Forecast(size, None, f"an estimate of tensors alone, for {tokens}; no time is estimated for a CPU")
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    gpu = gpu_of_device(name, total)
    limit = total if gpu is None else gpu.usable_bytes
    # What is free is used: layers that are left uncheckpointed.
    size += whole_layers(setup, setup.max_length, limit)[1]
    if gpu is None:
        return Forecast(size, None, f"an estimate for {tokens}; the speed of {name} is not known")
    seconds = planned_work(setup, setup.max_length, limit).seconds(gpu)
    return Forecast(size, seconds, f"an estimate for {gpu.name}, {tokens}")


@dataclass
class _ModelOfTrainer:
    """Holds the model's arguments (`training_setup.ModelArguments`) that a trainer's model shows."""

    dtype: str | None
    use_peft: bool
    lora_r: int
    lora_target_modules: list[str] | str | None
    lora_modules_to_save: list[str] | None
    lora_exclude_modules: list[str] | str | None
    use_dora: bool
    load_in_4bit: bool
    load_in_8bit: bool
    use_bnb_nested_quant: bool


def _setup(trainer: BaseTrainer) -> TrainingSetup:
    """Makes the setup of a trainer's run.

    Raises:
        ValueError: the device, or how the run is spread over devices, is none that can be planned; or rows have
            images, whose sizes are not known beforehand.
    """
    if trainer.images is not None:
        raise ValueError("rows have images of sizes of their own: see trl-fast plan --image_size")
    args = cast(BaseConfig, trainer.args)
    kind = args.device.type
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"device {kind}")
    model = trainer.accelerator.unwrap_model(trainer.model)
    longest, prompt = _longest(trainer)
    setup = setup_from_training(
        trainer.method,
        args,
        _model_arguments(model),
        base_model(model).config,
        longest=longest,
        prompt_tokens=prompt,
        teacher=_teacher(trainer),
        device="gpu" if kind == "cuda" else "cpu",
        num_gpus=args.world_size,
        engine=_ENGINES.get(engine_of(trainer.accelerator), DEFAULT_ENGINE),
    )
    return setup.but(capability=device_facts(args.device).capability) if kind == "cuda" else setup


def _teacher(trainer: BaseTrainer) -> PlannedTeacher | None:
    if trainer.method not in TEACHER_METHODS or getattr(trainer.args, "use_teacher_server", False):
        return None
    teacher = base_model(trainer.accelerator.unwrap_model(cast(Any, trainer).ref_model))
    return PlannedTeacher(teacher.config, dtype_name(teacher.dtype, teacher.config))


def _model_arguments(model: Any) -> _ModelOfTrainer:
    inner, lora = base_model(model), None
    if isinstance(model, PeftModel):
        lora = model.peft_config[model.active_adapter]
        if not isinstance(lora, LoraConfig):
            raise ValueError(f"an adapter of {type(lora).__name__}")
    modules, excluded = getattr(lora, "target_modules", None), getattr(lora, "exclude_modules", None)
    quantization = getattr(inner.config, "quantization_config", None)
    return _ModelOfTrainer(
        dtype=str(inner.dtype).removeprefix("torch."),
        use_peft=lora is not None,
        lora_r=getattr(lora, "r", 1),
        lora_target_modules=sorted(modules) if isinstance(modules, set) else modules,
        lora_modules_to_save=getattr(lora, "modules_to_save", None),
        lora_exclude_modules=sorted(excluded) if isinstance(excluded, set) else excluded,
        use_dora=getattr(lora, "use_dora", False),
        load_in_4bit=getattr(inner, "is_loaded_in_4bit", False),
        load_in_8bit=getattr(inner, "is_loaded_in_8bit", False),
        use_bnb_nested_quant=bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
    )


def _longest(trainer: BaseTrainer) -> tuple[int | None, int | None]:
    """Returns the tokens of the data's longest sequence and of its longest prompt, where they are known beforehand."""
    data, max_length = trainer.train_dataset, getattr(trainer.args, "max_length", None)
    if trainer.method in ONLINE_METHODS or data is None or not shows_tokens(data, trainer.token_columns):
        return None, None
    # Rows that are packed have max_length tokens, however long their sequences are.
    longest = None if getattr(trainer.args, "packing", False) else longest_sequence(data, trainer.token_columns)
    if longest is None or "prompt_ids" not in trainer.token_columns:
        return longest, None
    cut = min(longest, max_length or longest)
    return longest, min(longest_sequence(data, ("prompt_ids",)), cut - 1)
