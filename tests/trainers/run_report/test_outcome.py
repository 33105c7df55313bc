"""The lines at the end of a run, from facts alone."""

from dataclasses import replace

import pytest

from trl_fast.trainers.run_report.forecast import Forecast
from trl_fast.trainers.run_report.naming import command_without_secrets, without_secrets
from trl_fast.trainers.run_report.outcome import OF_PROCESS, Outcome, model_lines, outcome_lines, resume_command

OUTCOME = Outcome("done", 0, 100, 220.0, 20.0, 500_000, 0.41, 3 << 30, "GPU memory", "out/checkpoint-100")


def test_the_end_of_a_run():
    assert outcome_lines(OUTCOME, Forecast(4 << 30, None, ""), "go on", ["out/run.json", "out/report.html"]) == [
        (
            "done",
            "100 steps in 3 min 40 s, 20.0 s of them evaluating (2.0 s a step); 2,500 tokens a second, 500.0k in all, "
            "41% fewer computed than in padded rows",
        ),
        ("memory", "peak 3.00 GiB (GPU memory); 4.00 GiB were expected"),
        ("resume", "go on"),
        ("report", "out/run.json, out/report.html"),
    ]


def test_the_memory_of_a_process_is_held_against_that_of_tensors():
    lines = outcome_lines(replace(OUTCOME, peak_of=OF_PROCESS), Forecast(4 << 30, None, ""), "", [])
    assert lines[1] == ("memory", "peak 3.00 GiB (memory of the process); 4.00 GiB of tensors were expected")


def test_an_interrupted_run_says_from_where_it_goes_on():
    interrupted = replace(OUTCOME, status="interrupted")
    assert ("resume", "go on  (from out/checkpoint-100)") in outcome_lines(interrupted, None, "go on", [])
    lines = outcome_lines(replace(interrupted, checkpoint=None), None, "go on", [])
    assert lines[-1] == ("resume", "there is no checkpoint: the run begins anew (save_strategy, save_steps)")


def test_a_run_without_steps():
    lines = outcome_lines(replace(OUTCOME, steps=0, tokens=None, saved=None, evaluating=0.0), None, "", [])
    assert lines[0] == ("done", "0 steps in 3 min 40 s")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"is_adapter": False, "talks": True}, ["saved to my run (whole model)", "trl-fast chat 'my run'"]),
        ({"is_adapter": False, "talks": False}, ["saved to my run (whole model)"]),
        (
            {"is_adapter": True, "talks": True},
            ["saved to my run (adapter)", "trl-fast chat 'my run'", "trl-fast merge 'my run'"],
        ),
    ],
)
def test_what_to_do_with_a_model(options, expected):
    assert [text for _, text in model_lines("my run", **options)] == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (None, "trainer.train(resume_from_checkpoint=True)"),
        (["trl-fast", "dpo", "--seed", "1"], "trl-fast dpo --seed 1 --resume_from_checkpoint true"),
        (
            ["trl-fast", "dpo", "--resume_from_checkpoint", "out/checkpoint-5", "--x", "a b"],
            "trl-fast dpo --x 'a b' --resume_from_checkpoint true",
        ),
        (["trl-fast", "dpo", "--resume_from_checkpoint=x"], "trl-fast dpo --resume_from_checkpoint true"),
    ],
)
def test_the_command_that_resumes(command, expected):
    assert resume_command(command) == expected


def test_secrets_are_hidden():
    words = ["trl-fast", "dpo", "--hub_token", "hf_abc", "--hub-token=hf_abc"]
    words += ["--url", "http://me:pw@host/x", "--seed", "1"]
    shown = command_without_secrets(words)
    assert "hf_abc" not in " ".join(shown) and "pw" not in " ".join(shown) and shown[-2:] == ["--seed", "1"]
    settings = {"hub_token": "hf_abc", "pad_token": "<pad>", "model_init_kwargs": {"token": "hf_abc", "dtype": "auto"}}
    assert without_secrets(settings) == {
        "hub_token": "<hidden>",
        "pad_token": "<pad>",
        "model_init_kwargs": {"token": "<hidden>", "dtype": "auto"},
    }
