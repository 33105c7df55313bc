"""A head that shares its weight with the embeddings: one gradient of both, and where each has its own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from support.models import tiny_model
from trl_fast.data import pack_trees
from trl_fast.modeling.fused_layers import fuse_layers
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.tied_weight import HEAD_WEIGHT
from trl_fast.ops import HeadOptions
from trl_fast.ops.layers import embedding as embedding_module
from trl_fast.ops.layers import tied_embedding as tied_module

CPU = torch.device("cpu")
SPARSE = HeadOptions(head_grad="sparse")


@pytest.fixture
def sums(monkeypatch):
    """Notes how gradients of rows are made: added to the head's, or alone."""
    import sys

    made = []
    for name in ("add_gradient_of_rows", "gradient_of_rows"):
        for module in (sys.modules[tied_module.__module__], sys.modules[embedding_module.__module__]):
            plain = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, plain=plain, name=name: made.append(name) or plain(*args))
    return made


def model_of(fused, **changes):
    model = tiny_model(**{"tie_word_embeddings": True, **changes})
    attach_scoring(model)
    use_segment_attention(model)
    if fused:
        fuse_layers(model, CPU)
    return model


def token_loss(scores, rows):
    return (scores.logprobs * (1 + rows)).sum()


def step(model, batch, factor=1.0, **options):
    """Adds the gradients of a loss; returns the scores of its tokens."""
    torch.manual_seed(0)
    found = score(model, batch, outputs=("logprobs", "entropy"), **options)
    loss = found.loss if "token_loss" in options else (found.tokens.logprobs * found.tokens.entropy).sum()
    (factor * loss).backward()
    return found.tokens.logprobs.detach()


def assert_same_gradients(got, expected, rtol=1e-4):
    ours, theirs = dict(got.named_parameters()), dict(expected.named_parameters())
    for name, weight in theirs.items():
        assert (ours[name].grad is None) is (weight.grad is None), name
        if weight.grad is not None:
            assert (ours[name].grad - weight.grad).norm() <= rtol * weight.grad.norm(), name


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    "options", [{}, {"token_loss": token_loss}, {"head": SPARSE}], ids=["logprobs", "token_loss", "sparse"]
)
def test_rows_are_added_to_the_gradient_of_the_head(options, layout, trees, sums):
    """Also where it accumulates: one large gradient a micro-batch, and autograd adds it to the one that is there."""
    batch = pack_trees(trees, layout, 2)
    plain, model = model_of(False), model_of(True)
    expected = [step(plain, batch, factor, **options) for factor in (1.0, -0.3)]
    got = [step(model, batch, factor, **options) for factor in (1.0, -0.3)]
    assert sums == ["add_gradient_of_rows"] * 2
    torch.testing.assert_close(got, expected)
    assert_same_gradients(model, plain)
    assert HEAD_WEIGHT not in vars(model.get_input_embeddings())
    copy.deepcopy(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_autocast(use_reentrant, trees, sums):
    batch = pack_trees(trees, "packed", 2)
    plain, model = model_of(False), model_of(True)
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        each.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16):
            step(each, batch, token_loss=token_loss)
    assert sums == ["add_gradient_of_rows"]
    assert_same_gradients(model, plain, rtol=2e-2)


def test_a_graph_that_is_kept(trees, sums):
    model = model_of(True)
    loss = score(model, pack_trees(trees, "packed", 2), token_loss=token_loss).loss
    loss.backward(retain_graph=True)
    first = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    loss.backward()
    assert sums == ["add_gradient_of_rows"] * 2
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, 2 * first[name])


def test_a_failed_step_leaves_nothing(trees, sums):
    def broken(scores, rows):
        raise ValueError("a mistake")

    model, batch = model_of(True), pack_trees(trees, "packed", 2)
    with pytest.raises(ValueError, match="a mistake"):
        score(model, batch, token_loss=broken)
    assert HEAD_WEIGHT not in vars(model.get_input_embeddings())
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    logits.square().sum().backward()
    assert sums == ["gradient_of_rows"]


@pytest.mark.parametrize("case", ["untied", "frozen", "adapter", "its own logits", "not fused", "no gradient"])
def test_each_has_its_own(case, trees, sums):
    """Where there is one use alone, or another one than the parameter's."""
    batch, fused = pack_trees(trees, "packed", 2), case != "not fused"
    model = wrapped = model_of(fused, tie_word_embeddings=case != "untied")
    if case == "adapter":
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model = base_model(wrapped)
    embeddings = model.get_input_embeddings()
    if case == "frozen":
        embeddings.weight.requires_grad_(False)
    if case == "its own logits":
        model.trl_fast_fused_head = False
    with torch.set_grad_enabled(case != "no gradient"):
        loss = score(wrapped, batch).tokens.logprobs.sum()
    if loss.requires_grad:
        loss.backward()
    assert sums == (["gradient_of_rows"] if case in ("untied", "its own logits") else [])
    assert HEAD_WEIGHT not in vars(embeddings)
