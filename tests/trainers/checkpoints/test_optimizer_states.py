"""A checkpoint whose optimizer's states this run's engine does not read is refused: they would begin anew."""

from __future__ import annotations

import pytest

import trl_fast
from support.ranks import RankError, run_on_ranks
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.parallel.engines import Engine
from trl_fast.trainers.checkpoints.files import RECORD_FILE
from trl_fast.trainers.checkpoints.optimizer_states import find_engine_conflict

WRITTEN = {
    "DeepSpeed": [
        "global_step2/",
        "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt",
        "model.safetensors",
    ],
    "FSDP": ["optimizer.bin", "pytorch_model_fsdp.bin", "model.safetensors"],
    "FSDP, sharded": ["optimizer_0/", "pytorch_model_fsdp_0/"],
    "one process or DDP": ["optimizer.pt", "model.safetensors"],
}
READS = {
    "DeepSpeed": {Engine.ZERO0, Engine.ZERO1, Engine.ZERO2, Engine.ZERO3},
    "FSDP": {Engine.FSDP1, Engine.FSDP2},
    "one process or DDP": {Engine.ONE, Engine.DDP, Engine.TP},
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_only_the_engine_that_has_written_them_reads_states(kind, tmp_path):
    for name in WRITTEN[kind]:
        path = tmp_path / name
        path.mkdir() if name.endswith("/") else path.touch()
    writer = kind.removesuffix(", sharded")
    for engine in Engine:
        conflict = find_engine_conflict(tmp_path, engine, 2)
        assert conflict == (
            None
            if engine in READS[writer]
            else f"its optimizer's states were written by {writer}, and {engine.value} does not read them"
        )


def test_zero_3_reads_the_files_of_as_many_processes(tmp_path):
    states = tmp_path / "global_step2"
    states.mkdir()
    for rank in range(2):
        (states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    expected = "it has the files of 2 processes of DeepSpeed ZeRO-3, and this run has 4"
    assert find_engine_conflict(tmp_path, Engine.ZERO3, 4) == expected
    assert find_engine_conflict(tmp_path, Engine.ZERO3, 2) is None
    (tmp_path / "latest_universal").touch()
    assert find_engine_conflict(tmp_path, Engine.ZERO3, 4) is None


def test_a_stage_below_3_writes_no_parts_of_weights(tmp_path):
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2/mp_rank_00_model_states.pt").touch()
    assert "the files of another stage" in find_engine_conflict(tmp_path, Engine.ZERO3, 2)
    assert find_engine_conflict(tmp_path, Engine.ZERO2, 4) is None


def test_weights_alone_are_of_no_engine(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert not any(find_engine_conflict(tmp_path, engine, 2) for engine in Engine)


def run(model_path, folder, resume=None):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 8)}
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "per_device_train_batch_size": 2}
    settings["gradient_accumulation_steps"] = 1
    trainer = make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **settings)
    trainer.train(resume_from_checkpoint=resume and str(resume))


def test_a_run_does_not_begin_its_optimizer_anew(model_path, tmp_path):
    """A checkpoint as DeepSpeed leaves it, also one that somebody else has written."""
    run(model_path, tmp_path / "one")
    checkpoint = tmp_path / "one/checkpoint-1"
    for name in ("optimizer.pt", RECORD_FILE):
        (checkpoint / name).unlink()
    (checkpoint / "global_step1").mkdir()
    with pytest.raises(ValueError, match="were written by DeepSpeed, and one process does not read them; go on with"):
        run(model_path, tmp_path / "two", checkpoint)


@pytest.mark.slow
def test_engines_do_not_go_on_from_each_others_checkpoints(model_path, tmp_path):
    run(model_path, tmp_path / "one")
    written = {"one process or DDP": "one", "DeepSpeed": "zero2", "FSDP": "fsdp2"}
    for engine in ("zero2", "fsdp2"):
        run_on_ranks(run, model_path, tmp_path / engine, engine=engine)
    for engine, name in (("fsdp2", "FSDP2"), ("zero2", "DeepSpeed ZeRO-2"), ("ddp", "DDP")):
        for writer, folder in written.items():
            if folder == engine or (engine, folder) == ("ddp", "one"):
                continue
            with pytest.raises(RankError, match=f"were written by {writer}, and {name} does not read them"):
                run_on_ranks(run, model_path, tmp_path / "two", tmp_path / folder / "checkpoint-1", engine=engine)
