"""`trl-fast dpo`: preference optimisation from the command line."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from trl_fast.trainers import DPOConfig, DPOTrainer, RichProgressCallback
from trl_fast.trainers.base import newest_checkpoint

from .arguments import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from .datasets import load_split


def make_parser() -> TrlParser:
    """The flags of this command: those of ScriptArguments, DPOConfig and ModelConfig."""
    return TrlParser((ScriptArguments, DPOConfig, ModelConfig), prog="trl-fast dpo")


def make_trainer(script_args: ScriptArguments, training_args: DPOConfig, model_args: ModelConfig) -> DPOTrainer:
    """The trainer that the arguments describe.

    Raises:
        ValueError: no model or no dataset was named, or the data is bad.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; give a hub name or a folder")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluates = training_args.eval_strategy != "no"
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_split(script_args, script_args.dataset_train_split),
        eval_dataset=load_split(script_args, script_args.dataset_test_split) if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[RichProgressCallback()],
    )
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    if script_args.ignore_bias_buffers:
        buffers = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype.is_floating_point is False]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers
    return trainer


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Everything that may fail for the user's input; what is returned trains, saves and gives the exit status."""
    script_args, training_args, model_args = make_parser().parse_args_and_config(arguments)
    trainer = make_trainer(script_args, training_args, model_args)
    checkpoint = _resume(training_args)

    def run() -> int:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(training_args.output_dir)
        trainer.create_model_card()
        if trainer.is_world_process_zero():
            Console().print(f"Model saved to {training_args.output_dir}.", soft_wrap=True)
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
        return 0

    return run


def _resume(args: DPOConfig) -> str | None:
    """The flag gives text: a folder, or true for the newest checkpoint."""
    value = str(args.resume_from_checkpoint or "")
    if value.lower() in ("", "false", "none"):
        return None
    return newest_checkpoint(args.output_dir) if value.lower() == "true" else value
