"""One run at a time in an output folder; a dead one does not keep others out."""

import json
import os
import signal
import socket
import time

import pytest
from filelock import FileLock

import trl_fast
from support.killing import forked, wait
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.trainers.checkpoints import output_folder
from trl_fast.trainers.checkpoints.output_folder import LOCK_FILE, OWNER_FILE, FolderInUseError, locked_folder


def hold(folder):
    with locked_folder(str(folder)):
        (folder / "held").touch()
        time.sleep(60)


def held_by_a_fork(folder):
    process = forked(lambda: hold(folder), folder / "log")
    while not (folder / "held").exists():
        time.sleep(0.01)
    return process


def assert_refused(folder, said):
    with pytest.raises(FolderInUseError, match=said), locked_folder(str(folder)):
        pass


def test_a_second_run_is_refused_with_process_and_host_and_a_killed_one_frees_the_folder(model_path, tmp_path):
    process = held_by_a_fork(tmp_path)
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 8)}
    trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, max_steps=1)
    try:
        with pytest.raises(ValueError, match=f"is in use by the run of process {process} on {socket.gethostname()}; "):
            trainer.train()
    finally:
        os.kill(process, signal.SIGKILL)
        wait(process)
    trainer.train()
    assert trainer.state.global_step == 1
    # Another one in the same process, after the first.
    make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, max_steps=1).train()
    assert not (tmp_path / OWNER_FILE).exists()


def test_a_failed_training_frees_the_folder(tmp_path):
    with pytest.raises(KeyError), locked_folder(str(tmp_path)):
        raise KeyError
    with locked_folder(str(tmp_path)):
        assert_refused(tmp_path, f"run of process {os.getpid()} on")


def test_what_a_killed_run_has_left_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(output_folder, "ORPHAN_PATIENCE", 0.2)
    gone = forked(lambda: None, tmp_path / "log")
    wait(gone)
    orphan = FileLock(tmp_path / LOCK_FILE)
    with orphan:
        (tmp_path / OWNER_FILE).write_text(json.dumps({"pid": gone, "host": socket.gethostname()}))
        assert_refused(tmp_path, f"a process that the killed run {gone} has left; wait for its end")
    assert "waiting up to 0.2 s for processes that a run which was killed has left" in caplog.text


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output_folder.FileLock, "acquire", refuse)
    with locked_folder(str(tmp_path)):
        pass
    assert "cannot be locked ([Errno 37] No locks available): see that no second run writes into it" in caplog.text
