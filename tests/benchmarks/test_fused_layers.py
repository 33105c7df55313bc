"""Steps with and without fused layers in one process: each has its own code, and the losses agree."""

from __future__ import annotations

import pytest
from transformers.models.llama import modeling_llama

from benchmarks import fused_layers
from support.models import tiny_model
from support.tokenizer import build_tokenizer


@pytest.mark.parametrize("method", fused_layers.METHODS)
def test_both_take_steps(method, tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    plain = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain)
    monkeypatch.setattr(fused_layers, "smollm2_folder", lambda: str(tmp_path))
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    turns = []
    norm = modeling_llama.LlamaRMSNorm.forward
    seen = lambda self, x: turns.append(modeling_llama.apply_rotary_pos_emb) or norm(self, x)  # noqa: E731
    arguments = fused_layers.parse_arguments(["--rounds", "1", "--batch", "2", "--tokens", "32"])
    found = fused_layers.race(method, arguments)
    assert found["losses"]["fused"] == pytest.approx(found["losses"]["plain"], rel=1e-5)
    assert all(len(times) == 1 for times in found["seconds"].values())
    assert hasattr(modeling_llama.apply_rotary_pos_emb, "fused_from")
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", seen)
    modeling_llama.apply_rotary_pos_emb = plain
    fused_layers.make_step(method, False, arguments, str(tmp_path))()
    assert turns and set(turns) == {plain}
