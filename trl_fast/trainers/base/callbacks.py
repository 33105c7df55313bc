"""Provides callbacks: epochs, NEFTune, logged completions, a reference that follows, averages."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, extract_model_from_parallel
from rich.table import Table
from rich.text import Text
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_fast.console import make_console
from trl_fast.modeling.embedding_noise import SequenceNoise
from trl_fast.parallel.weights import local_shards

from ..checkpoints.random_states import random_states, set_random_states
from .agreed_control import AgreedControl
from .prompt_completions import PromptCompletions

logger = logging.getLogger(__name__)

# One a process.
_EPOCH_FILE = "epoch_start_{}.pt"
_BEMA_FILE = "bema.pt"
_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)


class EpochStart(TrainerCallback):
    """Lets a run that is resumed within an epoch read its rows in the order of that epoch.

    The sampler is told which epoch it is: transformers tells the loader that leaves out what was trained on already,
    and with several processes that one reaches accelerate's own sampler only. Samplers that take their order from the
    global random numbers find those of the epoch's beginning, which checkpoints keep; transformers then sets those of
    the checkpoint itself.

    args: they tell which process this is, each of which has a file of its own.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._first_step = 0
        self._states: dict[str, Any] | None = None
        self._is_loaded = False
        self._file = _EPOCH_FILE.format(args.process_index)

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the random states of the epoch's beginning; each process its own."""
        torch.save(self._states, folder / self._file)

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the random states, if there are any for this process."""
        path = folder / self._file
        self._states = torch.load(path, weights_only=True) if path.is_file() else None
        self._is_loaded = self._states is not None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Tells the whole loader, whose sampler is that of the other one, and sets or remembers the random states."""
        self._first_step = state.global_step
        loader = kwargs["train_dataloader"]
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(int(state.epoch or 0))
        is_within = state.epoch is not None and not float(state.epoch).is_integer()
        if self._is_loaded and self._states is not None and is_within:
            set_random_states(self._states)
        else:
            self._states = random_states(with_gpus=False)
        self._is_loaded = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Says so if a stream, which does not tell its length, was resumed after its first pass."""
        if 0 < state.global_step == self._first_step:
            logger.warning(
                "resume_from_checkpoint: the train dataset is a stream that ended before all rows that were trained "
                "on had been left out, so the run goes on with its first rows and is not the unbroken one. Use a "
                "datasets.Dataset for runs of several epochs."
            )


class SequenceNoiseCallback(TrainerCallback):
    """Puts `SequenceNoise` in the place of transformers' NEFTune, which takes a row of many sequences for one."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Exchanges the hook that transformers has put on the embeddings; its handle is removed as before."""
        trainer = self._trainer
        if trainer.neftune_noise_alpha is not None:
            trainer.neftune_hook_handle.remove()
            model = trainer.accelerator.unwrap_model(trainer.model)
            trainer.neftune_hook_handle = SequenceNoise(model, lambda: trainer.neftune_noise_alpha or 0.0)


def remove_noise(trainer: Trainer) -> None:
    """Takes NEFTune's noise off; transformers does only where training came to its end."""
    if trainer.neftune_noise_alpha is not None and hasattr(trainer, "neftune_hook_handle"):
        trainer.neftune_hook_handle.remove()


def own_callbacks(trainer: Trainer) -> tuple[TrainerCallback, ...]:
    """Returns the callbacks of every trainer that nobody asks anything."""
    return EpochStart(trainer.args), SequenceNoiseCallback(trainer), AgreedControl(trainer)


class SyncRefModelCallback(TrainerCallback):
    """Lets the reference follow the policy: ref = (1 - alpha) ref + alpha policy. TR-DPO, arXiv 2404.09656, Eq. 6.

    alpha is args.ref_model_mixup_alpha, the update comes every args.ref_model_sync_steps steps.
    """

    def __init__(self, ref_model: torch.nn.Module, accelerator: Accelerator | None) -> None:
        self.ref_model = ref_model
        self.accelerator = accelerator

    @staticmethod
    @torch.no_grad()
    def sync_target_model(model: torch.nn.Module, target_model: torch.nn.Module, alpha: float) -> None:
        """Moves each parameter of target_model towards model's by the share alpha; a process moves what it holds."""
        for target, source in zip(local_shards(target_model), local_shards(model), strict=True):
            target.lerp_(source.to(target.dtype), alpha)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Updates the reference when its time has come."""
        if state.global_step % args.ref_model_sync_steps == 0:
            self.sync_target_model(kwargs["model"], self.ref_model, args.ref_model_mixup_alpha)


class LogCompletionsCallback(TrainerCallback):
    """Generates completions of the evaluation dataset's prompts every so many steps, and logs them as a table.

    The table (columns step, prompt, completion) goes to W&B and Comet where `report_to` names them, else to the
    terminal. `table` keeps all of its rows.

    Args:
        trainer: its eval_dataset must have the column "prompt", of texts or of conversations.
        generation_config: None means the model's own.
        num_prompts: only the first so many; None means all.
        freq: steps between two tables; None means the trainer's eval_steps.

    Raises:
        ValueError: there is no evaluation dataset with a column "prompt", or it has fewer rows than num_prompts.
    """

    def __init__(
        self,
        trainer: Trainer,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
    ) -> None:
        self.completions = PromptCompletions(trainer, generation_config, num_prompts, type(self).__name__)
        self.trainer, self.freq = trainer, freq
        self.table: list[tuple[str, str, str]] = []
        self._last_logged_step = -1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Generates and logs when it is time."""
        if state.global_step == self._last_logged_step or state.global_step % (self.freq or state.eval_steps):
            return
        self._last_logged_step = state.global_step
        batch_size = args.per_device_eval_batch_size
        texts, completions = self.completions.generate(kwargs["processing_class"], batch_size)
        if self.trainer.accelerator.is_main_process:
            steps = [str(state.global_step)] * len(texts)
            self.table += zip(steps, texts, completions, strict=True)
            self._report(args.report_to)

    def _report(self, report_to: list[str]) -> None:
        columns = ["step", "prompt", "completion"]
        if "wandb" in report_to:
            import wandb

            wandb.log({"completions": pd.DataFrame(self.table, columns=columns)})
        if "comet_ml" in report_to:
            import comet_ml

            experiment = comet_ml.get_running_experiment()
            if experiment is not None:
                experiment.log_table("completions.csv", pd.DataFrame(self.table, columns=columns))
        if not {"wandb", "comet_ml"} & set(report_to):
            step = self.table[-1][0]
            table = Table(*columns[1:], title=f"completions at step {step}", title_justify="left", show_lines=True)
            for row_step, prompt, completion in self.table:
                if row_step == step:
                    table.add_row(Text(prompt), Text(completion))
            make_console().print(table)


