"""Which checkpoints count: whole ones of a folder's last run; emptied, cut off and mixed ones are told apart."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import trl_fast
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.trainers.checkpoints.files import RECORD_FILE, file_fault, find_fault
from trl_fast.trainers.checkpoints.folders import newest_checkpoint, rotate, tidy

SETTINGS = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def sft(model_path, folder, **settings):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 16)}
    return make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def saved(model_path, tmp_path_factory):
    """A run's folder with checkpoints of three steps."""
    folder = tmp_path_factory.mktemp("saved")
    sft(model_path, folder).train()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def foreign(folder):
    """The same without the records: as transformers or TRL write them."""
    for path in folder.glob(f"*/{RECORD_FILE}"):
        path.unlink()
    return folder


def empty(path):
    path.write_bytes(b"")


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "empty state": (lambda c: empty(c / "trainer_state.json"), "trainer_state.json is empty"),
    "half a state": (lambda c: cut_off(c / "trainer_state.json"), "trainer_state.json is cut off or no JSON"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing|it has no weights"),
    "empty weights": (lambda c: empty(c / "model.safetensors"), "model.safetensors (is empty|has 0 bytes)"),
    "half the weights": (lambda c: cut_off(c / "model.safetensors"), "model.safetensors (is cut off|has .* bytes)"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "half an optimizer": (lambda c: cut_off(c / "optimizer.pt"), "optimizer.pt (is cut off|has .* bytes)"),
    "no schedule": (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "renamed": (lambda c: shutil.copy(c.parent / "checkpoint-1/trainer_state.json", c), "is of step 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("written_by", ["folder", "foreign"])
def test_a_damaged_checkpoint_is_left_out_with_a_line(damage, written_by, request, caplog):
    folder = request.getfixturevalue(written_by)
    spoil, said = DAMAGES[damage]
    spoil(folder / "checkpoint-3")
    assert newest_checkpoint(str(folder)) == str(folder / "checkpoint-2")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{folder}/checkpoint-3 is left out, since it is not whole: ")
    assert re.search(said, line), line


def test_files_of_two_checkpoints_are_told_apart(folder):
    assert find_fault(folder / "checkpoint-3") is None
    for name in ("optimizer.pt", "model.safetensors"):
        mixed = shutil.copytree(folder / "checkpoint-3", folder / "mixed" / "checkpoint-3", dirs_exist_ok=True)
        shutil.copy(folder / "checkpoint-2" / name, mixed)
        assert find_fault(Path(mixed)) == f"{name} is not the file that was written with the others"


def test_what_people_edit_may_be_edited(folder):
    path = folder / "checkpoint-3/trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "save_steps": 7}))
    (folder / "checkpoint-3/notes.md").write_text("good")
    assert find_fault(folder / "checkpoint-3") is None


def test_training_goes_on_from_an_older_one_or_refuses_by_name(model_path, folder, caplog):
    empty(folder / "checkpoint-3/trainer_state.json")
    with pytest.raises(ValueError, match="checkpoint-3' is not a whole checkpoint: trainer_state.json is empty; give"):
        sft(model_path, folder).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    with pytest.raises(ValueError, match="there is no such folder"):
        sft(model_path, folder).train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    trainer = sft(model_path, folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and find_fault(folder / "checkpoint-3") is None
    assert "checkpoint-3 is left out" in caplog.text


def test_the_last_run_of_the_folder_counts(model_path, folder, caplog):
    # A later run with fewer steps.
    sft(model_path, folder, max_steps=1, seed=1).train()
    assert newest_checkpoint(str(folder)) == str(folder / "checkpoint-1")
    assert "checkpoint-2, checkpoint-3 are left out, since they are of an earlier run" in caplog.text


def test_rotation_counts_whole_ones_only_and_keeps_what_it_must(folder):
    cut_off(folder / "checkpoint-3/optimizer.pt")
    rotate(folder, 1, [str(folder / "checkpoint-2")])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    rotate(folder, None, [])
    rotate(folder, 0, [])
    assert (folder / "checkpoint-2").is_dir()


def test_the_best_checkpoint_stays(model_path, tmp_path):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 16), "eval_dataset": sft_rows("text", 4)}
    settings = {**SETTINGS, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2}
    # The worst, which is the first one.
    settings |= {"load_best_model_at_end": True, "learning_rate": 1e-2, "greater_is_better": True}
    trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir() and best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {best.name, "checkpoint-4"}
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_what_a_killed_run_leaves_is_taken_away(folder, caplog):
    # While it wrote; when it had written and not yet named; while it replaced; while it removed.
    half = folder / "tmp-checkpoint-4/checkpoint-4"
    shutil.copytree(folder / "checkpoint-3", half)
    cut_off(half / "model.safetensors")
    whole = folder / "tmp-checkpoint-3"
    whole.mkdir()
    (folder / "checkpoint-3").rename(whole / "checkpoint-3")
    shutil.copytree(folder / "checkpoint-2", folder / "tmp-old-checkpoint-3")
    tidy(str(folder))
    assert newest_checkpoint(str(folder)) == str(folder / "checkpoint-3")
    assert not list(folder.glob("tmp*"))
    assert f"{folder}/tmp-checkpoint-4 is removed: a run was killed while it wrote checkpoint-4." in caplog.text
    assert f"{folder}/checkpoint-3 was written to its end by a run that was killed then; it counts." in caplog.text


def test_a_name_appears_when_all_is_written(model_path, tmp_path, monkeypatch):
    seen = []
    trainer = sft(model_path, tmp_path, max_steps=1)
    save = trainer._save_rng_state
    names = lambda: [path.name for path in tmp_path.glob("*check*")]  # noqa: E731
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: seen.append(names()) or save(folder))
    trainer.train()
    assert seen == [["tmp-checkpoint-1"]]
    assert names() == ["checkpoint-1"]


def test_files_of_tensors(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(torch.zeros(3), path)
    assert file_fault(path) is None
    torch.save(torch.zeros(3), path, _use_new_zipfile_serialization=False)
    assert file_fault(path) is None
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    assert file_fault(tmp_path / "a.safetensors") == "is cut off or no safetensors file"
