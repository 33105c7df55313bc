"""Trial runs before training: a model that is wrong in one thing only is noticed, and nothing is left behind."""

from __future__ import annotations

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface

from support.models import tiny_classifier, tiny_model
from trl_fast.data.packing import MIN_SHARED_TOKENS, pack_trees
from trl_fast.data.segments import segments_of
from trl_fast.modeling.classifier_head import attach_classifier_head
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.recurrent_layers import SegmentStates
from trl_fast.modeling.reference_policy import freeze
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.segment_attention import SEGMENT_ATTENTION, segment_attention, use_segment_attention
from trl_fast.modeling.verification import probe_trees, verify, verify_rewards

SEQUENCES = [[5, 6, 7, 9, 120, 40], [8, 9, 10, 11, 77]]


def prepared(family="llama", **changes):
    model = tiny_model(family, **changes)
    attach_scoring(model)
    use_segment_attention(model)
    return model


def change_attention(monkeypatch, attend):
    monkeypatch.setitem(AttentionInterface._global_mapping, SEGMENT_ATTENTION, attend)


def test_the_short_trees():
    config = tiny_model("llama").config
    trees = probe_trees(SEQUENCES, config)
    prompts = [len(tree.prompt_ids) for tree in trees]
    # Some are shared and padded beside each other, one is shorter than a convolution is wide.
    assert len(set(prompts)) == len(prompts) and sum(p >= MIN_SHARED_TOKENS for p in prompts) > 1 and min(prompts) < 3
    assert trees[0].prompt_ids[:13] == [*SEQUENCES[0], *SEQUENCES[1], 5, 6]
    lengths = pack_trees(trees, "shared_prefix", 0).tree_lengths
    assert max(segment.depth for segment in segments_of(lengths)) == 2
    assert min(segment.length for segment in segments_of(lengths)) == 1
    config.max_position_embeddings = 21
    assert [len(tree.prompt_ids) for tree in probe_trees(SEQUENCES, config)] == [16, 2]


def test_sequences_of_one_length_are_read_together():
    """A trial of a large model is a matter of passes: its weights are read in each, or sent by other processes."""
    model, passes = prepared(), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert verify(model, SEQUENCES, layout="shared_prefix").packed_ok
    alone = [(3, 41), (1, 21), (2, 17), (1, 6)]
    # A prompt of two tokens is not worth sharing: it stands before both completions.
    assert passes == [*alone, *alone, (1, 21 + 20 + 17 + 3 + 3 + 16 + 5 + 1 + 2 + 15 + 2 + 4)]


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_a_prompt_whose_keys_have_no_graph_gives_a_wrong_gradient_alone(layout, monkeypatch):
    """The scores are right; a row that shares nothing has no such prompts."""

    def detached(module, query, key, value, mask, tree_lengths=None, **kwargs):
        if tree_lengths is not None:
            is_prompt = torch.zeros(key.shape[2], dtype=torch.bool)
            for segment in segments_of(tree_lengths):
                is_prompt[segment.start : segment.end] = segment.is_continued
            key, value = (torch.where(is_prompt[:, None], x.detach(), x) for x in (key, value))
        return segment_attention(module, query, key, value, mask, tree_lengths=tree_lengths, **kwargs)

    model = prepared()
    change_attention(monkeypatch, detached)
    verdict = verify(model, SEQUENCES, layout=layout)
    assert verdict.packed_error < 1e-4 and verdict.fused_ok
    assert verdict.packed_ok == (layout == "packed")
    if not verdict.packed_ok:
        assert verdict.mismatch(layout).startswith("the gradient of its shared_prefix rows differs")


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_window_that_is_off_by_one(off, monkeypatch):
    """Its own is far longer than what is tried out."""

    def attend(module, *args, tree_lengths=None, sliding_window=None, **kwargs):
        if tree_lengths is not None:
            sliding_window += off
        return segment_attention(module, *args, tree_lengths=tree_lengths, sliding_window=sliding_window, **kwargs)

    model = prepared("mistral", sliding_window=64)
    change_attention(monkeypatch, attend)
    for layout in ("shared_prefix", "packed"):
        assert verify(model, SEQUENCES, layout=layout).packed_ok == (off == 0)
    assert model.config.sliding_window == 64


