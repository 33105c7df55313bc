"""The reference policy that is the policy without its adapter: what PEFT's own context makes, in less time."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from support.models import tiny_model
from trl_fast.modeling.reference_policy import adapter_reference, copy_adapter_as_reference

IDS = torch.randint(3, 340, (2, 13), generator=torch.Generator().manual_seed(0))
LORA = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "a head that is trained whole": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "rows of tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "bias": LoraConfig(**LORA, bias="lora_only"),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
PEFTS_OWN = ("bias", "ia3", "prefix")


def build(kind):
    """A model with an adapter that changes what it computes."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), CONFIGS[kind])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def state(model):
    """Which parameters train, and which layers are off."""
    trained = [weight.requires_grad for weight in model.parameters()]
    return trained, [getattr(module, "_disable_adapters", None) for module in model.modules()]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_without_its_adapter(kind, monkeypatch):
    model, twin = build(kind), build(kind)
    policy, before = logits(model), state(model)
    with twin.disable_adapter():
        expected = logits(twin)
    calls, plain = [], PeftModel.disable_adapter
    monkeypatch.setattr(PeftModel, "disable_adapter", lambda self: calls.append(1) or plain(self))
    with adapter_reference(model):
        assert torch.equal(logits(model), expected)
        assert state(model)[0] == before[0] and not model.has_active_enabled_adapter
    assert state(model) == before and model.has_active_enabled_adapter
    assert torch.equal(logits(model), policy) and not torch.equal(policy, expected)
    assert len(calls) == (kind in PEFTS_OWN)


def test_an_error_within_leaves_nothing_behind():
    model = build("a head that is trained whole")
    before = state(model)
    with pytest.raises(KeyError), adapter_reference(model):
        raise KeyError
    assert state(model) == before
    with model.disable_adapter():
        off = state(model)
        with adapter_reference(model):
            pass
        assert state(model) == off


def test_the_copy_of_an_adapter_has_all_of_it_whatever_its_name():
    """Parameters of an embedding end with the adapter's name."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config, adapter_name="own")
    copy_adapter_as_reference(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with adapter_reference(model):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2
