"""What the model's flags describe."""

import dataclasses

import pytest
from peft import LoraConfig

from trl_fast.cli.arguments import ModelConfig, get_kbit_device_map, get_peft_config, get_quantization_config
from trl_fast.cli.parser import TrlParser


def test_peft_config_from_flags():
    assert get_peft_config(ModelConfig()) is None
    config = get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], use_dora=True))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.target_modules, config.use_dora, config.task_type) == (4, "all-linear", True, "CAUSAL_LM")


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


def test_what_moved_to_the_trainers_config_says_so():
    with pytest.raises(AttributeError, match="field of the trainer's config"):
        ModelConfig().trust_remote_code  # noqa: B018
    assert TrlParser(ModelConfig).parse_args_and_config(["--torch_dtype", "auto"])[0].dtype == "auto"
