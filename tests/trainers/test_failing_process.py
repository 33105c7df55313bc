"""One of two processes fails, or finds what the other one cannot see: both end, or go on, in the same way."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from datasets import Dataset, IterableDataset
from filelock import FileLock
from transformers import TrainerCallback

import trl_fast
from support.ranks import run_on_ranks
from support.supervised import sft_rows
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.loading import base_model, load_causal_lm
from trl_fast.modeling.verification import Verdict
from trl_fast.ops.validation import NotFiniteError
from trl_fast.trainers.checkpoints.output_folder import LOCK_FILE

pytestmark = pytest.mark.processes

SETTINGS = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}


class FailsAlone(trl_fast.SFTTrainer):
    """Finds in its second step, in process 1, that the loss is no number."""

    def compute_loss(self, *args, **kwargs):
        """Computes the loss, or fails."""
        if self.state.global_step == 1 and self.accelerator.process_index == 1:
            raise NotFiniteError("the loss is nan")
        return super().compute_loss(*args, **kwargs)


def outcome(work):
    """Returns how a work ends: its value, or an error's type and text."""
    try:
        return work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def make(model, folder, *callbacks, rows=None, kind=trl_fast.SFTTrainer, **settings):
    """Makes a trainer of two rows a step and process."""
    rows = sft_rows("prompt and completion", 16) if rows is None else rows
    arguments = {"model": model, "train_dataset": rows, "callbacks": [*callbacks]}
    module = type("module", (), {"SFTConfig": trl_fast.SFTConfig, "SFTTrainer": kind})
    return make_trainer(module, folder, method="SFT", arguments=arguments, **{**SETTINGS, **settings})


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_an_error_within_a_step_of_one_process_ends_both(engine, model_path, tmp_path):
    def train():
        trainer = make(model_path, tmp_path, kind=FailsAlone)
        began = time.monotonic()
        return outcome(trainer.train), time.monotonic() - began

    (first, first_seconds), (second, second_seconds) = run_on_ranks(train, engine=engine)
    assert first == "NotFiniteError: process 1 failed: step 2: the loss is nan"
    assert second == "NotFiniteError: step 2: the loss is nan"
    assert max(first_seconds, second_seconds) < 30


def rank():
    """Returns this process's number."""
    return torch.distributed.get_rank()


def bad_rows_of_one(model_path, folder):
    """Makes a trainer from rows that have no completions in process 1."""
    trl_fast.SFTConfig(str(folder), use_cpu=True)  # makes the process group
    rows = sft_rows("prompt and completion", 8)
    make(model_path, folder, rows=rows.remove_columns("completion") if rank() else rows)


def bad_reward_of_one(model_path, folder):
    """Makes a trainer of GRPO with a reward that is no function in process 1."""
    trl_fast.GRPOConfig(str(folder), use_cpu=True, per_device_train_batch_size=8)  # makes the process group
    rows = Dataset.from_list([{"prompt": "red"}] * 8)
    reward = 5 if rank() else lambda completions, **_: [0.0] * len(completions)
    arguments = {"model": model_path, "train_dataset": rows, "reward_funcs": reward}
    make_trainer(trl_fast, folder, method="GRPO", arguments=arguments, max_completion_length=16, num_generations=2)


def broken_weight_of_one(model_path, folder):
    """Makes a trainer of a model that is broken in process 1."""
    model = load_causal_lm(model_path)
    if rank():
        with torch.no_grad():
            model.get_input_embeddings().weight[3] = torch.nan
    make(model, folder)


def resume_on_two_machines(model_path, folder):
    """Goes on from a checkpoint that the second machine, whose disk is another one, does not have."""
    (folder / str(rank())).mkdir()
    before, local, os.environ["LOCAL_RANK"] = os.getcwd(), os.environ["LOCAL_RANK"], "0"
    os.chdir(folder / str(rank()))
    try:
        make(model_path, "run", max_steps=1, save_strategy="steps", save_steps=1).train()
        if rank():
            shutil.rmtree("run/checkpoint-1")
        make(model_path, "run").train(resume_from_checkpoint=True)
    finally:
        os.chdir(before)
        os.environ["LOCAL_RANK"] = local


def locked_by_another_run(model_path, folder):
    """Trains in a folder that is locked."""
    make(model_path, folder / "locked").train()


def full_disk_of_one(model_path, folder):
    """Trains until a checkpoint, for which process 0 has no room."""
    trainer = make(model_path, folder / "full", max_steps=2, save_strategy="steps", save_steps=1)
    if rank() == 0:
        no_room = OSError(errno.ENOSPC, "No space left on device")
        trainer._save_rng_state = lambda folder: (_ for _ in ()).throw(no_room)
    trainer.train()


def beginning_anew_alone(model_path, folder):
    """Makes a trainer that would begin anew with a smaller batch."""
    make(model_path, folder, auto_find_batch_size=True)


# The process that finds it, and what it says.
FOUND_BY_ONE = {
    bad_rows_of_one: (1, "ValueError: {}The train dataset has the columns ['prompt']"),
    broken_weight_of_one: (1, "NotFiniteError: {}LlamaForCausalLM"),
    resume_on_two_machines: (1, "ValueError: {}resume_from_checkpoint="),
    locked_by_another_run: (0, "FolderInUseError: {}output_dir="),
}


