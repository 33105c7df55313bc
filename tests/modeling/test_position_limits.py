"""Rows longer than a model has positions for are named before training."""

import logging

import pytest

from support.models import tiny_model
from trl_fast.modeling.position_limits import check_positions


def build(family, **changes):
    return tiny_model(family, max_position_embeddings=40, **changes)


@pytest.mark.parametrize("family, changes", [("gpt2", {}), ("opt", {}), ("gptj", {"rotary_dim": 4})])
def test_a_table_of_positions_ends(family, changes):
    model = build(family, **changes)
    check_positions(model, 40, 40, "train")
    check_positions(model, 40, None, "train")
    name = type(model).__name__
    with pytest.raises(
        ValueError,
        match=rf"max_length=None: the longest sequence of the eval dataset has 41 tokens, but {name} has a table of "
        r"40 positions \(max_position_embeddings\); set max_length=40 or less",
    ):
        check_positions(model, 41, None, "eval")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_rotary_model_computes_on(family, caplog):
    model = build(family)
    with caplog.at_level(logging.WARNING, "trl_fast"):
        check_positions(model, 40, 1000, "train")
    assert not caplog.records
    check_positions(model, 41, 1000, "train")
    (record,) = caplog.records
    assert "max_length=1000" in record.message and "41 tokens, more than the 40 positions" in record.message
    assert "set max_length=40" in record.message


@pytest.mark.parametrize("family, stops", [("gpt2", True), ("llama", False)])
def test_rows_that_nobody_has_seen(family, stops, caplog):
    model = build(family)
    check_positions(model, None, 40, "train")
    assert not caplog.records
    check_positions(model, None, None, "train")
    (record,) = caplog.records
    assert "rows of the train dataset may be longer than the 40 positions" in record.message
    assert ("training would stop at one" in record.message) == stops


def test_a_model_without_a_maximum(caplog):
    model = build("bloom")
    del model.config.max_position_embeddings
    check_positions(model, 10**6, None, "train")
    assert not caplog.records
