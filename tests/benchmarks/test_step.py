"""Timed steps of every method: ours and TRL 1.16.0's learn from the same rows, and what TRL lacks is said."""

import io

import pytest
from rich.console import Console

from benchmarks import step
from benchmarks.step_methods import METHODS, OURS, TRL
from support.models import save_tiny_model
from support.tokenizer import build_tokenizer

SIZES = "--batch 8 --steps 1 --rounds 1 --prompt_tokens 24 --completion_tokens 8 --max_length 128"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command line on a tiny model, but for the method."""
    # With a BOS token, which ORPO, CPO and TPO of TRL's put before each prompt.
    tokenizer = build_tokenizer(add_bos=True)
    return [*SIZES.split(), "--model", save_tiny_model(tmp_path_factory.mktemp("tiny"), tokenizer)]


def slow(*methods):
    return [pytest.param(method, marks=pytest.mark.slow) for method in methods]


@pytest.mark.parametrize(
    "method", ["kto", "rloo", *slow("sft", "dpo", "orpo", "cpo", "tpo", "reward", "grpo", "gmpo", "sdpo")]
)
def test_both_trainers_learn_from_the_same_rows(method, words):
    ours, trls = step.race(step.parse_arguments(["--method", method, *words]))
    logs = [run.trainer.state.log_history[0] for run in (ours, trls)]
    # Texts are cut within words, where TRL's ORPO and CPO do not score the first token of some completions.
    rel = 5e-2 if method in ("orpo", "cpo") else 1e-3
    for name in ("loss", "grad_norm"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=rel, abs=1e-5)
    assert logs[0].get("num_tokens") == logs[1].get("num_tokens", logs[0].get("num_tokens"))
    assert [len(run.clock.seconds) for run in (ours, trls)] == [1, 1] and ours.tokens > 2 * 8 * 8


@pytest.mark.parametrize("method", ["ppo", *slow("bco")])
def test_what_trl_has_not_runs_alone(method, words):
    arguments = step.parse_arguments(["--method", method, *words])
    (run,) = step.race(arguments)
    shown = Console(file=io.StringIO(), width=150)
    figures = step.report(shown, [run], [{"peak": 2**20, "before": 0}], arguments)
    assert "TRL has none" in shown.file.getvalue() and figures["runs"][0]["trl_over_this"] is None
    assert run.tokens >= 2 * 8 * 8


def test_every_run_has_the_tokens_of_one(words):
    """Not of all runs before it; BCO, which TRL has not, runs alone."""
    runs = [step.race(step.parse_arguments(["--method", "bco", *words, "--rounds", str(n)]))[0] for n in (1, 2)]
    assert runs[0].tokens == runs[1].tokens


@pytest.mark.parametrize(
    "line, message",
    [
        ("--method grpo", "--method grpo needs --prompt_tokens and --completion_tokens"),
        ("--method rloo --prompt_tokens 8 --completion_tokens 8 --batch 4", "a multiple of 8"),
        ("--method ppo --prompt_tokens 8 --completion_tokens 8 --memory_of trl", "TRL 1.16.0 has no PPOTrainer"),
        ("--method dpo --packing", "--packing is for --method sft"),
    ],
)
def test_bad_arguments(line, message, capsys):
    with pytest.raises(SystemExit):
        step.parse_arguments(line.split())
    assert message in capsys.readouterr().err


def test_the_documentation_names_every_method():
    assert all(f"{name}" in step.__doc__.replace("|", " ").split() for name in METHODS)
    assert {library for method in METHODS.values() for library in method.libraries} == {OURS, TRL}
