"""Walks TRL 1.16.0: each of its public names is answered, or stands here, and what is said about it is true of it."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

import trl_fast
from trl_fast.dropin.finder import explain
from trl_fast.dropin.gone import GONE_MODULES
from trl_fast.dropin.names import MODULES, TRL_VERSION

# The names that are not answered, by module, with a word of the reason that is given. The list only shrinks.
LEFT = {
    "trl.cli.accelerate_config": {"trl-fast": ["resolve_accelerate_config_argument"]},
    "trl.cli.accelerate_launcher": {"trl-fast": ["launch_training_script"]},
    "trl.cli.commands": {"trl-fast": ["get_commands"]},
    "trl.cli.commands.base": {"trl-fast": ["Command", "CommandContext"]},
    "trl.cli.commands.env": {"trl-fast": ["EnvCommand"]},
    "trl.cli.commands.training": {"trl-fast": ["TrainingCommand"]},
    "trl.cli.commands.vllm_serve": {"trl-fast": ["VllmServeCommand"]},
    "trl.cli.main": {"trl-fast": ["main"]},
    "trl.distributed": {"shards": ["DistributedBackend"]},
    "trl.generation.vllm_client": {
        "machinery around vLLM": ["VLLMClient", "parse_logprobs", "pil_to_base64", "to_openai_messages"]
    },
    "trl.generation.vllm_generation": {"machinery around vLLM": ["VLLMGeneration", "empty_cache", "extract_logprobs"]},
    "trl.kernels.chunked_divergence": {
        "TRL's own losses": ["ChunkedDivergenceFunction", "TOKEN_CHUNK_SIZE", "VOCAB_CHUNK_SIZE"]
    },
    "trl.kernels.chunked_logprob": {
        "TRL's own losses": ["ChunkedLogProbFunction", "OPTIONAL_OUTPUTS", "TOKEN_CHUNK_SIZE"]
    },
    "trl.models.activation_offloading": {
        "torch.distributed.tensor": ["DTensor"],
        "contextlib": ["NoOpManager"],
        "activation_offloading=True": ["OffloadActivations"],
    },
    "trl.models.utils": {"shards": ["add_hooks", "get_all_parameters", "iter_params", "remove_hooks"]},
    "trl.trainer": {
        "linear_logprob": ["add_fused_lm_head"],
    },
    "trl.trainer.reward_trainer": {"hides a warning": ["suppress_seqcls_warning"]},
    "trl.trainer.utils": {
        "linear_logprob": ["FusedCausalLMOutput", "add_fused_lm_head"],
        "shards": ["maybe_gather_lm_head_ctx"],
        "keeps images by row": ["split_pixel_values_by_grid", "unsplit_pixel_values_by_grid"],
    },
}
# The texts of models' templates, and how to read what they write: so many names end like that.
TEMPLATES, TEMPLATE_ENDS = 86, ("_chat_template", "_schema", "_template")

# What TRL 1.16 has no more, but older versions had.
OLDER_MODULES = {
    "trl.models.modeling_base",
    "trl.commands",
    "trl.commands.cli_utils",
    "trl.core",
    "trl.env_utils",
    "trl.utils",
    "trl.extras.dataset_formatting",
    "trl.trainer.online_dpo_config",
    "trl.trainer.online_dpo_trainer",
    "trl.trainer.ppo_config",
    "trl.trainer.ppo_trainer",
    "trl.experimental.ppo",
    "trl.experimental.ppo.ppo_config",
    "trl.experimental.ppo.ppo_trainer",
    *(f"trl.trainer.{name}_{part}" for name in ("bco", "orpo", "cpo") for part in ("config", "trainer")),
    *("trl.experimental.bco", "trl.experimental.bco.bco_config", "trl.experimental.bco.bco_trainer"),
    "trl.experimental.distillation.distillation_config",
    "trl.experimental.distillation.distillation_trainer",
    "trl.trainer.gkd_config",
    "trl.trainer.gkd_trainer",
    "trl.experimental.kto.kto_config",
    "trl.experimental.kto.kto_trainer",
    "trl.scripts.ppo",
}
OLDER_NAMES = {
    *("DataCollatorForCompletionOnlyLM", "FDivergenceConstants", "FDivergenceType", "PPOConfig", "PPOTrainer"),
    *("DPOScriptArguments", "DpoScriptArguments", "RewardScriptArguments", "SFTScriptArguments", "SftScriptArguments"),
    *(f"{method}Config" for method in ("NashMD", "PRM", "XPO")),
    *("BCOConfig", "BCOTrainer"),
    *("SIMPLE_CHAT_TEMPLATE", "compute_accuracy", "conversations_formatting_function", "exact_div", "flatten_dict"),
    *("flush_right", "get_formatting_func_from_dataset", "get_kbit_device_map", "instructions_formatting_function"),
    *(
        "masked_mean",
        "masked_var",
        "masked_whiten",
        "reward_funcs_registry",
        "set_seed",
        "shuffle_tensor_dict",
        "setup_chat_format",
        "strtobool",
        "truncate_response",
    ),
    *("is_bitsandbytes_available", "is_diffusers_available", "is_fastapi_available", "is_joblib_available"),
    *("is_llm_blender_available", "is_llmblender_available", "is_npu_available", "is_peft_available"),
    *("is_pil_available", "is_pydantic_available", "is_rich_available", "is_sklearn_available"),
    *("is_torchvision_available", "is_uvicorn_available", "is_vllm_ascend_available", "is_wandb_available"),
    *("is_xpu_available", "prepare_multimodal_messages_vllm"),
}


def public_names() -> dict[str, set[str]]:
    """Returns TRL's public names by module: what a module defines, and what a package lists."""
    root = Path(importlib.util.find_spec("trl").origin).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [part for part in path.relative_to(root.parent).with_suffix("").parts if part != "__init__"]
        if any(part.startswith("_") for part in parts):
            continue
        names = {name for node in ast.parse(path.read_text(encoding="utf-8")).body for name in defined(node)}
        found[".".join(parts)] = {name for name in names if not name.startswith("_") and name != "logger"}
    return found


