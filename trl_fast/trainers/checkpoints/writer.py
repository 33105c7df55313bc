"""Writes checkpoints so that one counts only when it is whole, and takes runs up again from them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from trl_fast.modeling.adapters import adapter_dtypes, set_dtypes
from trl_fast.parallel.agreement import decided_by_first, first_failure, together
from trl_fast.parallel.engines import Engine, engine_of

from .converted_weights import load_converted_weights
from .files import RECORD_FILE, read_record, state_files
from .folders import WRITING, check_whole, checkpoint_name, newest_checkpoint, remove, rotate, tidy
from .optimizer_states import find_engine_conflict
from .output_folder import locked_folder
from .parts import CheckpointPart
from .run_record import RunRecord

logger = logging.getLogger(__name__)

# Larger files are left to the system's own time: at resume, their lengths and pieces of them are looked at.
_SYNCED_BYTES = 1 << 26
_MIB = 1 << 20


class CheckpointError(RuntimeError):
    """Tells that a checkpoint could not be written."""


class Checkpoints:
    """Writes a trainer's checkpoints and finds the one to go on from.

    A checkpoint is written into `tmp-checkpoint-N/checkpoint-N`. When all processes have written their files, a record
    is added, which says what run it is of and which files belong to it, and the folder gets its name.

    Args:
        trainer: the trainer.
        make_record: describes the run, when there is something to save or to compare.

    Attributes:
        parts: what is kept beside weights, optimizer, scheduler and random states; the same in all processes, so one
            of them writes it. Of callbacks that are parts, each process writes its own.
        collective_parts: the same, of parts that all processes write together.
    """

    def __init__(self, trainer: Trainer, make_record: Callable[[], RunRecord]) -> None:
        self._trainer, self._make_record = trainer, make_record
        self.parts: list[CheckpointPart] = []
        self.collective_parts: list[CheckpointPart] = []
        self._record: RunRecord | None = None
        self._run_id: str | None = None
        self._folder: Path | None = None
        self._checked: str | None = None
        self._adapter_dtypes: dict[str, torch.dtype] = {}

    # ---- a run

    @contextmanager
    def run(self, resume: str | bool | None) -> Iterator[str | None]:
        """Locks the output folder for a run, and gives the checkpoint to go on from.

        Raises:
            ValueError: another run uses the folder, or as in `resume_point`.
        """
        with ExitStack() as locks:
            together(lambda: self._lock(locks))
            self._record = self._make_record()  # before an engine shards the model
            checkpoint = self.resume_point(resume)
            self._checked = None
            self._adapter_dtypes = adapter_dtypes(self._trainer.accelerator.unwrap_model(self._trainer.model))
            yield checkpoint

    def _lock(self, locks: ExitStack) -> None:
        """Locks the output folder, in the processes that write into it."""
        if self._trainer.args.should_save:
            locks.enter_context(locked_folder(self._output_dir))
            tidy(self._output_dir)

    def resume_point(self, resume: str | bool | None) -> str | None:
        """Returns the checkpoint to go on from, None for none; says in a line what is not as it was then.

        resume: a checkpoint's folder, or True for the newest one that is whole.

        Raises:
            ValueError: there is none, it is not whole, it is one of another run (method, model or data), or of an
                engine whose optimizer's states this run's does not read.
        """
        if not resume:
            self._run_id = None
            return None
        if resume is not True and str(resume) == self._checked:
            return self._checked
        folder, self._run_id = decided_by_first(lambda: self._choose(resume))
        # Machines may have folders of their own.
        together(lambda: check_whole(folder) if self._trainer.is_local_process_zero() else None)
        self._checked = folder
        return folder

    def _choose(self, resume: str | bool) -> tuple[str, str | None]:
        """Returns the checkpoint to go on from, and the run that it is of; None where it does not say."""
        folder = newest_checkpoint(self._output_dir) if resume is True else str(resume)
        check_whole(folder)
        accelerator = self._trainer.accelerator
        conflict = find_engine_conflict(Path(folder), engine_of(accelerator), accelerator.num_processes)
        if conflict is not None:
            raise ValueError(
                f"resume_from_checkpoint={folder!r}: {conflict}; go on with the engine that has written it, in as "
                "many processes, or start a new run from its weights: give the folder as the model"
            )
        saved, args = read_record(Path(folder)), self._trainer.args
        if saved is None:
            self._warn(f"{folder} does not say what run it is of: trl_fast has not written it. It is taken as it is.")
            return folder, None
        conflict = self.record.find_conflict(saved, same_data=not args.ignore_data_skip)
        if conflict is not None:
            raise ValueError(
                f"resume_from_checkpoint={folder!r} is no checkpoint of this run: {conflict}. To start a new run from "
                "its weights, give the folder as the model"
            )
        changes = self.record.changes(saved)
        if changes:
            self._warn(f"{folder} was written with {', '.join(changes)}: the run is not the unbroken one.")
        if saved.get("weights_only"):
            self._warn(
                f"{folder} was written with save_only_model=True: the optimizer, the schedule and the random numbers "
                "start anew."
            )
        return folder, saved.get("run")

    def _warn(self, text: str) -> None:
        logger.warning(f"resume_from_checkpoint: {text}")

    @property
    def _output_dir(self) -> str:
        return str(self._trainer.args.output_dir)

    @property
    def record(self) -> RunRecord:
        """Returns what tells this run from others."""
        if self._record is None:
            self._record = self._make_record()
        return self._record

    # ---- reading

    def keep_dtypes(self) -> None:
        """Gives adapters the dtypes back that they trained with: peft makes those float32 that it loads."""
        if self._adapter_dtypes:
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            set_dtypes(model, self._adapter_dtypes)

    def load_weights(self, checkpoint: str | None) -> None:
        """Reads the model's weights where transformers does not, which knows a checkpoint's names for the model's."""
        self.keep_dtypes()
        accelerator = self._trainer.accelerator
        engine = engine_of(accelerator)
        # FSDP and DeepSpeed have files of their own, with the model's names.
        if checkpoint is not None and engine in (Engine.ONE, Engine.DDP, Engine.TP):
            model = accelerator.unwrap_model(self._trainer.model)
            load_converted_weights(Path(checkpoint), model, is_split=engine is Engine.TP)

    def load_parts(self, checkpoint: str | None) -> None:
        """Reads the model's weights where transformers has not, and what the parts have kept."""
        self.load_weights(checkpoint)
        if checkpoint is not None:
            for part in [*self.parts, *self.collective_parts, *self._callbacks()]:
                part.load_from_checkpoint(Path(checkpoint))

    def _callbacks(self) -> list[CheckpointPart]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, CheckpointPart)]

    # ---- writing

    @property
    def run_folder(self) -> str | None:
        """Returns the folder that the trainer writes checkpoints into, while one is written."""
        return None if self._folder is None else str(self._folder)

    def write(self, output_dir: str, write: Callable[[], None]) -> Path:
        """Writes the checkpoint of the present step, and removes older ones as save_total_limit says.

        Args:
            output_dir: where checkpoints are.
            write: writes transformers' part of it into `run_folder`.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: there was no room for it, or the folder cannot be written to; older ones are as they were.
        """
        trainer, name = self._trainer, checkpoint_name(self._trainer.state.global_step)
        writing, final = Path(output_dir, f"{WRITING}{name}"), Path(output_dir, name)
        failure: Exception | None = None
        try:
            if trainer.is_local_process_zero():
                shutil.rmtree(writing, ignore_errors=True)
            self._wait()
            self._folder = writing
            (writing / name).mkdir(parents=True, exist_ok=True)
            trainer.create_model_card(Path(output_dir).name)
            self._save_parts(writing / name)
            write()
        except Exception as error:
            failure = error
        finally:
            self._folder = None
        # Who writes a part of a sharded model waits for the others as it does so: they cannot be asked then, and are
        # told of an error that leaves the training.
        if engine_of(trainer.accelerator) in (Engine.ONE, Engine.DDP):
            failure = first_failure(failure)
        self._raise(failure, writing, final)
        # Nobody writes into the folder any more when it gets its name.
        self._wait()
        try:
            if trainer.is_world_process_zero():
                self._publish(writing / name, final)
        except OSError as error:
            failure = error
        self._raise(first_failure(failure), writing, final)
        # Folders of other machines.
        if trainer.is_local_process_zero() and (writing / name).is_dir():
            self._publish(writing / name, final)
        self._wait()
        if trainer.args.should_save:
            rotate(Path(output_dir), trainer.args.save_total_limit, [str(final), trainer.state.best_model_checkpoint])
        return final

    def _save_parts(self, folder: Path) -> None:
        args = self._trainer.args
        if args.save_only_model:
            return
        for part in [*(self.parts if args.should_save else []), *self.collective_parts, *self._callbacks()]:
            part.save_to_checkpoint(folder)

    def _publish(self, folder: Path, final: Path) -> None:
        """Gives a checkpoint that is written to its end its name."""
        state, args = self._trainer.state, self._trainer.args
        if state.best_model_checkpoint is not None and Path(state.best_model_checkpoint) == folder:
            state.best_model_checkpoint = str(final)
            state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if final.is_dir() and not (final / TRAINER_STATE_NAME).is_file():
            # Somebody's own files, put there before the checkpoint was written.
            for path in final.iterdir():
                if not (folder / path.name).exists():
                    path.rename(folder / path.name)
        if self._run_id is None:
            self._run_id = self.record.run_id
        record = {**self.record.as_dict(), "run": self._run_id, "written": time.time()}
        record |= {"weights_only": args.save_only_model, "files": state_files(folder)}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1))
        _sync(folder)
        if final.exists():
            remove(final)
        folder.rename(final)
        shutil.rmtree(folder.parent, ignore_errors=True)
        _sync_path(final.parent)

    def _raise(self, failure: Exception | None, writing: Path, final: Path) -> None:
        """Raises if writing has failed, after what was written is taken away."""
        if failure is None:
            return
        if self._trainer.is_local_process_zero():
            shutil.rmtree(writing, ignore_errors=True)
        if not _is_of_the_disk(failure):
            raise failure
        raise CheckpointError(self._explain(str(failure).strip().partition("\n")[0], final)) from failure

    def _explain(self, text: str, final: Path) -> str:
        try:
            free = f", {shutil.disk_usage(final.parent).free // _MIB:,} MiB are free there"
        except OSError:
            free = ""
        try:
            older = f"The last whole checkpoint is {newest_checkpoint(str(final.parent))}"
        except ValueError:
            older = "There is no older checkpoint"
        return (
            f"{final} could not be written ({text}{free}). Make room, or set save_total_limit, save_only_model=True "
            f"or another output_dir. {older}; nothing half-written was left."
        )

    def _wait(self) -> None:
        if self._trainer.accelerator.num_processes > 1:
            self._trainer.accelerator.wait_for_everyone()


def _is_of_the_disk(failure: Exception) -> bool:
    """Says whether a failure is one of writing files."""
    if isinstance(failure, (OSError, SafetensorError)):
        return True
    # torch.save does not say what the system has told it.
    return isinstance(failure, RuntimeError) and any(
        word in str(failure) for word in ("PytorchStreamWriter", "inline_container", "unexpected pos")
    )


def _sync(folder: Path) -> None:
    """Has the system write a folder's files to the disk, but for very large ones."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size <= _SYNCED_BYTES:
            _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems do not do that for folders.
        pass
    finally:
        os.close(descriptor)