def test_what_one_process_finds_ends_both(model_path, tmp_path):
    (tmp_path / "locked").mkdir()

    def try_all():
        works = (*FOUND_BY_ONE, beginning_anew_alone, full_disk_of_one)
        return [outcome(partial(work, model_path, tmp_path)) for work in works]

    with FileLock(tmp_path / "locked" / LOCK_FILE):
        found = run_on_ranks(try_all)
    for number, (finder, said) in enumerate(FOUND_BY_ONE.values()):
        assert found[finder][number].startswith(said.format(""))
        assert found[1 - finder][number].startswith(said.format(f"process {finder} failed: "))
    for texts in found:
        assert texts[-2].startswith("ValueError: auto_find_batch_size=True: of several processes")
        assert texts[-1].startswith(f"CheckpointError: {tmp_path}/full/checkpoint-1 could not be written (")
        assert "No space left on device" in texts[-1]
    assert not list((tmp_path / "full").glob("*checkpoint*"))


def test_a_trainer_of_grpo_that_one_process_cannot_make_ends_both(model_path, tmp_path):
    first, second = run_on_ranks(lambda: outcome(partial(bad_reward_of_one, model_path, tmp_path)))
    assert second.startswith("TypeError: reward_funcs")
    assert first.startswith("TypeError: process 1 failed: reward_funcs")


class StopsAlone(TrainerCallback):
    """Asks for the end of the training in process 1, in an event of the second step."""

    def __init__(self, event):
        setattr(self, event, self._ask)

    def _ask(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            control.should_training_stop = True


class KillsAlone(TrainerCallback):
    """Sends SIGTERM to process 1 in the second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Sends the signal."""
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def steps_until(model_path, folder, callback):
    """Returns how a training of five steps ends, and the checkpoints that it leaves."""
    trainer = make(model_path, folder, callback, max_steps=5, save_strategy="steps", save_steps=100, logging_steps=1)
    said = outcome(lambda: trainer.train() and "done")
    return said, trainer.state.global_step, sorted(path.name for path in folder.glob("checkpoint-*"))


def test_who_stops_alone_stops_both(model_path, tmp_path):
    def stop():
        found = {
            name: steps_until(model_path, tmp_path / name, StopsAlone(name)) for name in ("on_step_end", "on_log")
        }
        return {**found, "SIGTERM": steps_until(model_path, tmp_path / "SIGTERM", KillsAlone())}

    first, second = run_on_ranks(stop)
    assert first == second
    assert first["on_step_end"] == ("done", 2, [])
    assert first["on_log"] == ("done", 3, [])
    said, steps, checkpoints = first["SIGTERM"]
    assert said == "SystemExit: 143" and checkpoints == [f"checkpoint-{steps}"]


def uneven_parts():
    """Returns a stream of two parts, of six rows and of three."""
    rows = sft_rows("prompt and completion", 9).to_list()

    def read(parts):
        for part in parts:
            yield from rows[:6] if part == 0 else rows[6:]

    return IterableDataset.from_generator(read, gen_kwargs={"parts": [0, 1]})


def test_processes_that_cannot_see_or_have_the_same_go_on_alike(model_path, tmp_path):
    def train():
        trl_fast.SFTConfig(str(tmp_path), use_cpu=True)
        # What a process measures that has no weights yet.
        readout = trl_fast.SFTTrainer.readout
        blind = readout._replace(verify=lambda *args, **kwargs: Verdict(9.0, 9.0, 1e-3))
        trl_fast.SFTTrainer.readout = blind if rank() else readout
        chosen = make(model_path, tmp_path)
        streamed = make(model_path, tmp_path, rows=uneven_parts(), max_steps=3, logging_steps=1)
        streamed.train()
        epochs = [log["epoch"] for log in streamed.state.log_history]
        arguments = {"model": model_path, "train_dataset": color_pairs(10)}
        preferences = make_trainer(trl_fast, tmp_path, arguments=arguments, precompute_ref_log_probs=True, **SETTINGS)
        columns = preferences.train_dataset["ref_chosen_logps"][:]
        return chosen.layout.name, base_model(chosen.model).trl_fast_fused_head, epochs, columns

    first, second = run_on_ranks(train)
    assert first == second
    layout, fused, epochs, columns = first
    assert (layout, fused) == ("packed", True)
    assert len(columns) == 10
    # The shorter part ends both epochs after two steps.
    assert epochs[:3] == pytest.approx([1 / 3, 2 / 3, 4 / 3])


def rows_without_learned_tokens_in_the_second_process():
    """Yields four rows a step, of which the last two, those of the second process, have nothing to learn."""
    for row in range(12):
        yield {"input_ids": [5, 6, 7, 8, 9 + row], "completion_mask": [0, 1, 1, 1, 1] if row % 4 < 2 else [0] * 5}


def train_stream(model_path, folder, batch_size):
    """Returns the logs of two steps and of an evaluation."""
    rows = IterableDataset.from_generator(rows_without_learned_tokens_in_the_second_process)
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    trainer = make(model_path, folder, rows=rows, **sizes, max_steps=2, logging_steps=1)
    trainer.train()
    trainer.evaluate(Dataset.from_list([{"input_ids": [5, 6, 7]}]))
    return [log for log in trainer.state.log_history if "train_loss" not in log]


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_processes_without_learned_tokens_and_without_rows_of_their_own_go_along(engine, model_path, tmp_path):
    first, second = run_on_ranks(train_stream, model_path, tmp_path / "two", 2, engine=engine)
    one = train_stream(model_path, tmp_path / "one", 4)
    assert_same_logs(first, one, rel=5e-7, abs=1e-7)
    assert_same_logs(second, one, rel=5e-7, abs=1e-7)