def defined(node: ast.stmt) -> list[str]:
    """Returns the names that a statement of a module defines, or that its `_import_structure` lists."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
    if targets == ["_import_structure"]:
        return [name for names in ast.literal_eval(node.value).values() for name in names]
    return targets


NAMES = public_names()
# TRL's experimental methods are other methods: of them only what has a home here is answered.
WALKED = {module: names for module, names in NAMES.items() if not module.startswith("trl.experimental")}


@pytest.fixture
def unanswered(without_trl):
    """The names that are not answered, by module."""
    trl_fast.install_as_trl()
    left = {}
    for module, names in WALKED.items():
        try:
            ours = importlib.import_module(module)
        except ImportError:
            ours = None
        left[module] = {name for name in names if ours is None or not hasattr(ours, name)}
    return {module: names for module, names in left.items() if names}


def test_only_what_stands_here_is_not_answered(unanswered):
    templates = unanswered.pop("trl.chat_template_utils")
    assert all(name.endswith(TEMPLATE_ENDS) for name in templates)
    assert len(templates) == TEMPLATES
    assert unanswered == {
        module: {name for names in reasons.values() for name in names} for module, reasons in LEFT.items()
    }


def test_each_experiment_of_trl_is_here_or_has_its_own_reason():
    top = {".".join(name.split(".")[:3]) for name in NAMES if name.startswith("trl.experimental.")}
    for module in top - {"trl.experimental.utils"}:
        package, _, name = module.rpartition(".")
        assert (module in MODULES) != (module in GONE_MODULES), module
        if module in GONE_MODULES:
            assert all(GONE_MODULES[module] in explain(*of) for of in ((package, name), (module, "anything"))), module


def test_what_is_said_is_about_the_name():
    for module, reasons in LEFT.items():
        for word, names in reasons.items():
            for name in names:
                assert word in explain(module, name), f"{module}.{name}"


def test_the_table_is_true_of_trl():
    import trl

    assert trl.__version__ == TRL_VERSION
    everywhere = set().union(*NAMES.values())
    assert set(MODULES) - set(NAMES) == OLDER_MODULES
    assert {name for names in MODULES.values() for name in names} - everywhere == OLDER_NAMES
