"""What the training commands share: from a command line to a trained and saved model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from trl_fast.console import make_console
from trl_fast.trainers import RichProgressCallback
from trl_fast.trainers.base.checkpoints import newest_checkpoint
from trl_fast.trainers.base.config import BaseConfig
from trl_fast.trainers.base.divergence import DivergedError
from trl_fast.trainers.base.trainer import BaseTrainer

from .arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from .datasets import load_train_and_test
from .launch import is_launched, launch, launcher_flags, launcher_options
from .parser import TrlParser


def make_parser(
    command: str, config_class: type[BaseConfig], script_class: type[ScriptArguments] = ScriptArguments
) -> TrlParser:
    """The flags of a command: those of the dataset, the trainer's config, the model and the mixture of datasets."""
    return TrlParser((script_class, config_class, ModelConfig, DatasetMixtureConfig), prog=f"trl-fast {command}")


def make_trainer(
    trainer_class: Callable[..., BaseTrainer],
    script_args: ScriptArguments,
    training_args: BaseConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
    **more: Any,
) -> BaseTrainer:
    """The trainer that the arguments describe; `more` are arguments of its constructor.

    Raises:
        ValueError: no model or no dataset was named, or the data is bad.
    """
    model = model_args.model_name_or_path or getattr(training_args, "sft_model_path", None)
    if model is None:
        raise ValueError("model_name_or_path is missing; give a hub name or a folder")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluates = training_args.eval_strategy != "no"
    training_args.trust_remote_code = training_args.trust_remote_code or model_args.trust_remote_code
    train_dataset, eval_dataset = load_train_and_test(script_args, mixture, with_test=evaluates)
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[RichProgressCallback()],
        **more,
    )
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    if script_args.ignore_bias_buffers:
        buffers = [name for name, buffer in trainer.model.named_buffers() if not buffer.dtype.is_floating_point]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers
    return trainer


def prepare_training(
    command: str,
    config_class: type[BaseConfig],
    trainer_class: Callable[..., BaseTrainer],
    arguments: list[str],
    *,
    script_class: type[ScriptArguments] = ScriptArguments,
    trainer_arguments: Callable[[Any], dict[str, Any]] = lambda script_args: {},
) -> Callable[[], int]:
    """Everything that may fail for the user's input; what is returned trains, saves and gives the exit status.

    Arguments of `accelerate launch` make it start the command again in the processes that they ask for.
    trainer_arguments: from the script's arguments to further ones of the trainer.
    """
    parser = make_parser(command, config_class, script_class)
    flags, unknown = launcher_flags(parser.remaining_strings(arguments))
    if unknown:
        raise parser.unknown(unknown, launcher_options())
    if flags and not is_launched():
        return lambda: launch(flags, [command, *arguments])
    *parsed, _ = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    trainer = make_trainer(trainer_class, *parsed, **trainer_arguments(parsed[0]))
    checkpoint = _checkpoint(trainer.args)
    return lambda: _train(trainer, checkpoint, dataset_name=parsed[0].dataset_name)


def _train(trainer: BaseTrainer, checkpoint: str | None, **card: Any) -> int:
    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except DivergedError as error:
        if trainer.is_world_process_zero():
            console = make_console(stderr=True)
            console.print(f"Training failed at {error}", style="red", highlight=False, soft_wrap=True)
        return 1
    trainer.save_model(args.output_dir)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        make_console().print(f"Model saved to {args.output_dir}.", soft_wrap=True)
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    trainer.accelerator.end_training()
    return 0


def _checkpoint(args: BaseConfig) -> str | None:
    """The flag gives text: a folder, or true for the newest checkpoint."""
    value = str(args.resume_from_checkpoint or "")
    if value.lower() in ("", "false", "none"):
        return None
    return newest_checkpoint(args.output_dir) if value.lower() == "true" else value
