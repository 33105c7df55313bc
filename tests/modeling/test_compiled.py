"""torch.compile around models that share prompts and run in tiles: graphs break there, and numbers stay the same."""

from __future__ import annotations

import pytest
import torch

from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import pack_trees
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.tiled_mlp import tile_mlps

LAYERS = 1
# Batches of other lengths, as a run has them; each longer than a tile.
BATCHES = [
    [(18, (3, 5)), (21, (6, 9))],
    [(20, (4, 7)), (17, (2, 11))],
    [(25, (8, 5)), (19, (3, 12))],
]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build():
    model = tiny_model(num_hidden_layers=LAYERS)
    attach_scoring(model)
    use_segment_attention(model)
    tile_mlps(model, 30)
    return model


def run(model, lengths):
    """The loss, and every parameter's gradient."""
    model.zero_grad()
    batch = pack_trees(random_trees(lengths), "shared_prefix", 2)
    loss = score(model, batch, token_loss=lambda scores, _: scores.logprobs.square().sum()).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.slow
def test_compiled_is_as_eager():
    model, twin, graphs = build(), build(), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    twin.compile(backend=counting)
    counts = []
    for lengths in BATCHES:
        expected, got = run(model, lengths), run(twin, lengths)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        counts.append(len(graphs))
    # Lengths are symbols from the second batch on, and those of segments never compile anything again.
    assert counts[0] > LAYERS and counts[1] == counts[2]
