"""Checks the arguments of trainers that transformers would only look at when training has begun."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from peft import PeftModel
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainerCallback, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from trl_fast.input_errors import error_line
from trl_fast.modeling.loading import base_model
from trl_fast.ops import supports
from trl_fast.settings.choices import check_choice, did_you_mean
from trl_fast.settings.ranges import check_ranges

from ..checkpoints.output_folder import check_output_dir
from .config import BaseConfig
from .parallelism import check_loaded_for, check_parallelism

# Arguments of trainers that are functions, or None.
_FUNCTIONS = ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")


def checked_config(config_class: type[BaseConfig], args: object | None, model: object) -> BaseConfig:
    """Returns a trainer's config: from `args`, or defaults with an output folder named after the model.

    Raises:
        TypeError: the model is neither a name nor a model, or args are no config of this trainer.
        ValueError, ImportError: as in `check_settings`; or the model is not in the parts that args ask for, or the
            output folder cannot be written to.
    """
    if not isinstance(model, (str, PreTrainedModel, PeftModel)):
        raise TypeError(
            "model: expected a hub name, a folder, a transformers.PreTrainedModel or a peft.PeftModel, got "
            f"{type(model).__name__}"
        )
    if args is None:
        name = model if isinstance(model, str) else base_model(model).config._name_or_path
        method = config_class.__name__.removesuffix("Config")
        args = config_class(f"{(name or 'model').rstrip('/').split('/')[-1]}-{method}")
    config = config_class.from_any(args)
    check_output_dir(str(config.output_dir))
    check_settings(config)
    if not isinstance(model, str):
        check_loaded_for(config, model)
    return config


def check_settings(args: BaseConfig) -> None:
    """Checks all numbers, and the settings of processes, head, logging, optimizer and schedule.

    Raises:
        ValueError: a number is out of range; or a setting cannot serve here, or is unknown.
        ImportError: a package that the optimizer needs is missing.
    """
    check_ranges(args)
    check_parallelism(args)
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            "auto_find_batch_size=True: of several processes, one that runs out of memory would begin anew alone, and "
            "the others wait for it; set it to False and choose per_device_train_batch_size"
        )
    if args.head_backend is not None:
        support = supports("linear_logprob", args.head_backend, args.device, torch.float32)
        if not support.ok:
            raise ValueError(f"head_backend={args.head_backend!r} cannot serve: {support.reason}; leave it out")
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", "all", *INTEGRATION_TO_CALLBACK])
            hint = did_you_mean(str(name), INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to={name!r} is unknown; expected one of {known}{hint}")
    if args.torch_compile_backend is not None:
        check_choice(args, "torch_compile_backend", [backend.value.lower() for backend in DynamoBackend])
    _check_optimizer(args)
    _check_scheduler(args)


def _check_optimizer(args: BaseConfig) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except Exception as error:
        text = error_line(error)
        if "model" in text and "pass a" in text:
            # The model comes later, and all else is good.
            return
        setting = (
            f"optim={OptimizerNames(args.optim).value!r}" if "nstall" in text or not args.optim_args else "optim_args"
        )
        shown = text if setting != "optim_args" else f"{args.optim_args!r} is not read ({text}); write name=value, ..."
        raise (ImportError if isinstance(error, ImportError) else ValueError)(f"{setting}: {shown}") from error


def _check_scheduler(args: BaseConfig) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    keywords: Any = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=keywords)
    except (TypeError, ValueError) as error:
        kind = SchedulerType(args.lr_scheduler_type).value
        raise ValueError(
            f"lr_scheduler_kwargs={keywords!r} with lr_scheduler_type={kind!r}: {error_line(error)}"
        ) from error


@contextlib.contextmanager
def checked_arguments(kwargs: dict[str, Any]) -> Iterator[None]:
    """Checks the arguments of transformers.Trainer, which is made inside; names report_to where that fails for it.

    Raises:
        TypeError: an argument has another type; the message names it.
        ValueError: the optimizer holds none of the weights that are trained.
        ImportError: a package that report_to needs is missing.
    """
    _check_types(kwargs)
    _check_holds_weights(kwargs)
    try:
        yield
    except (RuntimeError, ImportError) as error:
        if "to be installed" not in str(error):
            raise
        raise ImportError(f"report_to={kwargs['args'].report_to}: {error_line(error)}") from error


def _check_types(kwargs: dict[str, Any]) -> None:
    for name in _FUNCTIONS:
        value = kwargs.get(name)
        if value is not None and not callable(value):
            raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
    callbacks = kwargs.get("callbacks")
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise TypeError(f"callbacks: expected a list of transformers.TrainerCallback, got {type(callbacks).__name__}")
    for callback in callbacks or ():
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"callbacks: expected transformers.TrainerCallback, got {kind.__name__}")
    optimizers = kwargs.get("optimizers")
    if optimizers is not None and not (isinstance(optimizers, (tuple, list)) and len(optimizers) == 2):
        raise TypeError(f"optimizers: expected an optimizer and a scheduler, each or None, got {optimizers!r}")


def _check_holds_weights(kwargs: dict[str, Any]) -> None:
    """Raises ValueError if an optimizer that is given would change nothing of the model that is given with it."""
    optimizer = (kwargs.get("optimizers") or (None, None))[0]
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    trained = {id(weight) for weight in kwargs["model"].parameters() if weight.requires_grad}
    if not any(id(weight) in trained for group in optimizer.param_groups for weight in group["params"]):
        raise ValueError(
            "optimizers: the optimizer holds no weight that is trained, so nothing would be learned. With a "
            "peft_config these are the adapter's, which the trainer makes: set optim in the config instead, or give a "
            "PeftModel and an optimizer of its parameters"
        )
