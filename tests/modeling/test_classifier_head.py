"""Rewards of token batches: every layout gives the rewards and gradients of the model's own forward."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AttentionInterface, AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from support.models import tiny_classifier
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data import LAYOUTS, reward_batch
from trl_fast.data.images.reader import ImageReader
from trl_fast.modeling.blank_images import attach_blank_image
from trl_fast.modeling.classifier_head import attach_classifier_head, rewards
from trl_fast.modeling.layouts import supports_packed_rewards
from trl_fast.modeling.loading import base_model, load_reward_model
from trl_fast.modeling.segment_attention import SEGMENT_ATTENTION, use_segment_attention
from trl_fast.modeling.verification import verify_rewards

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}
PAD = 2
PROMPT = [*range(30, 50)]
# Two of the pairs share a prompt; one sequence ends with the pad token, as texts do whose end token it is.
PAIRS = [
    ([5, 6, 7, 8, 9, 10], [11]),
    ([*PROMPT, 12, 13, 14], [*PROMPT, 15, PAD, 16, 17]),
    ([18, 19, 20], [21, 22, PAD]),
    (PROMPT, [*PROMPT, 23]),
]
SEQUENCES = [ids for pair in PAIRS for ids in pair]


def prepared(family, **changes):
    model = tiny_classifier(family, **{**FAMILIES.get(family, {}), **changes})
    attach_classifier_head(model)
    return model


def own_rewards(model):
    """By the model's own forward, one sequence at a time."""
    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits for ids in SEQUENCES]
    return torch.cat(logits).squeeze(-1)


def gradients(model, values):
    model.zero_grad()
    (torch.linspace(-1, 1, len(values)) * values).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_rewards(model, layout):
    expected = own_rewards(model)
    expected_gradients = gradients(model, expected)
    assert expected.std() > 0.1
    if layout != "padded":
        use_segment_attention(base_model(model))
    got = rewards(model, reward_batch(PAIRS, layout, PAD))
    assert got.shape == (len(SEQUENCES),) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    got_gradients = gradients(model, got)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            got_gradients[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_are_the_models_own(family, layout):
    model = prepared(family)
    assert supports_packed_rewards(model, 64) == (True, "every layer keeps the sequences of a row apart")
    assert_same_rewards(model, layout)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointing(reentrant):
    model = prepared("llama")
    expected = gradients(model, own_rewards(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    use_segment_attention(model)
    got = gradients(model, rewards(model, reward_batch(PAIRS, "packed", PAD)))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=2e-5)


HEADS = {
    "saved whole": {"task_type": "SEQ_CLS"},
    "by name": {"modules_to_save": ["score"]},
    "with an adapter": {"target_modules": ["q_proj", "score"]},
    "frozen": {},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", HEADS.values(), ids=HEADS.keys())
def test_adapters(how, layout):
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **how})
    model = get_peft_model(prepared("llama"), config)
    head = [name for name, p in model.named_parameters() if p.requires_grad and ".score" in name]
    assert bool(head) == bool(how)
    assert_same_rewards(model, layout)


def test_bfloat16_gives_float32_rewards_near_the_float32_ones():
    model = prepared("llama")
    use_segment_attention(model)
    batch = reward_batch(PAIRS, "packed", PAD)
    exact = rewards(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rewards(model, batch)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.1)


def test_attaching_twice_and_calling_as_before():
    model = prepared("llama")
    forward = model.forward
    attach_classifier_head(model)
    assert model.forward == forward
    assert model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1.0])).loss is not None


def test_verify_compares_rows_with_single_sequences():
    model = prepared("llama")
    use_segment_attention(model)
    for layout in ("shared_prefix", "packed"):
        verdict = verify_rewards(model, SEQUENCES[:2], layout=layout)
        assert verdict.packed_ok and verdict.packed_error < 1e-5 and verdict.fused_ok
    assert model.training
    assert verify_rewards(model, SEQUENCES[:2], layout=None).packed_error == float("inf")


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_verify_sees_sequences_that_attend_to_each_other(layout, monkeypatch):
    def leaky(module, query, key, value, mask, tree_lengths=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    model = prepared("llama")
    use_segment_attention(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, SEGMENT_ATTENTION, leaky)
    assert not verify_rewards(model, SEQUENCES[:2], layout=layout).packed_ok


def test_models_that_read_no_last_token_are_not_packed():
    model = tiny_classifier("bert")
    possible, reason = supports_packed_rewards(model, 64)
    assert not possible and "BertForSequenceClassification has no head 'score'" in reason
    expected = own_rewards(model.eval())
    torch.testing.assert_close(rewards(model, reward_batch(PAIRS, "padded", PAD)), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_gives_several_numbers_is_named():
    with pytest.raises(ValueError, match=r"logits of shape \(1, 3\).*num_labels=1"):
        verify_rewards(prepared("llama", num_labels=3), SEQUENCES[:1], layout=None)


def test_loading(tmp_path):
    prepared("llama").save_pretrained(tmp_path / "reward")
    assert load_reward_model(str(tmp_path / "reward")).dtype == torch.float32
    with pytest.raises(ValueError, match="num_labels=2, but a reward is one number"):
        load_reward_model(str(tmp_path / "reward"), num_labels=2)
    tiny_classifier("llama", num_labels=3).save_pretrained(tmp_path / "topics")
    with pytest.raises(ValueError, match="topics' is a classifier with num_labels=3"):
        load_reward_model(str(tmp_path / "topics"))


def test_a_saved_adapter_brings_its_head(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(prepared("llama"), config).eval()
    with torch.no_grad():
        base_model(model).score.modules_to_save["default"].weight.mul_(-2)
    model.save_pretrained(tmp_path)
    fresh = tiny_classifier("llama")
    torch.testing.assert_close(own_rewards(PeftModel.from_pretrained(fresh, tmp_path).eval()), own_rewards(model))


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_rewards_of_text_read_a_blank_image_where_other_processes_wait(layout):
    """The same bits; the tower has gradients, which are zeros."""
    config = tiny_vision_model("gemma3").config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).float()
    attach_classifier_head(model)
    if layout != "padded":
        use_segment_attention(model)
    batch = reward_batch([([*range(5, 25), 6], [*range(5, 25), 7])], layout, 2)
    expected = rewards(model, batch)
    blank = ImageReader(tiny_processor("gemma3")).image_input(pictures(1)[0])
    attach_blank_image(model, blank.tensors)
    found = rewards(model, batch)
    assert torch.equal(found, expected)
    found.sum().backward()
    gradient = model.model.multi_modal_projector.mm_input_projection_weight.grad
    assert gradient is not None and not gradient.any()
