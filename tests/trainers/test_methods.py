"""The table of methods is true, and everything that lists methods says the same."""

import ast
import inspect
import sys
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig

import trl_fast
from support.models import tiny_model
from trl_fast import trainers
from trl_fast.cli.commands import usage
from trl_fast.dropin.names import MODULES
from trl_fast.lazy_imports import import_place
from trl_fast.modeling.loading import add_adapter
from trl_fast.trainers.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", METHODS)
def test_every_place_of_the_table_is_there(name):
    method = METHODS[name]
    config, trainer = method.config_class(), method.trainer_class()
    assert trainer.method == name == method.name
    assert trainer.config_class is config
    assert config.__name__.removesuffix("Config") == trainer.__name__.removesuffix("Trainer")
    if method.reward_argument is not None:
        constructors = [inspect.signature(owner.__init__).parameters for owner in trainer.__mro__]
        assert any(method.reward_argument in parameters for parameters in constructors)
    step = import_place(method.step)
    assert any(getattr(sys.modules[owner.__module__], step.__name__, None) is step for owner in trainer.__mro__)
    for place in method.trl_names.values():
        import_place(place)


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_calls_the_step_function_of_the_table(name):
    method = METHODS[name]
    step, trainer = import_place(method.step), method.trainer_class()
    # The public method of the online trainers calls _compute_loss.
    compute_loss = inspect.unwrap(getattr(trainer, "_compute_loss", trainer.compute_loss))
    assert f"{step.__name__}(" in inspect.getsource(compute_loss)
    assert compute_loss.__globals__[step.__name__] is step
    assert "self" not in inspect.signature(step).parameters


def test_no_trainer_is_missing_from_the_table():
    folder = ROOT / "trl_fast" / "trainers"
    packages = [path for path in folder.glob("*/*config.py") if path.parent.name not in ("base", "online")]
    names = {path.stem for path in [*folder.glob("*_config.py"), *packages] if path.stem != "config"}
    names |= {path.parent.name for path in packages if path.stem == "config"}
    assert {name.removesuffix("_config") for name in names} == set(METHODS)


def imported_for_type_checkers(module):
    """Reads the names under `if TYPE_CHECKING:`, which are exported by an alias, and their places."""
    found = {}
    (block,) = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)][:1]
    assert block.test.id == "TYPE_CHECKING"
    for line in block.body:
        package = f"{module.__name__}." if line.level else ""
        assert all(name.asname == name.name or name.name == "*" for name in line.names)
        found |= {name.name: f"{package}{line.module}:{name.name}" for name in line.names}
    return found


def test_type_checkers_see_the_exports_of_the_trainers():
    """A method's two lines, if it has none: from .NAME import ... as ..., from .NAME_config import ... as ..."""
    assert imported_for_type_checkers(trainers) == trainers.EXPORTS


def test_type_checkers_see_the_exports_of_the_package():
    others = {name: place for name, place in trl_fast.EXPORTS.items() if name not in trainers.EXPORTS}
    assert imported_for_type_checkers(trl_fast) == {"*": "trl_fast.trainers:*", **others}
    assert set(trl_fast.EXPORTS) == set(trl_fast.__all__) - {"__version__"}


@pytest.mark.parametrize("name", trl_fast.EXPORTS)
def test_every_export_is_there(name):
    assert getattr(trl_fast, name) is import_place(trl_fast.EXPORTS[name])
    assert name in dir(trl_fast)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'trl_fast' has no attribute 'DPOTrainr'"):
        trl_fast.DPOTrainr  # noqa: B018


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_has_exports_a_command_names_in_trl_and_docs(method):
    config, trainer = method.exports
    assert {config, trainer} <= {*trl_fast.__all__}
    assert f"  {method.name:<12} {method.help}" in usage().splitlines()
    for package in method.trl_packages:
        assert config in MODULES[f"{package}.{method.name}_config"]
        assert trainer in MODULES[f"{package}.{method.name}_trainer"]
    assert f"`{trainer}`" in (ROOT / "README.md").read_text()


def test_the_readme_names_all_commands():
    assert f"| `trl-fast {', '.join(METHODS)}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_our_own_defaults_warn_of_nothing(name, tmp_path):
    config_class = METHODS[name].config_class()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        assert config.gradient_checkpointing and config.activation_checkpointing
        off = config_class(str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none")
        assert not off.gradient_checkpointing


def test_an_adapter_is_put_on_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
