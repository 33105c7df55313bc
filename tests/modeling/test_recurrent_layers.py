"""Layers with states on rows of trees: outputs and gradients are those of each sequence alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers.models.auto import CONFIG_MAPPING

from support.families import WITH_STATES
from support.models import tiny_model
from trl_fast.data.segments import num_tokens, segments_of, sequences_of
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.recurrent_layers import recurrent_layers_of
from trl_fast.modeling.segment_attention import SEGMENTS, use_segment_attention

# Each family's smallest model with a layer that carries a state, and two with biases, which pads would write.
FAMILIES = {
    **WITH_STATES,
    "lfm2, biases": {**WITH_STATES["lfm2"], "conv_bias": True},
    "bamba, biases": {**WITH_STATES["bamba"], "mamba_proj_bias": True},
}
ROWS = {
    "prompts with branches": ((20, 3, 5), (66, 4, 1), (7, 2)),
    "sequences alone": ((5,), (30,), (6,), (0,)),
    "nested": ((13, (9, 4, (17, 2, 3)), 5), (12, (11, 1, 2), (14, (13, 1, (1, 2, 2)), 3))),
    "shorter than the convolution": ((1, 1, 2), (2, (1, 3, 1), 1), (1,), (3, (2, 1, (1, 1, 2)))),
    "empty segments": ((0, 3, (0, 4, (2, 0, 1))), (9, 0, 0), (6, (0, 5, 6)), (0,)),
}


def build(name):
    """A model whose states live for some tokens, and whose biases are not the zeros that they start with."""
    family = name.split(",")[0]
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model = tiny_model(family, **FAMILIES[name]).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.uniform_(-3, -1)
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def outputs_and_gradients(layer, hidden, run):
    """A layer's outputs (T, H) on hidden states, and the gradients of these and of the layer's parameters."""
    hidden = hidden.clone().requires_grad_()
    out = run(hidden)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    gradients = torch.autograd.grad((out * weights).sum(), [hidden, *layer.parameters()], allow_unused=True)
    return out.detach(), gradients


def one_by_one(call, trees, hidden):
    """The outputs of the sequences of a row, each computed alone; of what they share, the first one's."""
    segments = segments_of(trees)
    out = {}
    for sequence in sequences_of(trees):
        tokens = [token for number in sequence for token in range(segments[number].start, segments[number].end)]
        if tokens:
            alone = call(hidden[:, tokens]).squeeze(0)
            out = {**dict(zip(tokens, alone, strict=True)), **out}
    return torch.stack([out[token] for token in range(hidden.shape[1])])


def assert_close(got, expected, layer):
    out, gradients = got
    expected_out, expected_gradients = expected
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    names = ["hidden states", *(name for name, _ in layer.named_parameters())]
    for name, gradient, other in zip(names, gradients, expected_gradients, strict=True):
        if other is not None:
            assert (gradient - other).norm() < 2e-5 * other.norm().clamp(min=1e-2), name


def compare(name, trees):
    """Compares the first layer that carries a state on a row of trees with the same layer on each sequence."""
    model = build(name)
    layer = next(iter(recurrent_layers_of(model).values()))
    torch.manual_seed(0)
    hidden = torch.randn(1, sum(map(num_tokens, trees)), model.config.hidden_size)
    expected = outputs_and_gradients(layer, hidden, lambda hidden: one_by_one(layer, trees, hidden))
    use_segment_attention(model)
    row = outputs_and_gradients(layer, hidden, lambda hidden: layer(hidden, tree_lengths=trees).squeeze(0))
    assert_close(row, expected, layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients(name):
    compare(name, ((20, 3, 5), (9, 30), (4,), (3, (4, (2, 0, 1)), (7, 1, 2)), (0, 3, 0), (1, 1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("trees", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_of_each_kind_of_tree(name, trees):
    compare(name, trees)


def test_the_change_is_listed_copied_and_undone():
    model = build("lfm2")
    layer = model.model.layers[0].conv
    use_segment_attention(model)
    use_segment_attention(model)
    twin = copy.deepcopy(model)
    changes_of(model).undo(SEGMENTS)
    assert "forward" not in vars(layer) and not hasattr(layer, "forward_whole")
    hidden, trees = torch.randn(1, 9, 32), ((4, 2, 3),)
    with torch.no_grad():
        twin.model.layers[0].conv.in_proj.weight.zero_()
        out = twin.model.layers[0].conv(hidden, tree_lengths=trees)
        assert not out.any() and layer(hidden).any()


def test_generation_goes_on_as_before():
    model = build("qwen3_next")
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    expected = model.generate(ids, **options)
    use_segment_attention(model)
    assert torch.equal(model.generate(ids, **options), expected)
