"""Simulated sizes and peaks of QLoRA against those of real weights and steps, by bitsandbytes on this CPU."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_fast
from support.low_bit import low_bit_layers, quantization
from support.models import save_tiny_model, tiny_config
from support.step_peaks import peak_of_a_step, simulated_peak
from support.tokenizer import build_tokenizer
from trl_fast.planning.fake_models import meta_model
from trl_fast.planning.quantized_layers import QuantizedLinear
from trl_fast.planning.training_setup import TrainingSetup

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.plans

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 32}
LENGTH = 128


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), build_tokenizer(), **SIZES)


def setup_of(kind, **changes):
    config = tiny_config("llama", vocab_size=len(build_tokenizer()), **SIZES)
    adapter = {"lora_r": 8, "lora_target_modules": "all-linear"}
    bits = "8bit" if kind == "int8" else "4bit"
    return TrainingSetup(config, method="sft", device="cpu", quantization=bits, **adapter, **changes)


def stored_bytes(layer):
    """Bytes of a layer's weight and of the constants that go with it."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.nbytes + layer.weight.SCB.nbytes
    tensors = [layer.weight, state.absmax, state.code]
    tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind, nested", [("nf4", False), ("nf4", True), ("int8", False)])
def test_weights_take_what_is_planned(kind, nested, path):
    more = {"bnb_4bit_use_double_quant": True} if nested else {}
    real = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization(kind, **more))
    planned = meta_model(setup_of(kind, nested_quantization=nested)).modules()
    layers = [layer for layer in planned if isinstance(layer, QuantizedLinear)]
    assert [sum(each.nbytes for each in (layer.weight, *layer.buffers())) for layer in layers] == [
        stored_bytes(layer) for layer in low_bit_layers(real)
    ]


def measured_peak(setup, kind, path, folder):
    args = trl_fast.SFTConfig(
        str(folder),
        max_length=LENGTH,
        per_device_train_batch_size=setup.per_device_train_batch_size,
        gradient_checkpointing=setup.gradient_checkpointing,
        model_init_kwargs={"dtype": setup.dtype},
        bf16=setup.bf16,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = trl_fast.SFTTrainer(
        path,
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": [5] * LENGTH}] * setup.per_device_train_batch_size),
        quantization_config=quantization(kind, setup.torch_dtype),
        peft_config=LoraConfig(r=setup.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return peak_of_a_step(trainer, next(iter(trainer.get_train_dataloader())), setup)


CASES = [
    ("nf4", torch.bfloat16, True),
    ("int8", torch.float32, True),
    *(
        pytest.param(kind, dtype, checkpointing, marks=pytest.mark.slow)
        for kind, dtype, checkpointing in [
            ("nf4", torch.float32, True),
            ("int8", torch.bfloat16, True),
            ("nf4", torch.float32, False),
            ("nf4", torch.bfloat16, False),
            ("int8", torch.float32, False),
            ("int8", torch.bfloat16, False),
        ]
    ),
]


@pytest.mark.parametrize("kind, dtype, checkpointing", CASES)
def test_a_step_takes_what_is_planned(kind, dtype, checkpointing, path, tmp_path):
    changes = {"dtype": str(dtype).removeprefix("torch."), "bf16": dtype == torch.bfloat16}
    setup = setup_of(kind, gradient_checkpointing=checkpointing, per_device_train_batch_size=4, **changes)
    measured = measured_peak(setup, kind, path, tmp_path)
    # What checkpointing keeps is chosen while a step runs, by the order of its products.
    assert simulated_peak(setup, LENGTH) == pytest.approx(measured, rel=0.05 if checkpointing else 1e-3)
