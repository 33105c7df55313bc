"""Imports of configs and the help of commands load few modules, which are counted in a process of their own."""

import json
import subprocess
import sys

import pytest

from trl_fast.trainers.methods import METHODS

# Third-party packages are loaded once; the modules of trl_fast anew for each name.
LOADED = """
import contextlib, io, json, sys

def loaded(run):
    before = {name for name in sys.modules if name.split(".")[0] == "trl_fast"}
    for name in before:
        del sys.modules[name]
    run()
    return sorted(name for name in sys.modules if name.split(".")[0] == "trl_fast")

def package():
    import trl_fast

def config(name):
    import trl_fast
    getattr(trl_fast, name)

def command(*arguments):
    from trl_fast.cli.main import main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([*arguments])

def third_party():
    return sorted({"datasets", "pandas", "rich", "torch", "transformers", "transformers.trainer"} & {*sys.modules})

names = json.loads(sys.argv[1])
found = {"trl_fast": loaded(package), "trl-fast --help": loaded(lambda: command("--help"))}
for name in (*names, "validate", "plan"):
    found[f"trl-fast {name} --help"] = loaded(lambda: command(name, "--help", "all"))
found["light"] = third_party()
found |= {name: loaded(lambda: config(name)) for name in names.values()}
print(json.dumps({**found, "heavy": third_party()}))
"""


@pytest.fixture(scope="module")
def loaded():
    names = {name: next(iter(method.exports)) for name, method in METHODS.items()}
    done = subprocess.run([sys.executable, "-c", LOADED, json.dumps(names)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def layers(modules):
    return {name.split(".")[1] for name in modules if "." in name}


def test_the_package_and_its_help_load_next_to_nothing(loaded):
    assert len(loaded["trl_fast"]) <= 4
    assert len(loaded["trl-fast --help"]) <= 8
    assert not loaded["light"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_config_loads_only_what_it_inherits_from(loaded, method):
    config, _ = method.exports
    modules = loaded[config]
    inherited = {
        owner.__module__ for owner in method.config_class().__mro__ if owner.__module__.startswith("trl_fast")
    }
    packages = {name.rpartition(".")[0] for name in inherited}
    # Packages of packages; the table of methods, which names the config; what checks arguments.
    others = {"trl_fast", "trl_fast.lazy_imports", "trl_fast.trainers", "trl_fast.trainers.methods"}
    assert {*modules} - inherited - packages - others == {name for name in modules if "settings" in name}
    assert len([name for name in modules if "settings" in name]) <= 5
    assert layers(modules) == {"lazy_imports", "settings", "trainers"}
    module = method.trainer.partition(":")[0]
    assert method.config.partition(":")[0] in modules and module not in modules


@pytest.mark.parametrize("name", [*METHODS, "validate", "plan"])
def test_the_help_of_a_command_loads_next_to_nothing(loaded, name):
    modules = loaded[f"trl-fast {name} --help"]
    assert len(modules) <= 14
    assert layers(modules) == {"cli", "lazy_imports", "settings", "trainers"}
    assert {name for name in modules if "trainers" in name} == {"trl_fast.trainers", "trl_fast.trainers.methods"}


def test_no_config_loads_datasets_or_a_trainer(loaded):
    assert loaded["heavy"] == ["torch", "transformers"]
