"""Segment attention against a dense mask in float64, and how models are switched to it."""

import pytest
import torch
from transformers import Gemma2PreTrainedModel

from support.families import FAMILIES, LIKE_OTHERS, WINDOWED, WITH_SHARED_KEYS, WITH_SINKS
from support.models import tiny_model
from trl_fast.modeling import segment_attention as segment_attention_module
from trl_fast.modeling.attention.tree_attention import attention_spec
from trl_fast.modeling.layer_kinds import layer_kinds
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.segment_attention import (
    EAGER_SEGMENT_ATTENTION,
    SEGMENT_ATTENTION,
    row_inputs,
    segment_attention,
    use_segment_attention,
)

WINDOWS_IN_TURN = [
    pytest.param(family, marks=pytest.mark.slow if family in LIKE_OTHERS else ())
    for family in (*WINDOWED, *WITH_SINKS, *WITH_SHARED_KEYS)
]


@pytest.mark.parametrize("lengths", [(5,), (1, 1), (3, 7, 2)])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_against_a_dense_mask(lengths, key_heads):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    query = torch.randn(1, 4, total, 8, generator=generator).requires_grad_()
    key, value = (torch.randn(1, key_heads, total, 8, generator=generator).requires_grad_() for _ in range(2))
    trees = tuple((length,) for length in lengths)
    output, _ = segment_attention(None, query, key, value, None, scaling=0.3, tree_lengths=trees)

    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (segment[:, None] == segment[None, :]) & torch.ones(total, total).tril().bool()
    k, v = (x.double().repeat_interleave(4 // key_heads, dim=1) for x in (key, value))
    scores = (0.3 * query.double() @ k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)

    weights = torch.randn(output.shape, generator=generator)
    ours = torch.autograd.grad((output * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cap", "alone", "in_rows"), [(0.5, "eager", EAGER_SEGMENT_ATTENTION), (None, "sdpa", SEGMENT_ATTENTION)]
)
def test_capped_scores_are_never_left_to_sdpa(monkeypatch, cap, alone, in_rows):
    # As transformers 5.17 declares, whose SDPA ignores the cap.
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    model = tiny_model("gemma2", sliding_window=64, attn_logit_softcapping=cap)
    assert model.config._attn_implementation == "sdpa"
    attach_scoring(model)
    assert model.config._attn_implementation == alone
    use_segment_attention(model)
    assert model.config._attn_implementation == in_rows


@pytest.mark.parametrize("family", WINDOWS_IN_TURN)
def test_the_window_of_a_layer_is_the_one_that_its_kind_tells(family, monkeypatch):
    """A layout is chosen by the config, and attention computed by the keyword of the layer's call."""
    model, found = tiny_model(family.split(",")[0], **FAMILIES[family]).eval(), []

    def recording(query, mask, scale, softcap):
        found.append(mask.window)
        return attention_spec(query, mask, scale, softcap)

    monkeypatch.setattr(segment_attention_module, "attention_spec", recording)
    use_segment_attention(model)
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, position_ids=torch.arange(12)[None], use_cache=False, **row_inputs(((12,),), ids))
    assert found == [kind.window for kind in layer_kinds(model)] and any(found)
