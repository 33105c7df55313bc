"""Holds the argument classes and enums of older TRL that scripts build their command lines from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from trl_fast.cli.arguments import ScriptArguments
from trl_fast.trainers.base.config import BaseConfig


@dataclass
class OlderScriptArguments(ScriptArguments):
    """Names the dataset as TRL 0.9 to 0.12 did, where ScriptArguments had this field too."""

    gradient_checkpointing_use_reentrant: bool = False
    """Reentrant gradient checkpointing, which the script passes on."""


@dataclass
class SFTScriptArguments(OlderScriptArguments):
    """Names the dataset, for scripts of TRL 0.9 to 0.12."""


@dataclass
class RewardScriptArguments(OlderScriptArguments):
    """Names the dataset, for scripts of TRL 0.11 to 0.12."""


@dataclass
class DPOScriptArguments(OlderScriptArguments):
    """Names the dataset, for scripts of TRL 0.9 to 0.12."""

    sanity_check: bool = False
    """Train on 1000 rows only, if the script does so."""


@dataclass
class SftScriptArguments(OlderScriptArguments):
    """Names the dataset and the trainer's settings, for scripts of TRL 0.8, which have no SFTConfig."""

    dataset_text_field: str | None = None
    """Column of the text. None: the script names it."""

    dataset_train_name: str = "train"
    """Split to train on."""

    dataset_test_name: str = "test"
    """Split to evaluate on."""

    max_seq_length: int = 512
    """Longest sequence, in tokens."""

    packing: bool = False
    """Pack several rows into one."""


@dataclass
class DpoScriptArguments(DPOScriptArguments):
    """Names the dataset and the trainer's settings, for scripts of TRL 0.8, which have no DPOConfig."""

    beta: float = 0.1
    """Strength of the reference policy."""

    max_length: int = 512
    """Longest sequence, in tokens."""

    max_prompt_length: int = 128
    """Longest prompt, in tokens."""

    max_target_length: int = 128
    """Longest completion, in tokens."""

    generate_during_eval: bool = False
    """Log completions in evaluation."""


class FDivergenceType(str, Enum):
    """Names the f-divergences of DPOConfig's `f_divergence_type`, which takes the members as it takes their text."""

    REVERSE_KL = "reverse_kl"
    JS_DIVERGENCE = "js_divergence"
    ALPHA_DIVERGENCE = "alpha_divergence"

    __str__ = str.__str__


class FDivergenceConstants:
    """Holds the key and the default of the alpha divergence's coefficient."""

    ALPHA_DIVERGENCE_COEF_KEY = "alpha_divergence_coef"
    ALPHA_DIVERGENCE_COEF_DEFAULT = 1.0


# Methods of older TRL whose configs scripts subclass beside those of the methods that they run.
_GONE_METHODS = ("NashMD", "PRM", "XPO")


@dataclass
class GoneConfig(BaseConfig):
    """Stands for the config of a method that trl_fast does not have: it can be subclassed, and making one is refused.

    Modules with a config for each method, of which a run needs one, are imported thereby.

    Raises:
        NotImplementedError: always.
    """

    def __post_init__(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: trl_fast does not have this method; run the script with a TRL that has it"
        )


def __getattr__(name: str) -> Any:
    if name.removesuffix("Config") in _GONE_METHODS and name.endswith("Config"):
        globals()[name] = dataclass(type(name, (GoneConfig,), {"__doc__": GoneConfig.__doc__, "__module__": __name__}))
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