class BEMACallback(TrainerCallback):
    """Keeps a bias-corrected average of the weights, and saves it to output_dir/bema at the end. arXiv 2508.00180.

    At step t of an update, with b = max((lag + multiplier t)^-ema_power, min_ema_multiplier) and
    a = (lag + multiplier t)^-bias_power: average = (1 - b) average + b weights;
    BEMA weights = average + a (weights - weights at step update_after).

    Args:
        update_freq: steps between two updates.
        ema_power, bias_power: kappa and eta of the paper.
        lag: rho of the paper, the age at which the average starts.
        update_after: steps before the average starts.
        multiplier: gamma of the paper.
        min_ema_multiplier: the least share of the present weights in the average.
        device: where the averages are kept.
        update_ref_model: whether the reference of DPO and its relatives gets the BEMA weights too.
        ref_model_update_freq, ref_model_update_after: every so many steps, from that step on.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
        update_ref_model: bool = False,
        ref_model_update_freq: int = 400,
        ref_model_update_after: int = 0,
    ) -> None:
        for name, steps in (("update_freq", update_freq), ("ref_model_update_freq", ref_model_update_freq)):
            if steps < 1:
                raise ValueError(f"{name} must be a positive number of steps, got {steps}")
        self.update_freq = update_freq
        self.ema_power = ema_power
        self.bias_power = bias_power
        self.lag = lag
        self.update_after = update_after
        self.multiplier = multiplier
        self.min_ema_multiplier = min_ema_multiplier
        self.device = device
        self.update_ref_model = update_ref_model
        self.ref_model_update_freq = ref_model_update_freq
        self.ref_model_update_after = ref_model_update_after
        # A trainer with a reference model lends it.
        self.ref_model: torch.nn.Module | None = None
        self.running_model: PreTrainedModel | None = None
        # By name, for the parameters that are trained.
        self._start: dict[str, torch.Tensor] = {}
        self._average: dict[str, torch.Tensor] = {}
        self._loaded: dict[str, dict[str, torch.Tensor]] | None = None

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Copies the model."""
        if args.distributed_state is not None and args.distributed_state.distributed_type in _SHARDED:
            raise NotImplementedError("BEMACallback does not work with sharded parameters (DeepSpeed, FSDP) yet")
        model = extract_model_from_parallel(kwargs["model"])
        self.running_model = copy.deepcopy(model).to(self.device)
        self._take(model)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._start, self._average = loaded["start"], loaded["average"]
            for name, weight in loaded["weights"].items():
                self.running_model.get_parameter(name).copy_(weight)

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the averages; one process does."""
        if PartialState().is_main_process and self.running_model is not None:
            weights = {name: self.running_model.get_parameter(name) for name in self._average}
            torch.save({"start": self._start, "average": self._average, "weights": weights}, folder / _BEMA_FILE)

    @torch.no_grad()
    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the averages; they begin anew if there are none."""
        path = folder / _BEMA_FILE
        self._loaded = torch.load(path, map_location=self.device, weights_only=True) if path.is_file() else None

    def _take(self, model: torch.nn.Module) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._start = {name: parameter.to(self.device, copy=True) for name, parameter in trained.items()}
        self._average = {name: tensor.clone() for name, tensor in self._start.items()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts the average at step update_after, and updates it every update_freq steps from then on."""
        age = state.global_step - self.update_after
        model = extract_model_from_parallel(kwargs["model"])
        if age == 0:
            self._take(model)
        elif age > 0 and age % self.update_freq == 0:
            self._update(model, self.lag + self.multiplier * state.global_step)
        since = state.global_step - self.ref_model_update_after
        if self.update_ref_model and since >= 0 and since % self.ref_model_update_freq == 0:
            reference = extract_model_from_parallel(self.ref_model)
            reference.load_state_dict(self.running_model.state_dict(), strict=False)

    def _update(self, model: torch.nn.Module, age: float) -> None:
        share = max(age**-self.ema_power, self.min_ema_multiplier)
        correction = age**-self.bias_power
        for name, average in self._average.items():
            weights = model.get_parameter(name).to(self.device)
            average.mul_(1 - share).add_(weights, alpha=share)
            self.running_model.get_parameter(name).copy_(average + correction * (weights - self._start[name]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Saves the averaged model."""
        if state.is_world_process_zero:
            folder = os.path.join(args.output_dir, "bema")
            self.running_model.save_pretrained(folder)
            logger.info(f"The averaged (BEMA) model is saved to {folder}.")
