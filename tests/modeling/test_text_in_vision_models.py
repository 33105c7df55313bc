"""Models that read images too, trained on text: their text models in rows, as the class around gives it padded."""

from __future__ import annotations

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model

from support.layout_gradients import assert_same, loss_and_gradients
from support.trees import random_trees
from support.vision_models import CONFIGS, tiny_vision_model
from trl_fast.data import Tree
from trl_fast.modeling.layouts import LayoutRequest, choose_layout, supports_packed
from trl_fast.modeling.loading import backbone, load_causal_lm
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.unread_parts import (
    FROZEN_PARTS,
    PRESENT_LAYERS,
    freeze_unread_parts,
    name_present_layers,
)

BY_DEFAULT = ("gemma3", "gemma4", "qwen2_5_vl", "smolvlm")
FAMILIES = [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in CONFIGS]


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    """Pairs, three branches, one branch, and a prompt that is too short to be shared."""
    return random_trees([(18, (3, 5)), (21, (6, 1, 4)), (17, (4,)), (3, (4, 7))])


def build(name, **text):
    model = tiny_vision_model(name, **text)
    attach_scoring(model)
    freeze_unread_parts(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient(name, trees):
    """Its text model in each layout against the forward of the whole class, which takes whole rows."""
    model = build(name)
    model.trl_fast_fused_head = False  # its own forward, with all that stands around its text model
    expected = loss_and_gradients(model, trees, "padded")
    assert all(gradient is not None for gradient in expected[1].values())
    model.trl_fast_fused_head = True
    assert_same(loss_and_gradients(model, trees, "padded"), expected)
    assert supports_packed(model, 64)[0]
    use_segment_attention(model)
    for layout in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees, layout), expected)
    model.trl_fast_fused_head = False
    assert_same(loss_and_gradients(model, trees, "shared_prefix"), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_with_an_adapter(reentrant, trees):
    """The adapter's matrices in the tower stay as they are."""
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_vision_model("qwen2_5_vl"), config)
    attach_scoring(model.get_base_model())
    freeze_unread_parts(model.get_base_model())
    expected = loss_and_gradients(model, trees, "padded")
    assert expected[1] and all(".language_model." in name for name in expected[1])
    use_segment_attention(model.get_base_model())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, trees, "shared_prefix"), expected)


def test_only_the_text_model_is_changed(caplog):
    model = build("gemma3")
    assert "the 23,424 parameters that read images or sound stay as they are" in caplog.text
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "language_model" in name or "lm_head" in name}
    before = model.config.vision_config._attn_implementation
    layout = choose_layout(model, LayoutRequest("auto", max_length=64), [[5, 6, 7, 8]])
    assert layout.name == "shared_prefix" and model.config.vision_config._attn_implementation == before
    changes_of(model).undo(FROZEN_PARTS)
    assert all(weight.requires_grad for weight in model.parameters())
    freeze_unread_parts(backbone(model))
    assert all(weight.requires_grad for weight in model.parameters())


def test_fsdp_is_told_only_kinds_of_layers_that_are_there():
    """accelerate stops at Gemma 4's layers of sound in a model without them."""
    model = build("gemma4")
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    name_present_layers(model)
    plugin.set_auto_wrap_policy(model)
    assert "Gemma4TextDecoderLayer" in plugin.transformer_cls_names_to_wrap
    changes_of(model).undo(PRESENT_LAYERS)
    assert "Gemma4AudioLayer" in model._no_split_modules


def test_a_checkpoint_is_loaded_as_the_class_that_wrote_it(tmp_path):
    model = tiny_vision_model("smolvlm")
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path))
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
