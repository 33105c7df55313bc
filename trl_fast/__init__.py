"""Post-trains language models with compiled kernels, under TRL's names of trainers, arguments and metrics."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

from . import trainers
from .lazy_imports import lazy_exports

__version__ = "0.1.0"

# Public names and their places: those of the methods, and the others by module.
_BY_MODULE = {
    "trl_fast.cli.arguments": (
        "DatasetMixtureConfig",
        "ModelConfig",
        "ScriptArguments",
        "get_kbit_device_map",
        "get_peft_config",
        "get_quantization_config",
    ),
    "trl_fast.cli.datasets": ("get_dataset",),
    "trl_fast.cli.parser": ("TrlParser",),
    "trl_fast.cli.quiet": ("init_zero_verbose",),
    "trl_fast.dropin": ("install_as_trl",),
    "trl_fast.modeling.chat_template": ("clone_chat_template", "setup_chat_format"),
    "trl_fast.modeling.reference_policy": ("create_reference_model",),
    "trl_fast.rollout.tool_templates": (
        "add_response_schema",
        "is_chat_template_prefix_preserving",
        "parse_response",
        "supports_tool_calling",
    ),
    "trl_fast.data": (
        "apply_chat_template",
        "extract_prompt",
        "get_training_chat_template",
        "has_generation_markers",
        "is_chat_template_stop_token_trained",
        "is_conversational",
        "is_conversational_from_value",
        "maybe_apply_chat_template",
        "maybe_convert_to_chatml",
        "maybe_extract_prompt",
        "maybe_unpair_preference_dataset",
        "pack_dataset",
        "unpair_preference_dataset",
    ),
}
EXPORTS = {
    **trainers.EXPORTS,
    **{name: f"{module}:{name}" for module, names in _BY_MODULE.items() for name in names},
}

if TYPE_CHECKING:
    # The same names for type checkers, which cannot read the table; a test compares.
    from trl_fast.cli.arguments import DatasetMixtureConfig as DatasetMixtureConfig
    from trl_fast.cli.arguments import ModelConfig as ModelConfig
    from trl_fast.cli.arguments import ScriptArguments as ScriptArguments
    from trl_fast.cli.arguments import get_kbit_device_map as get_kbit_device_map
    from trl_fast.cli.arguments import get_peft_config as get_peft_config
    from trl_fast.cli.arguments import get_quantization_config as get_quantization_config
    from trl_fast.cli.datasets import get_dataset as get_dataset
    from trl_fast.cli.parser import TrlParser as TrlParser
    from trl_fast.cli.quiet import init_zero_verbose as init_zero_verbose
    from trl_fast.data import apply_chat_template as apply_chat_template
    from trl_fast.data import extract_prompt as extract_prompt
    from trl_fast.data import get_training_chat_template as get_training_chat_template
    from trl_fast.data import has_generation_markers as has_generation_markers
    from trl_fast.data import is_chat_template_stop_token_trained as is_chat_template_stop_token_trained
    from trl_fast.data import is_conversational as is_conversational
    from trl_fast.data import is_conversational_from_value as is_conversational_from_value
    from trl_fast.data import maybe_apply_chat_template as maybe_apply_chat_template
    from trl_fast.data import maybe_convert_to_chatml as maybe_convert_to_chatml
    from trl_fast.data import maybe_extract_prompt as maybe_extract_prompt
    from trl_fast.data import maybe_unpair_preference_dataset as maybe_unpair_preference_dataset
    from trl_fast.data import pack_dataset as pack_dataset
    from trl_fast.data import unpair_preference_dataset as unpair_preference_dataset
    from trl_fast.dropin import install_as_trl as install_as_trl
    from trl_fast.modeling.chat_template import clone_chat_template as clone_chat_template
    from trl_fast.modeling.chat_template import setup_chat_format as setup_chat_format
    from trl_fast.modeling.reference_policy import create_reference_model as create_reference_model
    from trl_fast.rollout.tool_templates import add_response_schema as add_response_schema
    from trl_fast.rollout.tool_templates import (
        is_chat_template_prefix_preserving as is_chat_template_prefix_preserving,
    )
    from trl_fast.rollout.tool_templates import parse_response as parse_response
    from trl_fast.rollout.tool_templates import supports_tool_calling as supports_tool_calling
    from trl_fast.trainers import *  # noqa: F403
else:
    __all__ = ["__version__", *EXPORTS]
    __getattr__, __dir__ = lazy_exports(__name__, EXPORTS)


# torch's own switch: large CPU tensors come in huge pages. Taking and giving back 600 MB, as a head's workspace does
# in every step, then costs a fifth. It counts if no large tensor was made before.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _SourceTreeKernels:
    """Finds `trl_fast.kernels` in a source tree, where the folder `kernels/` stands beside this package.

    An installed wheel has the folder inside the package. The folder has no __init__.py, since a top-level package
    called `kernels` would shadow the Hugging Face package of that name. It is asked first: an editable installation of
    another source tree knows a `trl_fast.kernels` too.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "trl_fast.kernels":
            return None
        spec = ModuleSpec(name, loader=None, is_package=True)
        spec.submodule_search_locations = [str(Path(__file__).resolve().parent.parent / "kernels")]
        return spec


if not (Path(__file__).resolve().parent / "kernels").is_dir():
    sys.meta_path.insert(0, _SourceTreeKernels)
