"""Finds trl and its modules in place of TRL: the import finder, and the modules that it makes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import trl_fast
from trl_fast.lazy_imports import import_place

from .gone import GONE, GONE_MODULES
from .names import MODULES, TRL_VERSION
from .workers import tell_workers


def install_as_trl() -> None:
    """Makes `import trl` give trl_fast in this process and its workers from here on, whether or not TRL is installed.

    Raises:
        ImportError: TRL itself has been imported already.
    """
    present = sys.modules.get("trl")
    if present is not None and not isinstance(present, TrlModule):
        raise ImportError(
            f"trl has been imported from {getattr(present, '__file__', 'elsewhere')} already, and its classes are "
            "in use; call trl_fast.install_as_trl() before the first `import trl`, or start the script with "
            "`trl-fast run`"
        )
    if not is_installed():
        sys.meta_path.insert(0, TrlFinder())
        tell_workers(install_as_trl, is_installed)


def is_installed() -> bool:
    """Says whether `import trl` gives trl_fast in this process."""
    return any(isinstance(finder, TrlFinder) for finder in sys.meta_path)


class TrlModule(ModuleType):
    """Stands for a module of TRL; its names are those of trl_fast, imported on first use."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"{name}, answered by trl_fast.")
        self.__all__ = sorted(self._places())
        if name == "trl":
            self.__version__ = TRL_VERSION

    def _places(self) -> dict[str, str]:
        return _places(self.__name__)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in MODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        place = self._places().get(name)
        if place is None:
            raise AttributeError(explain(self.__name__, name))
        value = import_place(place)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        inner = [name.removeprefix(f"{self.__name__}.") for name in MODULES if name.startswith(f"{self.__name__}.")]
        return sorted({*super().__dir__(), *self.__all__, *(name for name in inner if "." not in name)})


class TrlFinder(MetaPathFinder, Loader):
    """Finds trl and every module below it; what trl_fast does not have is an ImportError that says so."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module of MODULES; None outside of trl.

        Raises:
            ImportError: the name is below trl and trl_fast does not have it.
        """
        if name in MODULES:
            # All are packages: for a name that a package lacks, `from package import name` comes here once more, where
            # the error can say what to do; of a module's AttributeError Python would keep nothing.
            return ModuleSpec(name, self, origin="trl_fast", is_package=True)
        parent, _, child = name.rpartition(".")
        if name.split(".")[0] == "trl":
            raise ImportError(explain(parent, child), name=name)
        return None

    def create_module(self, spec: ModuleSpec) -> TrlModule:
        """Returns the module, whose names are looked up when they are used."""
        return TrlModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: the module is complete."""


def _places(module: str) -> dict[str, str]:
    # The packages offer all that is public in trl_fast.
    public = trl_fast.EXPORTS if module in ("trl", "trl.trainer") else ()
    return {**{name: f"trl_fast:{name}" for name in public}, **MODULES[module]}


def explain(module: str, name: str) -> str:
    """Says why trl_fast does not answer a name of a TRL module, and what to do."""
    full = f"{module}.{name}"
    said = next((advice for gone, advice in GONE.items() if fnmatchcase(name, gone)), None)
    below = (advice for gone, advice in GONE_MODULES.items() if f"{full}.".startswith(f"{gone}."))
    said = next(below, None) if said is None else said
    if said is not None:
        return f"{full}: {said}"
    return (
        f"trl_fast does not have {full}; leave it out of the script, or run the script with TRL itself (`python "
        "script.py` instead of `trl-fast run script.py`)"
    )
