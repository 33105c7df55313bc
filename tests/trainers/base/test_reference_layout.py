"""A reference of another family than its policy: where it needs padded rows, both models get them."""

import pytest

import trl_fast
from support.models import tiny_model
from support.training import color_pairs, make_trainer

ROWS = {"max_steps": 2, "logging_steps": 1}


def train(reference, model_path, tokenizer, tmp_path, **settings):
    # Mamba keeps to itself where the sequences of a row begin.
    given = {"ref_model": tiny_model(reference, vocab_size=len(tokenizer)), "model": str(model_path)}
    arguments = {**given, "train_dataset": color_pairs(), "processing_class": tokenizer}
    trainer = make_trainer(trl_fast, tmp_path, method="DPO", arguments=arguments, **ROWS, **settings)
    trainer.train()
    return trainer.layout, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_both_models_get_padded_rows(model_path, tokenizer, tmp_path):
    layout, losses = train("mamba", model_path, tokenizer, tmp_path / "auto")
    assert layout.name == "padded" and "the reference, MambaForCausalLM, runs padded rows only" in layout.reason
    _, padded = train("mamba", model_path, tokenizer, tmp_path / "padded", batch_layout="padded")
    assert losses == padded


def test_a_reference_of_another_family_that_serves_changes_nothing(model_path, tokenizer, tmp_path):
    layout, _ = train("qwen2", model_path, tokenizer, tmp_path)
    assert (layout.name, layout.reason) == ("shared_prefix", None)


def test_a_layout_that_was_asked_for_is_refused(model_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="batch_layout='shared_prefix' cannot be used: the reference, MambaFor"):
        train("mamba", model_path, tokenizer, tmp_path, batch_layout="shared_prefix")
