"""A subclass's methods are called, or refused by name: nothing that a user defines is silently ignored."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import transformers

from trl_fast.trainers.base.overrides import check_overrides, overridden, uncalled_hooks
from trl_fast.trainers.methods import METHODS

ROOT = Path(__file__).resolve().parents[3]
# Overriding them in TRL changes nothing that is here: trl_fast sends no telemetry.
HARMLESS = {"_send_telemetry"}
MATCHED = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
# Static formulas that a subclass may call, but that a subclass's own would not be called for.
CALLABLE = {"get_off_policy_mask", "get_gamma_weights"}


def methods_of_trl(name: str) -> dict[str, object]:
    """The methods that TRL's own classes define for the trainer of a method, by name."""
    trainer = METHODS[name].trainer_class().__name__
    theirs = getattr(importlib.import_module(f"trl.trainer.{name}_trainer"), trainer)
    owners = [owner for owner in theirs.__mro__ if owner.__module__.startswith("trl.")]
    return {
        method: value
        for owner in owners
        for method, value in vars(owner).items()
        if inspect.isfunction(inspect.unwrap(getattr(value, "__func__", value))) and not method.startswith("__")
    }


@pytest.mark.parametrize("name", MATCHED)
def test_each_method_of_trls_trainer_is_called_here_or_refused(name):
    ours = METHODS[name].trainer_class()
    sources = "".join(path.read_text() for path in (ROOT / "trl_fast" / "trainers").rglob("*.py"))
    for method in methods_of_trl(name).keys() - HARMLESS - uncalled_hooks(ours).keys():
        called = hasattr(transformers.Trainer, method) or re.search(rf"\.{method}\b", sources)
        assert hasattr(ours, method) and called, f"{method}: call it, or list it in uncalled_hooks"


@pytest.mark.parametrize("name", MATCHED)
def test_nothing_that_is_called_is_listed_as_uncalled(name):
    ours = METHODS[name].trainer_class()
    assert not [method for method in uncalled_hooks(ours) if hasattr(ours, method) and method not in CALLABLE]


def subclass(name: str, **methods: object) -> type:
    return type("Mine", (METHODS[name].trainer_class(),), {"__module__": "script", **methods})


@pytest.mark.parametrize(
    "name, method", [(name, method) for name in MATCHED for method in uncalled_hooks(METHODS[name].trainer_class())]
)
def test_a_method_that_would_never_be_called_is_refused_by_name(name, method):
    with pytest.raises(ValueError, match=rf"Mine defines {method}\(\), which .* never does.* {method}: \w+"):
        check_overrides(subclass(name, **{method: lambda self: None}))


def test_refused_at_construction_before_anything_is_read():
    with pytest.raises(ValueError, match=r"Mine defines dpo_loss\(\)"):
        subclass("dpo", dpo_loss=lambda self: None)("no-such-model")


def test_a_method_that_the_subclass_calls_itself_is_its_own_affair():
    def compute_loss(self, model, inputs, **kwargs):
        return [self.dpo_loss(part) for part in inputs]

    check_overrides(subclass("dpo", dpo_loss=lambda self: None, compute_loss=compute_loss))
    with pytest.raises(ValueError, match="dpo_loss"):
        check_overrides(subclass("dpo", dpo_loss=lambda self: super().dpo_loss()))


def test_a_mixin_counts_where_python_finds_it_first():
    class Mixin:
        def concatenated_forward(self, model, batch):
            return {}

    for bases in ((Mixin, METHODS["dpo"].trainer_class()), (METHODS["dpo"].trainer_class(), Mixin)):
        with pytest.raises(ValueError, match=r"concatenated_forward\(\)"):
            check_overrides(type("Mixed", bases, {}))


def test_what_a_subclass_overrides():
    mine = subclass("sft", compute_loss=lambda self: None, log=property(lambda self: None))
    assert overridden(mine, "compute_loss", "prediction_step", "log") == ("compute_loss", "log")
    assert overridden(METHODS["sft"].trainer_class(), "compute_loss", "prediction_step", "log") == ()
    check_overrides(mine)


def test_functions_that_were_put_into_our_classes(monkeypatch):
    ours = METHODS["dpo"].trainer_class()
    monkeypatch.setattr(ours, "compute_loss", lambda self, model, inputs: None)
    wrapped = functools.wraps(ours.log)(lambda self, logs: None)
    monkeypatch.setattr(ours, "log", wrapped)
    assert overridden(ours, "compute_loss", "log", "prediction_step", "evaluate") == ("compute_loss", "log")
    monkeypatch.setattr(ours, "dpo_loss", lambda self: None, raising=False)
    with pytest.raises(ValueError, match="dpo_loss"):
        check_overrides(ours)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_of_ours_is_taken_for_a_users(method):
    ours = METHODS[method].trainer_class()
    assert overridden(ours, *dir(ours)) == ()
