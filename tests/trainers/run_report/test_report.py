"""Reports of whole runs: what is printed, run.json and report.html."""

import json
import os
import re
import signal

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

import trl_fast
from support.supervised import sft_rows
from support.training import color_pairs, make_trainer
from trl_fast.trainers.run_report import report
from trl_fast.trainers.run_report.forecast import Forecast

LORA = LoraConfig(r=2, target_modules=["q_proj"])


def dpo(model_path, folder, *callbacks, peft=LORA, **settings):
    arguments = {"model": model_path, "train_dataset": color_pairs(8), "peft_config": peft, "callbacks": [*callbacks]}
    return make_trainer(trl_fast, folder, arguments=arguments, **settings)


def read(folder):
    return json.loads((folder / "run.json").read_text())


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("no luck\nat all")


class Looks(TrainerCallback):
    """Reads run.json in the middle of a run."""

    def on_step_end(self, args, state, control, **kwargs):
        with open(f"{args.output_dir}/run.json") as file:
            self.seen = json.load(file)


def test_a_run_from_start_to_end(model_path, tmp_path, capsys):
    looks = Looks()
    trainer = dpo(model_path, tmp_path, looks, save_strategy="steps", save_steps=2, max_steps=4)
    trainer.forecast = Forecast(5 << 30, 0.5, "estimate for this CPU")
    trainer.train()
    trainer.save_model()
    out = capsys.readouterr().out
    labels = [line.split()[0] for line in out.splitlines() if line]
    assert labels[:4] == ["trl_fast", "kernels", "memory", "steps"]
    assert labels[-7:] == ["done", "memory", "resume", "report", "model", "chat", "merge"]
    assert re.search(r"rows shared_prefix: \d+% fewer tokens than padded rows \(first 8 rows\)", out)
    assert "5.00 GiB expected (estimate for this CPU)" in out and "a step: 8 pairs (4 × 2 × 1)" in out
    assert looks.seen["status"] == "running" and looks.seen["measured"] is None
    run = read(tmp_path)
    assert run["schema"] == 1 and run["status"] == "done" and run["model_folder"] == str(tmp_path)
    assert run["settings"]["changed"]["learning_rate"] == 1e-3 and "beta" not in run["settings"]["changed"]
    assert run["settings"]["all"]["beta"] == 0.1 and run["data"]["rows"] == 8
    assert run["model"]["adapter"] == "LoRA" and 0 < run["model"]["trained"] < run["model"]["parameters"]
    # What was counted before the first batch, on all rows, is what was computed.
    measured = run["measured"]
    assert measured["saved"] == pytest.approx(run["kernels"]["saved"], abs=0.05)
    assert measured["tokens"] == 4 * 8 * run["kernels"]["tokens_a_row"]
    assert measured["steps"] == 4 and measured["checkpoint"].endswith("checkpoint-4")
    assert run["plan"] == {"peak_bytes": 5 << 30, "step_seconds": 0.5, "note": "estimate for this CPU"}
    assert run["metrics"]["train_loss"] > 0


def test_the_page_needs_nothing_else(model_path, tmp_path):
    trainer = dpo(model_path, tmp_path, peft=None, run_name="<b>bold</b>")
    trainer.train()
    assert read(tmp_path)["sessions"][0]["status"] == "done"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") > 5 and "rewards/margins" in page
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page) and "<b>bold" not in page


def test_a_resumed_run_goes_on_in_the_same_files(model_path, tmp_path, capsys):
    dpo(model_path, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    dpo(model_path, tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    run = read(tmp_path)
    assert [session["first_step"] for session in run["sessions"]] == [0, 2]
    assert [session.get("last_step") for session in run["sessions"]] == [2, 4]
    assert run["measured"]["steps"] == 2 and "from step 2" in capsys.readouterr().out
    # The curves are those of the whole run.
    page = (tmp_path / "report.html").read_text()
    assert re.search(r'aria-label="loss by step">(?s:.*?)points="[^ "]+ [^ "]+ [^ "]+ [^ "]+"', page)


def test_a_run_that_fails_says_so_in_its_files(model_path, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="no luck"):
        dpo(model_path, tmp_path, Fails(), logging_steps=10).train()
    run = read(tmp_path)
    assert run["status"] == "failed: RuntimeError: no luck" and run["measured"]["steps"] == 2
    # Nothing was logged yet.
    assert run["measured"]["tokens"] > 0
    assert "failed: RuntimeError: no luck" in (tmp_path / "report.html").read_text()
    assert "done" not in capsys.readouterr().out


class Interrupts(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("save", ["steps", "no"])
def test_an_interrupted_run_says_how_to_go_on(save, model_path, tmp_path, capsys):
    trainer = dpo(model_path, tmp_path, Interrupts(), save_strategy=save, save_steps=100)
    trainer.run_report.command = ["trl-fast", "dpo", "--seed", "1"]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run, out = read(tmp_path), capsys.readouterr().out
    assert run["status"] == "interrupted" and "\ninterrupted" in out
    command = "trl-fast dpo --seed 1 --resume_from_checkpoint true"
    assert (f"{command}  (from {tmp_path / 'checkpoint-2'})" in out) == (save == "steps")
    assert ("there is no checkpoint" in out) == (save == "no")


def test_nothing_is_said_or_written_where_it_is_not_wanted(model_path, tmp_path, capsys):
    trainer = dpo(model_path, tmp_path, run_report=False, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "kernels" not in capsys.readouterr().out and not (tmp_path / "run.json").exists()


def test_no_run_is_lost_for_its_report(model_path, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_run", full)
    monkeypatch.setattr(report, "write_page", lambda *_: 1 / 0)
    trainer = dpo(model_path, tmp_path, max_steps=1)
    assert trainer.train().global_step == 1
    said = [record.message for record in caplog.records if record.message.startswith("run_report")]
    assert said[0] == f"run_report: {tmp_path} cannot be written to (No space left on device)."
    assert said[-1] == "run_report: ZeroDivisionError: division by zero. The run itself goes on."


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_packed_data_are_counted(model_path, tmp_path, packing):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 16)}
    trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, packing=packing, max_length=64)
    trainer.train()
    kernels = read(tmp_path)["kernels"]
    assert kernels["layout"] == "packed" and 0 < kernels["saved"] < 0.8 and kernels["layout_reason"] is None