def test_a_row_that_fails_to_shorten_its_windows_is_noticed(monkeypatch):
    """Windows that neither masks nor modules read by the usual name would be right on short sequences alone."""
    model = prepared("mistral", sliding_window=64)
    monkeypatch.setattr("trl_fast.modeling.verification.shortened_windows", lambda *_: torch.no_grad())
    verdict = verify(model, SEQUENCES, layout="packed")
    assert not verdict.packed_ok and "windows cannot be shortened" in verdict.mismatch("packed")


STATEFUL = {
    "qwen3_next": {
        **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4},
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mlp_only_layers": [0, 1]},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def without_graph(states, numbers):
    return RIGHT_ROWS(
        SegmentStates({k: v.detach() for k, v in states.conv_states.items()}, states.recurrent_states), numbers
    )


def of_the_tree_before(states, numbers):
    return RIGHT_ROWS(states, numbers.roll(1))


RIGHT_ROWS = SegmentStates.rows


@pytest.mark.parametrize("rows", [None, without_graph, of_the_tree_before])
@pytest.mark.parametrize("family", STATEFUL)
def test_states_without_a_graph_and_of_another_prompt(family, rows, monkeypatch):
    model = prepared(family, **STATEFUL[family])
    if rows is not None:
        monkeypatch.setattr(SegmentStates, "rows", rows)
    verdict = verify(model, SEQUENCES, layout="shared_prefix")
    assert verdict.fused_ok and verdict.packed_ok == (rows is None)
    assert (verdict.packed_error < 1e-4) == (rows is not of_the_tree_before)
    assert verify(model, SEQUENCES, layout="packed").packed_ok


def test_nothing_is_left_behind():
    model = prepared("qwen2")
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    trains = [weight.requires_grad for weight in model.parameters()]
    random = torch.get_rng_state()
    began = time.perf_counter()
    verdict = verify(model, SEQUENCES, layout="shared_prefix")
    assert time.perf_counter() - began < 1
    assert verdict.packed_ok and verdict.gradient_error < 1e-4 and verdict.packed_error < 1e-4
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == trains
    assert model.training and not model.model.layers[0].training
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("kind", ["frozen", "lora", "bfloat16", "checkpointed"])
def test_models_of_every_kind_are_verified_with_a_gradient(kind, monkeypatch):
    model = prepared()
    if kind == "frozen":
        freeze(model)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    good = verify(base_model(model), SEQUENCES, layout="shared_prefix")
    assert good.packed_ok and good.gradient_error > 0

    def detached(module, query, key, value, mask, tree_lengths=None, **kwargs):
        # Half of the gradient, in rows alone.
        if tree_lengths is not None:
            value = (value + value.detach()) / 2
        return segment_attention(module, query, key, value, mask, tree_lengths=tree_lengths, **kwargs)

    change_attention(monkeypatch, detached)
    bad = verify(base_model(model), SEQUENCES, layout="shared_prefix")
    assert bad.packed_error <= bad.tolerance and not bad.packed_ok


def test_a_model_without_a_backward_pass_is_compared_by_its_scores(monkeypatch):
    """As kernels of some quantised layers."""
    model = prepared()
    down = model.model.layers[0].mlp.down_proj
    monkeypatch.setattr(down, "forward", lambda x: torch.nn.functional.linear(x.detach(), down.weight.detach()))
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _, __, output: output.detach())
    verdict = verify(model, SEQUENCES, layout="shared_prefix")
    assert verdict.packed_ok and verdict.gradient_error == 0


def test_rewards_have_a_gradient_too(monkeypatch):
    model = tiny_classifier("llama")
    attach_classifier_head(model)
    use_segment_attention(model)
    verdict = verify_rewards(model, SEQUENCES, layout="shared_prefix")
    assert verdict.packed_ok and 0 < verdict.gradient_error < 1e-4

    def detached(module, query, key, value, mask, tree_lengths=None, **kwargs):
        if tree_lengths is not None:
            value = value.detach()
        return segment_attention(module, query, key, value, mask, tree_lengths=tree_lengths, **kwargs)

    change_attention(monkeypatch, detached)
    verdict = verify_rewards(model, SEQUENCES, layout="packed")
    assert verdict.packed_error < 1e-4 and not verdict.packed_ok
