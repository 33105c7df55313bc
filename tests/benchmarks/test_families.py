"""The walk through all families of transformers: none is run wrongly, whatever is known of its layers."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families import main, try_family
from trl_fast.modeling import layouts
from trl_fast.modeling.layer_kinds import ATTENTION, layer_kinds

# Not built as a small text model: they read images or sounds, or their sizes do not go together when made small.
NOT_BUILT = 45


def test_a_line_a_family(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["families", "gpt_oss", "bloom"])
    main()
    served, refused = capsys.readouterr().out.splitlines()
    assert served.split()[:2] == ["gpt_oss", "shared_prefix"] and float(served.split()[2]) < 2e-5
    assert refused.split()[:2] == ["bloom", "padded"] and "AttentionInterface" in refused


def test_chunks_that_were_taken_for_full_attention_are_noticed(monkeypatch):
    monkeypatch.setattr(
        layouts,
        "layer_kinds",
        lambda model: tuple(kind._replace(mixer=ATTENTION, chunk=None) for kind in layer_kinds(model)),
    )
    found = try_family("llama4_text")
    assert found.layout == "padded" and "differ" in found.reason


@pytest.mark.slow
def test_no_family_is_run_wrongly():
    found = [try_family(family) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    assert [outcome for outcome in found if outcome.error is not None and outcome.error > 2e-5] == []
    assert all(outcome.reason for outcome in found if outcome.layout != "shared_prefix")
    assert sum(outcome.layout == "none" for outcome in found) <= NOT_BUILT
