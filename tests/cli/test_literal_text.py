"""Names, paths, data and errors are shown as they are, whatever rich would make of them."""

import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import TrainerState

import trl_fast
from support.models import tiny_config
from trl_fast.cli import env, plan, training, validate
from trl_fast.cli.main import main
from trl_fast.cli.quiet import init_zero_verbose
from trl_fast.console import make_console
from trl_fast.data.validation import validate as look_for_faults
from trl_fast.planning.memory_timeline import KINDS
from trl_fast.trainers import LogCompletionsCallback, RichProgressCallback
from trl_fast.trainers.online.completions_log import CompletionsLog
from trl_fast.trainers.run_report.report import print_lines

# A style, an end of none, which rich takes for an error, what looks like a style, and an emoji.
TEXT = "[red]x[/nope] [tok] :smile:"


@pytest.fixture(autouse=True)
def _terminal_of_400_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def log(force_terminal):
    """Returns what a progress bar prints to a console of somebody's own, in which markup means something."""
    console = Console(file=io.StringIO(), force_terminal=force_terminal, width=400, color_system=None)
    callback, state = RichProgressCallback(console), TrainerState(max_steps=2, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={TEXT: 0.5})
    callback.close()
    print(console.file.getvalue())


def log_line(tmp_path, monkeypatch):
    log(force_terminal=False)


def live_table(tmp_path, monkeypatch):
    log(force_terminal=True)


def completions(**columns):
    kept = CompletionsLog(4)
    kept.add(columns.pop("rewards", {"reward": [1.0]}), completion=["b"], advantage=[0.0], **columns)
    kept.show(1, None)


def reward_function(tmp_path, monkeypatch):
    completions(prompt=["a"], rewards={TEXT: [1.0]})


def prompt(tmp_path, monkeypatch):
    completions(prompt=[TEXT])


def column_of_the_data(tmp_path, monkeypatch):
    completions(prompt=["a"], **{TEXT: ["c"]})


def generated(tmp_path, monkeypatch):
    trainer = SimpleNamespace(eval_dataset=Dataset.from_dict({"prompt": [TEXT]}))
    callback = LogCompletionsCallback(trainer)
    callback.table = [("1", TEXT, "b")]
    callback._report([])


def saved_folder(tmp_path, monkeypatch):
    nothing = lambda *_, **__: None  # noqa: E731
    monkeypatch.setattr("trl_fast.planning.forecast.forecast", nothing)
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=TEXT, push_to_hub=False, run_report=False),
        accelerator=SimpleNamespace(end_training=nothing),
        is_world_process_zero=lambda: True,
        **dict.fromkeys(("train", "save_model", "create_model_card"), nothing),
    )
    training.train(trainer, None)


def run_report(tmp_path, monkeypatch):
    print_lines([("model", TEXT)])


def error(tmp_path, monkeypatch):
    assert main(["validate", "--dataset_name", f"{TEXT}.jsonl"]) == 2


def pairs():
    return Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["yes", "no"], "rejected": ["no", "yes"]})


def split(tmp_path, monkeypatch):
    report = look_for_faults({TEXT: pairs()})
    validate.show(report, validate.ValidateArguments())


def split_in_a_bar(tmp_path, monkeypatch):
    look_for_faults({TEXT: pairs()}, progress=True)


def report_folder(tmp_path, monkeypatch):
    validate.show(look_for_faults(pairs()), validate.ValidateArguments(output_dir=f"{tmp_path}/{TEXT}"))


def environment(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "versions", lambda: [("trl-fast", TEXT)])
    env.print_environment()


def planned_model(tmp_path, monkeypatch):
    folder = tmp_path / TEXT
    tiny_config("llama").save_pretrained(folder)
    assert main(["plan", "sft", "--model_name_or_path", str(folder), "--max_length", "8", "--compare", "false"]) == 0


def planned_switch(tmp_path, monkeypatch):
    peak = SimpleNamespace(parts=dict.fromkeys(KINDS, 1), bytes=len(KINDS), stage="forward")
    row = plan.Row(TEXT, peak, None)
    make_console().print(plan.rows_table([row], "rows", 8))


def logged_error(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    init_zero_verbose()
    logging.error(TEXT)


PATHS = [
    log_line,
    live_table,
    reward_function,
    prompt,
    column_of_the_data,
    generated,
    saved_folder,
    run_report,
    error,
    split,
    split_in_a_bar,
    report_folder,
    environment,
    planned_model,
    planned_switch,
    logged_error,
]


@pytest.mark.parametrize("show", PATHS, ids=lambda show: show.__name__)
def test_text_is_shown_as_it_is(show, tmp_path, capsys, monkeypatch):
    show(tmp_path, monkeypatch)
    shown = capsys.readouterr()
    assert TEXT in shown.out + shown.err


def test_nobody_else_makes_a_console():
    package = Path(trl_fast.__file__).parent
    makers = {path.name for path in package.rglob("*.py") if re.search(r"\b(Console|TextColumn)\(", path.read_text())}
    assert makers == {"console.py"}
