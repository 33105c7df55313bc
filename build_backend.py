"""Builds trl_fast for pip, uv and build (PEP 517): setuptools' backend, with the torch that will run the package.

The extension is compiled against one torch and runs with no other. An isolated build of pip runs the Python of the
environment that it installs into, so that environment's torch is compiled against. Where it has none yet, pip brings
one for the build, and the package then requires it. An isolated build of uv or build sees nothing of that environment,
and stops with the command that works.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import site
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
PURE = "TRL_FAST_PURE"
SETUPTOOLS = 77
CUTLASS_PATH, CUTLASS_HEADER = "CUTLASS_PATH", "cutlass/cutlass.h"
# Folders of the environments that uv and build make for a build.
ISOLATED = ("*/builds-v0/.tmp*", "*/build-env-*")
NEEDED = f"torch ninja 'setuptools>={SETUPTOOLS}'"


def asked_for(variable: str) -> bool:
    """Says whether an environment variable is set to anything but 0."""
    return os.environ.get(variable, "0") not in ("", "0")


def stop(message: str) -> NoReturn:
    """Ends the build with one line, the last of what the build prints."""
    raise SystemExit(f"trl_fast: {message}")


def installer() -> str:
    """Returns the command that runs this build, uv's or pip's."""
    return "uv pip" if "UV_INTERNAL__BUILD_DIR" in os.environ else "pip"


def source_name(root: Path = ROOT) -> str:
    """Returns how a command names these sources: the folder, or the archive that only a PKG-INFO tells of."""
    about = root / "PKG-INFO"
    found = re.search(r"^Version: (.+)$", about.read_text(), re.M) if about.is_file() else None
    return f"trl_fast-{found[1]}.tar.gz" if found else "."


def install_command(options: str = "", **variables: str) -> str:
    """Returns the command that installs these sources, with options and environment variables, in backquotes."""
    words = [*(f"{name}={value}" for name, value in variables.items()), installer(), "install", options, source_name()]
    return f"`{' '.join(filter(None, words))}`"


def is_pips_isolation(prefix: str, setuptools_file: str) -> bool:
    """Says whether pip isolates this build: it runs the environment's Python, with a setuptools from elsewhere."""
    return not Path(setuptools_file).resolve().is_relative_to(Path(prefix).resolve())


def show_torch_of_environment() -> None:
    """Makes the packages of the environment importable that pip installs into, after those of the build."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # pip hides the user's own packages from the build, too
        folders.append(site.getusersitepackages())
    for folder in folders:
        if folder not in sys.path:
            site.addsitedir(folder)


def has_torch() -> bool:
    """Says whether torch can be imported."""
    importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


def find_cutlass() -> str | None:
    """Returns the folder of CUTLASS's headers: that of CUTLASS_PATH, a source tree, or of the package from pip."""
    if asked := os.environ.get(CUTLASS_PATH):
        folders = (Path(asked, "include"), Path(asked))
        return next((str(folder) for folder in folders if (folder / CUTLASS_HEADER).exists()), None)
    try:
        files = importlib.metadata.files("nvidia-cutlass") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    header = next((file for file in files if file.as_posix().endswith(f"include/{CUTLASS_HEADER}")), None)
    return str(Path(str(header.locate())).parents[1]) if header else None


def why_no_cutlass(cutlass: str | None) -> str:
    """Returns why there will be no kernel made with CUTLASS; empty if nothing is missing."""
    if cutlass:
        return ""
    if asked := os.environ.get(CUTLASS_PATH):
        return f"there is no {CUTLASS_HEADER} in {CUTLASS_PATH}={asked}"
    return "its headers were not found (`pip install nvidia-cutlass`, or set CUTLASS_PATH)"


def cutlass_flags(cutlass: str) -> list[str]:
    """Returns what nvcc needs for a source that includes the CUTLASS of a folder.

    Its asserts would be calls, and with calls between them the tensor cores' instructions wait for each other.
    """
    return ["-DNDEBUG", "--expt-relaxed-constexpr", f"-isystem={cutlass}"]


def torch_release() -> str:
    """Returns major and minor version of the torch that is compiled against, such as "2.13"."""
    return ".".join(importlib.metadata.version("torch").split(".")[:2])


def requirements(root: Path = ROOT) -> list[str]:
    """Returns what trl_fast needs to run, of any torch that it can be compiled against."""
    lines = (line.strip() for line in (root / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def no_torch() -> NoReturn:
    """Ends the build that cannot find torch."""
    isolated = any(Path(sys.prefix).match(pattern) for pattern in ISOLATED)
    cause = "this isolated build cannot see your environment's torch" if isolated else "there is no torch here"
    if installer() == "uv pip":
        remedy = f"`uv pip install {NEEDED}`, then {install_command('--no-build-isolation')}"
    elif isolated:
        remedy = f"`pip install {NEEDED}`, then `python -m build --no-isolation`"
    else:
        remedy = f"`pip install torch`, then {install_command()}"
    stop(
        f"the kernels are compiled against the torch that runs them, and {cause}. Run {remedy}; or "
        f"{install_command(**{PURE: '1'})} for plain PyTorch, which is slower."
    )


def find_torch() -> list[str]:
    """Makes torch importable; returns what pip has to bring for that.

    Raises:
        SystemExit: there is none, and none can be asked for.
    """
    if asked_for(PURE) or has_torch():
        return []
    if not is_pips_isolation(sys.prefix, setuptools_backend().__file__ or ""):
        no_torch()
    show_torch_of_environment()
    return [] if has_torch() else [line for line in requirements() if re.match(r"torch\b", line)]


def setuptools_backend() -> ModuleType:
    """Returns setuptools' backend.

    Raises:
        SystemExit: this environment has no setuptools, or an older one than the project's description is written for.
    """
    found = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("setuptools")
    if found is None or int(found.split(".")[0]) < SETUPTOOLS:
        stop(
            f"building needs setuptools {SETUPTOOLS} or newer in this environment, which has {found or 'none'}. "
            f"Run `{installer()} install {NEEDED}`, then {install_command('--no-build-isolation')}."
        )
    from setuptools import build_meta

    return build_meta


def with_torch() -> ModuleType:
    """Returns setuptools' backend, once torch can be imported.

    Raises:
        SystemExit: it cannot.
    """
    backend = setuptools_backend()
    if find_torch():
        no_torch()
    return backend


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """Returns what a source distribution needs to be made: no torch."""
    return setuptools_backend().get_requires_for_build_sdist(config_settings)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """Makes a source distribution; returns its name."""
    return setuptools_backend().build_sdist(sdist_directory, config_settings)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Returns what pip has to bring to compile the package."""
    return find_torch()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    """Writes the metadata of the wheel to come; returns their folder's name."""
    return with_torch().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Compiles and makes a wheel; returns its name."""
    return with_torch().build_wheel(wheel_directory, config_settings, metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    """Writes the metadata of the editable installation to come; returns their folder's name."""
    return with_torch().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Compiles in the source tree and makes a wheel that refers to it; returns its name."""
    return with_torch().build_editable(wheel_directory, config_settings, metadata_directory)
