"""Callbacks: the progress that people watch, the reference that follows the policy, the average of its weights."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback, TrainerState

import trl_fast
from support.training import color_pairs, make_trainer
from trl_fast.trainers import (
    BEMACallback,
    GRPOConfig,
    LogCompletionsCallback,
    RichProgressCallback,
    SyncRefModelCallback,
)
from trl_fast.trainers.base.progress import live_table, metrics_table


def render(rows, width):
    console = Console(width=width, file=io.StringIO())
    console.print(metrics_table(rows, "metrics", width))
    return console.file.getvalue()


def test_the_table_shows_the_first_and_the_last_logs_that_fit():
    rows = [{"step": step, "rewards/margins": step * 1.23456} for step in range(30)]
    shown = render(rows, 60)
    assert "step 0" in shown and "step 29" in shown and "step 15" not in shown
    assert "35.8" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 60
    assert "step 0" in render(rows[:1], 80)


def test_the_logs_of_a_step_share_a_column_without_empty_ones():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    shown = render([*rows, {"step": 2, "train_loss": 1.5, "total_flos": 1e9}], 80)
    assert shown.count("step 2") == 1 and "eval_loss" in shown and "train_loss" in shown and "total_flos" not in shown


def test_the_live_view_shows_what_tells_most_in_eight_lines():
    metrics = {f"m{index}": float(index) for index in range(30)}
    rows = [{"step": step, **metrics, "rewards/mean": 0.25} for step in range(9)]
    console = Console(width=80, file=io.StringIO())
    console.print(live_table(rows, GRPOConfig.first_metrics, 80))
    console.print(live_table(rows, ("absent", "rewards/mean", "m29"), 80))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 16 and max(map(len, lines)) <= 80 and "step 8" in lines[0]
    assert [line.split()[0] for line in lines[8:]] == ["metric", "rewards/mean", "m29", "m0", "m1", "m2", "m3", "m4"]


def test_a_terminal_gets_a_bar_and_a_table(model_path, tmp_path):
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    trainer = make_trainer(
        trl_fast,
        tmp_path,
        arguments={
            "model": model_path,
            "train_dataset": color_pairs(),
            "eval_dataset": color_pairs(6),
            "callbacks": [RichProgressCallback(console)],
        },
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    shown = console.file.getvalue()
    for expected in ("training", "3/3", "rewards/margins", "eval_loss", "step 3"):
        assert expected in shown
    # The whole table is there once, at the end; what was live is erased by then.
    before, *tables = shown.split("┏")
    assert len(tables) == 1 and before.rfind("\x1b[2K") > before.rfind("3/3")


HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def assert_terminal_is_free(console):
    shown = console.file.getvalue()
    assert shown.count(HIDE_CURSOR) > 0 and shown.rfind(SHOW_CURSOR) > shown.rfind(HIDE_CURSOR)
    assert not isinstance(sys.stdout, FileProxy) and not isinstance(sys.stderr, FileProxy)
    # rich refuses, or nests, a display beside one that is still alive.
    with Live("next", console=console) as live:
        assert not getattr(live, "_nested", False)


class Failing(TrainerCallback):
    """Fails when its event comes."""

    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.fail)

    def fail(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("event", ["on_train_begin", "on_substep_end", "on_log", "in a step"])
def test_a_failed_run_gives_the_terminal_back(event, error, model_path, tmp_path, monkeypatch):
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    progress = RichProgressCallback(console)
    callbacks = [progress] if event == "in a step" else [progress, Failing(event, error)]
    trainer = make_trainer(
        trl_fast, tmp_path, arguments={"model": model_path, "train_dataset": color_pairs(), "callbacks": callbacks}
    )
    if event == "in a step":
        monkeypatch.setattr(trainer, "compute_loss", Failing("on_log", error).fail)
    with pytest.raises(type(error)) as raised:
        trainer.train()
    assert raised.value is error
    assert progress.live is None
    assert_terminal_is_free(console)


def test_training_that_begins_anew_has_one_bar():
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    progress, state = RichProgressCallback(console), TrainerState(max_steps=3, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    first = progress.live
    progress.on_train_begin(None, state, None)
    assert not first.is_started and progress.live.is_started
    progress.on_train_end(None, state, None)
    assert_terminal_is_free(console)


def test_a_file_gets_each_log_once():
    console = Console(width=100, file=io.StringIO())
    progress, state = RichProgressCallback(console), TrainerState(max_steps=3, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 0.25})
    progress.on_train_end(None, state, None)
    assert console.file.getvalue() == "step 0: loss 0.25\n"


def test_sync_moves_the_reference_by_alpha():
    policy, reference = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = [0.25 * p + 0.75 * r for p, r in zip(policy.parameters(), reference.parameters(), strict=True)]
    SyncRefModelCallback.sync_target_model(policy, reference, 0.25)
    for got, wanted in zip(reference.parameters(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def train_with(callbacks, model_path, tmp_path, make=None, **settings):
    """A short run of ours with these callbacks, and with those that `make(trainer)` gives."""
    arguments = {
        "model": model_path,
        "train_dataset": color_pairs(),
        "eval_dataset": color_pairs(5).map(lambda row, i: {"prompt": row["prompt"] * (1 + i)}, with_indices=True),
        "callbacks": callbacks,
    }
    trainer = make_trainer(trl_fast, tmp_path, arguments=arguments, **settings)
    for callback in make(trainer) if make else ():
        trainer.add_callback(callback)
    trainer.train()
    return trainer


BEMA_SETTINGS = [
    {"update_freq": 1},
    {"update_freq": 2, "update_after": 1, "lag": 3, "multiplier": 0.5, "bias_power": 0.4, "ema_power": 0.7},
    {"update_freq": 1, "min_ema_multiplier": 0.9},
]


@pytest.mark.parametrize("settings", BEMA_SETTINGS)
def test_the_averaged_weights_are_trls(settings, model_path, tmp_path):
    ours, theirs = BEMACallback(**settings), trl.BEMACallback(**settings)
    trainer = train_with([ours, theirs], model_path, tmp_path, max_steps=4, gradient_accumulation_steps=1)
    pairs = zip(ours.running_model.named_parameters(), theirs.running_model.parameters(), strict=True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    for (name, averaged), expected in pairs:
        torch.testing.assert_close(averaged, expected)
        assert torch.equal(averaged, saved.get_parameter(name))
    moved = [
        not torch.equal(a, b) for a, b in zip(ours.running_model.parameters(), trainer.model.parameters(), strict=True)
    ]
    assert all(moved)


def test_weights_that_are_not_trained_are_not_averaged(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    callback, state = BEMACallback(update_freq=1), SimpleNamespace(global_step=1)
    callback.on_train_begin(SimpleNamespace(distributed_state=None), state, None, model=model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    callback.on_step_end(None, state, None, model=model)
    frozen, trained = callback.running_model
    torch.testing.assert_close(frozen.bias, model[0].bias - 1)
    share, correction = 11**-0.5, 11**-0.2
    torch.testing.assert_close(trained.bias, model[1].bias - 1 + share + correction)


GREEDY = GenerationConfig(max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("num_prompts, freq", [(None, 2), (3, None)])
def test_completions_are_trls(num_prompts, freq, model_path, tmp_path, capsys):
    made = []

    def make(trainer):
        for module in (trl_fast, trl):
            made.append(module.LogCompletionsCallback(trainer, GREEDY, num_prompts=num_prompts, freq=freq))
        return made

    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "max_steps": 2}
    train_with([], model_path, tmp_path, make, **settings)
    assert made[0].table == made[1].table
    assert len(made[0].table) == (5 if num_prompts is None else 6)
    assert "completions at step 2" in capsys.readouterr().out


def test_conversations_become_prompts_and_tables_go_to_wandb(model_path, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.append))
    trainer = make_trainer(
        trl_fast, tmp_path, arguments={"model": model_path, "train_dataset": color_pairs(), "eval_dataset": chats()}
    )
    callback, generate, asked = LogCompletionsCallback(trainer, GREEDY), trainer.model.generate, []
    monkeypatch.setattr(trainer.model, "generate", lambda **given: asked.append(given) or generate(**given))
    args = SimpleNamespace(per_device_eval_batch_size=2, report_to=["wandb"])
    state = SimpleNamespace(global_step=4, eval_steps=2)
    trainer.model.train()
    for _ in range(2):
        callback.on_step_end(args, state, None, processing_class=trainer.processing_class)
    assert trainer.model.training
    (table,) = [entry["completions"] for entry in logged]
    assert list(table.columns) == ["step", "prompt", "completion"] and list(table.step) == ["4"] * 3
    assert table.prompt[0] == "<|im_start|>user\nWhat color?<|im_end|>\n<|im_start|>assistant\n"
    # transformers warns of settings beside a config.
    assert asked and all("generation_config" in given and "use_cache" not in given for given in asked)


def chats():
    def message(role, content):
        return [{"role": role, "content": content}]

    rows = {"prompt": [message("user", "What color?")] * 3}
    rows |= {name: [message("assistant", name)] * 3 for name in ("chosen", "rejected")}
    return Dataset.from_dict(rows)


@pytest.mark.parametrize(
    "dataset, options, message",
    [
        (None, {}, "column 'prompt'; it has None"),
        (color_pairs(3).remove_columns("prompt"), {}, "it has \\['chosen', 'rejected'\\]"),
        (color_pairs(3), {"num_prompts": 4}, "between 1 and the dataset's 3 rows, got 4"),
    ],
)
def test_completions_need_prompts(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        LogCompletionsCallback(SimpleNamespace(eval_dataset=dataset), **options)


def test_an_average_needs_updates():
    with pytest.raises(ValueError, match="update_freq.*0"):
        BEMACallback(update_freq=0)
