"""Runs the training commands, one for each method: from a command line to a trained and saved model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_fast.console import make_console
from trl_fast.settings.packages import check_package
from trl_fast.trainers.methods import Method

from .argument_places import argument_types
from .arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from .parser import TrlParser
from .rewards import reward_sources

if TYPE_CHECKING:
    from trl_fast.trainers.base.config import BaseConfig
    from trl_fast.trainers.base.trainer import BaseTrainer


@dataclass
class RunArguments:
    """Holds the flags of the training commands that are no arguments of a trainer."""

    dry_run: bool = False
    """Load, tokenize and make one step, then stop: tells its time and memory, saves nothing."""


def make_parser(method: Method) -> TrlParser:
    """Makes the parser of a command: the flags of `argument_types`, and those of RunArguments."""
    return TrlParser((*argument_types(method), RunArguments), prog=f"trl-fast {method.name}")


def make_trainer(
    method: Method,
    script_args: ScriptArguments,
    training_args: BaseConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> BaseTrainer:
    """Makes the trainer that the arguments describe.

    Raises:
        ValueError: no model, no dataset or no reward was named, or the data is bad.
    """
    rewards = _rewards(method, script_args, training_args)
    model = policy_name(training_args, model_args)
    training_args.model_init_kwargs = model_options(training_args, model_args)
    if method.takes_teacher and not getattr(training_args, "use_teacher_server", False):
        training_args.teacher_model_init_kwargs = teacher_options(training_args, model_args)
    training_args.trust_remote_code = training_args.trust_remote_code or model_args.trust_remote_code
    # What only a trainer needs is imported here: `--help` comes without it.
    from transformers import PrinterCallback, ProgressCallback

    from trl_fast.trainers import RichProgressCallback

    from .datasets import load_train_and_test, named_data

    quantization = get_quantization_config(model_args)
    if quantization is not None:
        check_package("bitsandbytes", "bitsandbytes", f"load_in_{4 if model_args.load_in_4bit else 8}bit=True")
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_train_and_test(script_args, mixture, with_test=evaluates)
    with named_data(script_args, mixture):
        trainer = method.trainer_class()(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=quantization,
            peft_config=get_peft_config(model_args),
            callbacks=[RichProgressCallback()],
            **rewards,
        )
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    if script_args.ignore_bias_buffers:
        buffers = [name for name, buffer in trainer.model.named_buffers() if not buffer.dtype.is_floating_point]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers
    return trainer


def model_options(training_args: BaseConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Returns the keywords of from_pretrained: what the flags of the model say, and model_init_kwargs over them."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def teacher_options(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """Returns the keywords of from_pretrained for a teacher: the dtype and attention of the flags of the model.

    teacher_model_init_kwargs stand over them. As in TRL, a teacher is not quantised with its student.
    """
    flags = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    return {**flags, **(training_args.teacher_model_init_kwargs or {})}


def policy_name(training_args: BaseConfig, model_args: ModelConfig) -> str:
    """Returns the model to train: PPO's --sft_model_path where it is given, else --model_name_or_path.

    Raises:
        ValueError: neither is given.
    """
    path = getattr(training_args, "sft_model_path", None)
    if path is None or path == type(training_args).sft_model_path:
        path = model_args.model_name_or_path or path
    if path is None:
        raise ValueError("model_name_or_path is missing; give a hub name or a folder")
    return path


def _rewards(method: Method, script_args: ScriptArguments, training_args: BaseConfig) -> dict[str, Any]:
    """Returns the trainer's argument for rewards: what the flags name, else PPO's --reward_model_path."""
    if method.reward_argument is None:
        return {}
    sources = reward_sources(script_args) or [getattr(training_args, "reward_model_path", None)]
    if sources == [None]:
        raise ValueError("reward_funcs is missing; name one or several, or give reward_model_name_or_path")
    return {method.reward_argument: sources[0] if len(sources) == 1 else sources}


def prepare_training(method: Method, arguments: list[str]) -> Callable[[], int]:
    """Does everything that may fail for the user's input; returns what trains, saves and gives the exit status.

    Arguments of `accelerate launch` make it start the command again in the processes that they ask for.
    """
    parser = make_parser(method)
    remaining = parser.remaining_strings(arguments)
    from .launch import check_engine, is_launched, launch, launcher_flags, launcher_options

    flags, unknown = launcher_flags(remaining)
    if unknown:
        raise parser.unknown(unknown, launcher_options())
    if flags and not is_launched():
        check_engine(flags)
        return lambda: launch(flags, [method.name, *arguments])
    script_args, training_args, model_args, mixture, run_args, _ = parser.parse_args_and_config(
        arguments, return_remaining_strings=True
    )
    after = contextlib.ExitStack()
    if run_args.dry_run:
        from .dry_run import without_new_folders

        after.enter_context(without_new_folders(Path(training_args.output_dir)))
        # transformers' trainer makes the repository on the hub before it trains.
        training_args.push_to_hub = False
    try:
        trainer = make_trainer(method, script_args, training_args, model_args, mixture)
        trainer.run_report.command = ["trl-fast", method.name, *arguments]
        checkpoint = checkpoint_to_resume(trainer)
    except (ValueError, OSError) as error:
        after.close()
        raise parser.located(error, arguments) from error

    def run() -> int:
        with after:
            if run_args.dry_run:
                return make_one_step(trainer, checkpoint)
            return train(trainer, checkpoint, dataset_name=script_args.dataset_name)

    return lambda: _with_names(run, trainer, script_args, mixture)


def _with_names(
    run: Callable[[], int], trainer: BaseTrainer, script_args: ScriptArguments, mixture: DatasetMixtureConfig
) -> int:
    """Runs, and returns the exit status: 2, with one line, if a stream comes to a row that cannot be used."""
    from .datasets import BadDataError, named_data

    try:
        with named_data(script_args, mixture):
            return run()
    except BadDataError as error:
        line = f"trl-fast {trainer.method}: {error}"
        make_console(stderr=True).print(line, style="red", highlight=False, soft_wrap=True)
        return 2


def train(trainer: BaseTrainer, checkpoint: str | None, **card: Any) -> int:
    """Trains, saves and uploads the model, and returns the exit status.

    Args:
        checkpoint: the folder to go on from.
        card: what the model's card on the hub says.
    """
    args = trainer.args
    status = _run(trainer, checkpoint)
    if status:
        return status
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=card.get("dataset_name"))
    if trainer.is_world_process_zero() and not args.run_report:
        make_console().print(f"Model saved to {args.output_dir}.", soft_wrap=True)
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    trainer.accelerator.end_training()
    return 0


def make_one_step(trainer: BaseTrainer, checkpoint: str | None) -> int:
    """Makes one step, saves nothing, says what it needed, and returns the exit status; see `cli.dry_run`."""
    from trl_fast.trainers.checkpoints.output_folder import FolderInUseError

    from .dry_run import OneStep, leaving_nothing, say_dry_run

    step = OneStep()
    trainer.add_callback(step)
    trainer.run_report.says_end = False
    try:
        with leaving_nothing(trainer):
            status = _run(trainer, checkpoint)
    except FolderInUseError as error:
        return _failed(trainer, str(error), 2)
    if status == 0 and step.seconds is None:
        line = "dry_run: there is no step to make: the checkpoint is of the last one, or the data fills no batch"
        return _failed(trainer, line, 2)
    if status == 0 and trainer.is_world_process_zero():
        say_dry_run(trainer, step)
    return status


def _run(trainer: BaseTrainer, checkpoint: str | None) -> int:
    """Trains and returns the exit status; a failure that a run may come to is one line."""
    from trl_fast.trainers.base.divergence import DivergedError
    from trl_fast.trainers.base.stop_signals import INTERRUPTED
    from trl_fast.trainers.checkpoints.output_folder import FolderInUseError
    from trl_fast.trainers.checkpoints.writer import CheckpointError

    if trainer.is_world_process_zero():
        from trl_fast.planning.forecast import forecast

        trainer.forecast = forecast(trainer)
    failures = {DivergedError: ("Training failed at ", 1), CheckpointError: ("Training failed: ", 1)}
    failures[FolderInUseError] = ("", 2)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except tuple(failures) as error:
        said, status = failures[type(error)]
        return _failed(trainer, f"{said}{error}", status)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _failed(trainer: BaseTrainer, line: str, status: int) -> int:
    """Prints the line about a failure; returns the exit status."""
    if trainer.is_world_process_zero():
        make_console(stderr=True).print(line, style="red", highlight=False, soft_wrap=True)
    return status


def checkpoint_to_resume(trainer: BaseTrainer) -> str | None:
    """Returns the checkpoint that the arguments say to go on from; None: training begins anew."""
    return trainer.checkpoints.resume_point(_checkpoint(trainer.args))


def _checkpoint(args: BaseConfig) -> str | bool:
    """Returns the checkpoint to go on from: the flag gives text, a folder, or true for the newest one."""
    value = str(args.resume_from_checkpoint or "")
    known = {"": False, "false": False, "none": False, "true": True}
    return known.get(value.lower(), value)
