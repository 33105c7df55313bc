"""The same rows have the same log-probs, to the last bit, whatever the pass that scores them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import pack_trees
from trl_fast.data.token_trees import Tree
from trl_fast.modeling.scoring import attach_scoring, evaluating, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.ops import HeadOptions

TREES = [(18, (3, 5)), (7, (12, 1, 9)), (25, (4,)), (3, (30, 2))]
GROUPS = (8, 22, 4, 32)


def model_of(layout: str, dtype: torch.dtype, family: str = "llama"):
    model = tiny_model(family).to(dtype)
    attach_scoring(model)
    if layout != "padded":
        use_segment_attention(model)
    return model


# Every three of layout, dtype, backend and blocks, which is half of all four.
LAYOUTS, BACKENDS = ("shared_prefix", "packed", "padded"), ("cpp", "torch")
DTYPES, ROWS = (torch.float32, torch.bfloat16), (None, 5)
PASSES = [
    (layout, DTYPES[dtype], BACKENDS[(place + dtype + blocks) % 2], ROWS[blocks])
    for place, layout in enumerate(LAYOUTS)
    for dtype, blocks in itertools.product(range(2), repeat=2)
]


@pytest.mark.parametrize("layout, dtype, backend, rows", PASSES, ids=str)
def test_every_pass_has_the_same_log_probs(layout, dtype, backend, rows):
    model = model_of(layout, dtype)
    batch = pack_trees(random_trees(TREES), layout, 2)
    # Room for some rows of logits; PyTorch's row kernels take 28 bytes a logit.
    head = HeadOptions(backend, None if rows is None else rows * 28 * model.config.vocab_size)

    def logprobs(**options) -> torch.Tensor:
        return score(model, batch, head=head, **options).tokens.logprobs.detach()

    with evaluating(model):
        expected = logprobs()
    found = {"with gradient": logprobs(), "with entropy": logprobs(outputs=("logprobs", "entropy"))}
    with evaluating(copy.deepcopy(model)) as _:
        found["a copy, as reference"] = logprobs()
    loss = {"token_loss": lambda scores, _: scores.logprobs.square().sum()}
    for name, trains in (("all", None), ("frozen head", "lm_head"), ("frozen backbone", "layers")):
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trains is None or trains not in key)
        found[name] = logprobs()
        found[f"{name}, token loss"] = logprobs(**loss)
        found[f"{name}, groups"] = logprobs(**loss, group_sizes=GROUPS)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found["checkpointing"] = logprobs(**loss)
    for name, values in found.items():
        assert torch.equal(values, expected), f"{name}: {(values - expected).abs().max()}"


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_tiles_of_the_mlp_are_those_of_scoring_too(layout):
    model = model_of(layout, torch.float32)
    tile_mlps(model, 16)
    batch = pack_trees(random_trees(TREES), layout, 2)
    trained = score(model, batch).tokens.logprobs.detach()
    with evaluating(model):
        assert torch.equal(score(model, batch).tokens.logprobs, trained)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_a_tree_has_the_same_log_probs_in_every_batch_on_a_cpu(layout):
    """Alone, behind others of odd lengths and before them; and a sequence beside other branches of its prompt."""
    model = model_of(layout, torch.float32)
    first, second, third, fourth = random_trees(TREES)

    def logprobs(*trees):
        batch = pack_trees(trees, layout, 2)
        with evaluating(model):
            found = score(model, batch).tokens.logprobs
        return [found[batch.branch == place] for place in range(len(batch))]

    alone = [sequence for tree in (first, second, third, fourth) for sequence in logprobs(tree)]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        trees = [(first, second, third, fourth)[place] for place in order]
        expected = [alone[branch] for place in order for branch in ([0, 1], [2, 3, 4], [5], [6, 7])[place]]
        assert all(map(torch.equal, logprobs(*trees), expected))
    for place, branch in enumerate(second.branches):
        assert torch.equal(logprobs(Tree(second.prompt_ids, [branch]))[0], alone[2 + place])
