"""Weights that are NaN or infinite are found, whatever their dtype, and named."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from support.models import tiny_model
from trl_fast.modeling.finite_weights import check_weights, not_finite
from trl_fast.ops.validation import NotFiniteError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2]


def set_weight(model, name, value):
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight.view(-1)[weight.numel() // 2] = value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found(dtype, value):
    weights = [torch.nn.Parameter(torch.full((5, 3), number).to(dtype), False) for number in (0.0, 448.0, -1.0)]
    model = torch.nn.ParameterDict({str(index): weight for index, weight in enumerate(weights)})
    assert not_finite(model) == []
    bad = torch.ones(15)
    bad[7] = value
    weights[1].data = bad.reshape(5, 3).to(dtype)
    assert not_finite(model) == ["1"]


def test_what_has_no_numbers_is_left_out():
    weights = [torch.ones(3, dtype=torch.uint8), torch.empty(0), torch.empty(4, device="meta")]
    assert not_finite(torch.nn.ParameterList(torch.nn.Parameter(weight, False) for weight in weights)) == []


def test_bytes_of_4_bit_weights_are_no_floats():
    """Also where bnb_4bit_quant_storage says that they are, as FSDP wants."""
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(4, 2)
    layer.weight.data = torch.full((4, 1), float("nan"))
    assert not_finite(layer) == []
    set_weight(layer, "bias", float("nan"))
    assert not_finite(layer) == ["bias"]


def test_a_model_with_its_adapter():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    check_weights(model, "model 'tiny'")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    set_weight(model, name, float("nan"))
    with pytest.raises(NotFiniteError) as error:
        check_weights(model, "model 'tiny'")
    message = f"model 'tiny': 1 parameters hold NaN or infinity, first '{name}'; these weights are broken: "
    assert str(error.value).startswith(message)
    set_weight(model, "base_model.model.lm_head.weight", float("inf"))
    assert not_finite(model) == [name, "base_model.model.lm_head.weight"]
