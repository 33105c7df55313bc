"""Models that bring Python code of their own, in scripts of older TRL and from the command line."""

import json
import shlex
import sys

import pytest

import trl_fast
from support.training import color_pairs
from trl_fast.cli.main import main

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
# As TRL's own sft.py was until 1.6.
SCRIPT = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
path, trust = model_args.model_name_or_path, model_args.trust_remote_code
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
assert type(model).__name__ == "OwnForCausalLM" and type(tokenizer).__name__ == "OwnTokenizer"
dataset = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
SFTTrainer(model, training_args, train_dataset=dataset, processing_class=tokenizer).train()
"""
FLAGS = shlex.split(
    "--model_name_or_path own --dataset_name trl-lib/Capybara --output_dir result --max_steps 1 --use_cpu true "
    "--bf16 false --report_to none"
)


@pytest.fixture
def own_model(workplace, hub, monkeypatch):
    """A folder `own` with a model and tokenizer whose classes stand in it."""
    folder, source = workplace / "own", hub / "Qwen" / "Qwen2.5-0.5B-Instruct"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=model)
    tokenizer = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer)
    for kind, text in {"configuration": CONFIGURATION, "modeling": MODELING, "tokenization": TOKENIZATION}.items():
        (folder / f"{kind}_own.py").write_text(text)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workplace / "modules"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.usefixtures("own_model", "without_trl")
def test_a_script_that_trusts_it(workplace):
    (workplace / "script.py").write_text(SCRIPT)
    assert main(["run", "script.py", *FLAGS, "--trust_remote_code"]) == 0


@pytest.mark.usefixtures("own_model", "without_trl")
def test_a_command_runs_it_only_if_it_is_trusted(workplace, capsys):
    assert main(["sft", *FLAGS]) != 0
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (workplace / "modules").exists()
    assert main(["sft", *FLAGS, "--trust_remote_code"]) == 0
    assert (workplace / "result" / "modeling_own.py").is_file()


@pytest.mark.usefixtures("own_model")
def test_a_reference_by_name_is_trusted_as_the_policy_is():
    args = trl_fast.DPOConfig("result", trust_remote_code=True, use_cpu=True, bf16=False, report_to="none")
    trainer = trl_fast.DPOTrainer("own", "own", args, train_dataset=color_pairs(4))
    assert type(trainer.model).__name__ == type(trainer.ref_model).__name__ == "OwnForCausalLM"
