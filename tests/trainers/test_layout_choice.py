"""Models that cannot run rows without padding, or cannot share prompts, train in the layout that is right for them."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import trl_fast
import trl_fast.data.packing as packing
from support.families import FAMILIES, LATENT
from support.models import tiny_config, tiny_model
from support.training import color_pairs, make_trainer

CHUNKED = {"attention_chunk_size": 16, "num_local_experts": 4, "intermediate_size_mlp": 32}
REFUSED = {
    "state space": ("mamba", {}, "carries a state from token to token.*Mamba 1"),
    "chunked attention": ("llama4_text", CHUNKED, "chunks of 16 tokens"),
    "sparse attention": ("deepseek_v32", {**LATENT, "n_routed_experts": 4}, "than is known: indexed_attention"),
    "ALiBi": ("bloom", {}, "AttentionInterface"),
    "ALiBi by the config": ("mpt", {}, "AttentionInterface"),
    # Its layers hand no keywords on, which no declaration tells.
    "lengths that get lost": ("nemotron", {}, "shared_prefix scores differ from the single ones by"),
}
# Models of 2026, as they are shaped: windows, sinks, shared keys, states, convolutions.
SERVED = ["gemma3_text", "gemma4_text", "gpt_oss", "qwen3_5_text", "lfm2", "jamba"]


@pytest.fixture
def build(tokenizer, tmp_path, caplog):
    """A DPO trainer of a model, and what was said about its layout."""

    def build(model, **settings):
        arguments = {"model": model, "processing_class": tokenizer, "train_dataset": color_pairs(4)}
        options = {"max_steps": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, **settings}
        with caplog.at_level(logging.WARNING, "trl_fast"):
            trainer = make_trainer(trl_fast, tmp_path, arguments=arguments, **options)
        said = [record.message for record in caplog.records if record.message.startswith("batch_layout")]
        caplog.clear()
        return trainer, said

    return build


def assert_scores_are_the_models_own(trainer):
    """A batch's log-probs against those of the model's own logits, one sequence at a time."""
    model = trainer.model.eval()
    batch = trainer.data_collator.collate([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        got = trainer.score(model, batch).tokens.logprobs
        for index, (ids, length) in enumerate(zip(batch.sequences(), batch.branch_lengths, strict=True)):
            own = model(input_ids=ids[None], use_cache=False).logits[0, -length - 1 : -1].float().log_softmax(-1)
            expected = own.gather(1, ids[-length:, None]).squeeze(1)
            torch.testing.assert_close(got[batch.branch == index], expected, rtol=1e-4, atol=2e-4)


def assert_trains(trainer):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(0.5 < entry["loss"] < 1 for entry in trainer.state.log_history if "loss" in entry)
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("family, changes, reason", REFUSED.values(), ids=REFUSED.keys())
def test_padded_and_said_once(family, changes, reason, build, tokenizer):
    trainer, (said,) = build(tiny_model(family, vocab_size=len(tokenizer), **changes))
    assert re.match(f"batch_layout: using 'padded', because .*{reason}", said)
    assert trainer.data_collator.layout == "padded"
    assert_scores_are_the_models_own(trainer)
    assert_trains(trainer)


@pytest.mark.parametrize("family", SERVED)
def test_todays_models_share_prompts(family, build, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    sizes = {name: len(tokenizer) for name in FAMILIES[family] if name.startswith("vocab_size")}
    trainer, said = build(tiny_model(family, **{**FAMILIES[family], **sizes, "vocab_size": len(tokenizer)}))
    assert said == [] and trainer.data_collator.layout == "shared_prefix"
    assert_scores_are_the_models_own(trainer)
    assert_trains(trainer)


def test_a_model_of_images_trains_on_text(build, tokenizer):
    text = tiny_config("llama", vocab_size=len(tokenizer)).to_dict()
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=3))
    trainer, said = build(model)
    assert said == [] and trainer.data_collator.layout == "shared_prefix"
    assert_scores_are_the_models_own(trainer)
    assert_trains(trainer)


@pytest.mark.parametrize("disable", [True, False])
def test_attention_dropout(disable, build, tokenizer):
    """Left on, prompts are not shared; switched off, it is off in the attention function too."""
    model = tiny_model(vocab_size=len(tokenizer), attention_dropout=0.5)
    trainer, said = build(model, disable_dropout=disable)
    if disable:
        assert said == [] and trainer.data_collator.layout == "shared_prefix"
        assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)
    else:
        assert "attention dropout of 0.5" in said[0] and trainer.data_collator.layout == "packed"
    trainer.train()


def test_capped_scores_share_prompts(build, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    trainer, said = build(tiny_model("gemma2", vocab_size=len(tokenizer), attn_logit_softcapping=0.5))
    assert said == [] and trainer.data_collator.layout == "shared_prefix"
    assert_scores_are_the_models_own(trainer)
    assert_trains(trainer)


def test_an_attention_that_was_chosen_is_kept(build, tokenizer, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", sdpa_mask)
    model = tiny_model(vocab_size=len(tokenizer))
    model.set_attn_implementation("mine")
    trainer, (said,) = build(model)
    assert "attn_implementation='mine' was chosen" in said and trainer.data_collator.layout == "padded"
    assert model.config._attn_implementation == "mine"
    assert_trains(trainer)


def test_flash_attention_that_is_not_installed_is_not_needed(build, model_path, caplog):
    trainer, said = build(model_path, model_init_kwargs={"attn_implementation": "flash_attention_2"})
    assert said == []
    assert trainer.data_collator.layout == "shared_prefix"
    assert trainer.train().training_loss > 0
