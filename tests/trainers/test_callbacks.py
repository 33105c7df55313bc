"""What people watch during a run, and the reference that follows the policy."""

import io

import torch
from rich.console import Console

import trl_fast
from support.training import color_pairs, make_trainer
from trl_fast.trainers import RichProgressCallback, SyncRefModelCallback
from trl_fast.trainers.callbacks import metrics_table


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


def test_sync_moves_the_reference_by_alpha():
    policy, reference = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = [0.25 * p + 0.75 * r for p, r in zip(policy.parameters(), reference.parameters(), strict=True)]
    SyncRefModelCallback.sync_target_model(policy, reference, 0.25)
    for got, wanted in zip(reference.parameters(), expected, strict=True):
        torch.testing.assert_close(got, wanted)
