"""The model's flags describe its adapter, its quantisation and its dtype."""

import copy
import dataclasses

import pytest
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser

import trl_fast
from support.families import WITH_STATES
from support.models import tiny_model
from trl_fast.cli.arguments import (
    ModelConfig,
    ScriptArguments,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)
from trl_fast.cli.parser import TrlParser
from trl_fast.planning.fake_models import lora_config
from trl_fast.planning.training_setup import setup_from_training
from trl_fast.trainers import SFTConfig


def test_peft_config_from_flags():
    assert get_peft_config(ModelConfig()) is None
    config = get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], use_dora=True))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.target_modules, config.use_dora, config.task_type) == (4, "all-linear", True, "CAUSAL_LM")


def test_an_adapter_leaves_modules_out():
    """Nemotron-H takes all-linear only without what Mamba's kernels read themselves; in training and in a plan."""
    args = ModelConfig(use_peft=True, lora_target_modules=["all-linear"], lora_exclude_modules=["out_proj", "conv1d"])
    model = tiny_model("nemotron_h", **WITH_STATES["nemotron_h"])
    setup = setup_from_training("sft", SFTConfig(output_dir="out", max_length=8), args, model.config)
    for config in (get_peft_config(args), lora_config(setup)):
        names = {
            name for name, _ in get_peft_model(copy.deepcopy(model), config).named_parameters() if "lora_A" in name
        }
        assert any("in_proj" in name for name in names) and not any("out_proj" in name for name in names)


@pytest.mark.parametrize(
    "given, understood",
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*layers\.[01]\..*q_proj"], r".*layers\.[01]\..*q_proj"),
    ],
)
def test_a_lone_target_module_is_a_name_unless_it_is_a_pattern(given, understood):
    config = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=given))
    assert config.target_modules == understood


def test_quantisation_from_flags():
    assert get_quantization_config(ModelConfig()) is None
    assert get_quantization_config(ModelConfig(load_in_4bit=True)).load_in_4bit
    with pytest.raises(ValueError, match="load_in_4bit"):
        ModelConfig(load_in_4bit=True, load_in_8bit=True)


def test_a_quantised_model_goes_to_this_process_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert get_kbit_device_map() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert get_kbit_device_map() == {"": 0}


def test_the_older_name_of_dtype():
    assert ModelConfig(dtype="bfloat16").torch_dtype == "bfloat16"
    assert dataclasses.replace(ModelConfig(), dtype="bfloat16").dtype == "bfloat16"
    with pytest.warns(FutureWarning, match="ModelConfig: `torch_dtype`"):
        assert ModelConfig(torch_dtype="float16").dtype == "float16"


def test_trust_in_remote_code_is_read_and_given_here_as_older_scripts_do():
    assert ModelConfig().trust_remote_code is False
    assert ModelConfig(model_name_or_path="x", trust_remote_code=True).trust_remote_code is True


@dataclasses.dataclass
class MyModelConfig(ModelConfig):
    """As scripts have it: a subclass that leaves the parent's __post_init__ out."""

    rope: int = 1

    def __post_init__(self):
        pass


@pytest.mark.parametrize("model_class", [ModelConfig, MyModelConfig])
@pytest.mark.parametrize("others", [(ScriptArguments,), (ScriptArguments, trl_fast.PPOConfig)])
@pytest.mark.parametrize("flags, trusted", [(["--trust_remote_code"], True), (["--trust-remote-code=no"], False)])
def test_one_flag_is_for_the_model_and_the_trainer(flags, trusted, others, model_class, tmp_path):
    training = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"] if len(others) > 1 else []
    parsed = TrlParser((*others, model_class)).parse_args_and_config([*training, *flags])
    assert len(parsed) == len(others) + 1
    told = [one.trust_remote_code for one in parsed if hasattr(one, "trust_remote_code")]
    assert told == [trusted] * len(others)


def test_trust_in_a_yaml_file(tmp_path):
    (tmp_path / "config.yaml").write_text("trust_remote_code: true\n")
    (model_args,) = TrlParser(ModelConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert model_args.trust_remote_code is True


def test_transformers_own_parser_has_the_flag_once(tmp_path):
    # Scripts of older TRL parse with it. A flag of two dataclasses would be an error.
    parser = HfArgumentParser((ScriptArguments, trl_fast.KTOConfig, ModelConfig))
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--trust_remote_code"]
    _, training_args, model_args = parser.parse_args_into_dataclasses(flags)
    assert training_args.trust_remote_code is True and model_args.trust_remote_code is False


def test_the_older_name_of_dtype_as_a_flag():
    assert TrlParser(ModelConfig).parse_args_and_config(["--torch_dtype", "auto"])[0].dtype == "auto"
