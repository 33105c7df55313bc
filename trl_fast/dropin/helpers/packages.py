"""Says which optional packages are installed, as `trl.import_utils` does."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from packaging.version import Version

LIGER_KERNEL_MIN_VERSION = "0.8.2"


class TRLExperimentalWarning(UserWarning):
    """Warns of what TRL calls experimental; nothing here raises it."""


@contextmanager
def suppress_warning(category: type[Warning]) -> Iterator[None]:
    """Hides warnings of a category while it is open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=category)
        yield


def suppress_experimental_warning() -> object:
    """Hides TRL's warnings of experimental parts while it is open."""
    return suppress_warning(TRLExperimentalWarning)


def _found(package: str, distribution: str | None = None, min_version: str | None = None) -> bool:
    if importlib.util.find_spec(package) is None:
        return False
    if min_version is None:
        return True
    try:
        return Version(version(distribution or package)) >= Version(min_version)
    except PackageNotFoundError:
        return False


def is_aiohttp_available() -> bool:
    """Says whether aiohttp is installed."""
    return _found("aiohttp")


def is_deepspeed_available() -> bool:
    """Says whether DeepSpeed is installed."""
    return _found("deepspeed")


def is_diffusers_available() -> bool:
    """Says whether diffusers is installed."""
    return _found("diffusers")


def is_fastapi_available() -> bool:
    """Says whether FastAPI is installed."""
    return _found("fastapi")


def is_harbor_available() -> bool:
    """Says whether harbor is installed."""
    return _found("harbor")


def is_jmespath_available() -> bool:
    """Says whether jmespath is installed."""
    return _found("jmespath")


def is_joblib_available() -> bool:
    """Says whether joblib is installed."""
    return _found("joblib")


def is_liger_kernel_available(min_version: str = LIGER_KERNEL_MIN_VERSION) -> bool:
    """Says whether Liger Kernel is installed in at least this version."""
    return _found("liger_kernel", "liger-kernel", min_version)


def is_llm_blender_available() -> bool:
    """Says whether LLM-Blender is installed."""
    return _found("llm_blender")


def is_math_verify_available() -> bool:
    """Says whether Math-Verify is installed."""
    return _found("math_verify")


def is_mergekit_available() -> bool:
    """Says whether mergekit is installed."""
    return _found("mergekit")


def is_openreward_available() -> bool:
    """Says whether OpenReward is installed."""
    return _found("openreward")


def is_pydantic_available() -> bool:
    """Says whether pydantic is installed."""
    return _found("pydantic")


def is_requests_available() -> bool:
    """Says whether requests is installed."""
    return _found("requests")


def is_unsloth_available() -> bool:
    """Says whether Unsloth is installed."""
    return _found("unsloth")


def is_uvicorn_available() -> bool:
    """Says whether uvicorn is installed."""
    return _found("uvicorn")


def is_vllm_ascend_available() -> bool:
    """Says whether vLLM's plugin for Ascend is installed."""
    return _found("vllm_ascend")


def is_vllm_available(min_version: str | None = None) -> bool:
    """Says whether vLLM is installed, in at least this version."""
    return _found("vllm", min_version=min_version)


def is_weave_available() -> bool:
    """Says whether Weave is installed."""
    return _found("weave")


def __getattr__(name: str) -> object:
    # It takes half a second to find out, which few need.
    if name == "PACKAGE_DISTRIBUTION_MAPPING":
        return packages_distributions()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
