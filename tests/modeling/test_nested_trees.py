"""Trees that nest, in every layout: the same scored tokens, and a model's loss and gradients of separate sequences."""

import random

import pytest
import torch

import trl_fast.data.packing as packing
from support.models import tiny_model
from trl_fast.data import LAYOUTS, LabelledCollator, Tree, pack_trees
from trl_fast.data.segments import segments_of
from trl_fast.modeling.loading import disable_dropout
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention


def tokens(rng, most):
    return [rng.randrange(3, 340) for _ in range(rng.randrange(most + 1))]


def random_tree(rng, depth):
    """A tree with segments that are empty, shorter than what is shared, and nested up to `depth` times."""
    children = [
        random_tree(rng, depth - 1) if depth and rng.random() < 0.6 else tokens(rng, 6)
        for _ in range(rng.randrange(1, 4))
    ]
    return Tree(tokens(rng, 9), children)


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", max_position_embeddings=256)
    disable_dropout(model)
    attach_scoring(model)
    use_segment_attention(model)
    return model


def loss_and_gradients(model, batch):
    """A loss in which each sequence has a weight of its own, and the gradients."""
    logprobs = score(model, batch).tokens.logprobs
    sums = torch.zeros(len(batch)).index_add(0, batch.branch, logprobs)
    loss = (sums * torch.linspace(0.5, 1.5, len(batch))).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_close(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=2e-5, atol=1e-4)
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 2e-5 * max(gradient.norm(), 1e-3), name


@pytest.mark.parametrize("seed", range(6))
def test_scores_and_gradients_are_those_of_separate_sequences(seed, model, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", rng.choice((1, 4)))
    trees = [random_tree(rng, 3) for _ in range(rng.randrange(1, 4))]
    limits = rng.choice(((None,), (14,), (9, "keep_end")))
    separate = pack_trees(trees, "padded", 0, *limits)
    expected = loss_and_gradients(model, separate)
    for how in ({}, {"compares_tokens": True}):
        batch = pack_trees(trees, "shared_prefix", 0, *limits, **how)
        for name in ("targets", "branch", "offset", "branch_lengths"):
            assert torch.equal(batch[name], separate[name]), name
        assert (batch.num_tokens, batch.group_sizes) == (separate.num_tokens, separate.group_sizes)
        for one, other in zip(batch.sequences(), separate.sequences(), strict=True):
            assert torch.equal(one, other)
        assert_close(loss_and_gradients(model, batch), expected)


def test_trees_of_the_test_nest(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    rng = random.Random(0)
    depths = [
        segment.depth
        for _ in range(20)
        for segment in segments_of(pack_trees([random_tree(rng, 3)], "shared_prefix", 0).tree_lengths)
    ]
    assert max(depths) == 4


def test_labelled_sequences_in_every_layout(model):
    """Turns of a conversation: the loss and the gradients of a token count where it is learned."""
    rng = random.Random(7)
    row, history = {"input_ids": [], "labels": [], "seq_lengths": []}, []
    for _ in range(4):
        question, thought, answer = ([rng.randrange(3, 340) for _ in range(count)] for count in (18, 9, 7))
        ids = [*history, *question, *thought, *answer]
        row["input_ids"] += ids
        row["labels"] += [-100] * (len(ids) - 16) + ids[-16:]
        row["seq_lengths"].append(len(ids))
        history += [*question, *answer]
    batches = [LabelledCollator(0, layout, joins=True).collate([row]) for layout in LAYOUTS]
    expected = loss_and_gradients(model, batches[-1])
    assert len(segments_of(batches[0].tree_lengths)) == 7
    for batch in batches[:-1]:
        assert_close(loss_and_gradients(model, batch), expected)
