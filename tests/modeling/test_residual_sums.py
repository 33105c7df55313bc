"""Residuals that are kept beside their norm: which code it is, and how many sums a layer's backward makes."""

from __future__ import annotations

import ast

import pytest
import torch
from modeling.test_fused_layers import (  # noqa: F401 the fixture puts transformers' functions back
    CPU,
    IDS,
    _own_functions,
    assert_same,
    family_model,
    run,
)

from support.seen_operators import SeenOperators
from trl_fast.modeling.fused_layers import fuse_layers, residual_sums
from trl_fast.modeling.fused_layers.residual_sums import norms_after_sums, norms_of_kept

KEPT = ["r = x", "x = self.n(x)"]
MADE = "x, r = _normalize_and_keep(self.n, x)"


def kept_by(*statements):
    """The norms' names, and the statements that are left."""
    function = ast.parse("def forward(self, x, y):\n" + "".join(f"    {each}\n" for each in statements)).body[0]
    assert isinstance(function, ast.FunctionDef)
    norms_after_sums(function)
    return norms_of_kept(function), [ast.unparse(statement) for statement in function.body]


def test_what_is_rewritten():
    assert kept_by(*KEPT, "x = r + f(x)") == (("n",), [MADE, "x = r + f(x)"])
    both = [*KEPT, "x = r + self.f(x)", "r = x", "x = self.m(x)", "return x + r"]
    added = "x, r = _add_and_normalize(self.m, self.f(x), r)"
    assert kept_by(*both) == (("n",), [MADE, added, "return x + r"])


@pytest.mark.parametrize(
    "statements",
    [
        [*KEPT, "r += x"],
        [*KEPT, "if self.f: r.add_(x)"],
        [*KEPT, "r[0] = 1"],
        ["r = x", "x = self.n(y)"],
        ["r = x", "z = self.n(x)"],
        ["r = x", "x = self.n(x, y)"],
        ["r = x", "y = f(y)", "x = self.n(x)"],
        ["x = self.n(x)", "r = x"],
    ],
    ids=str,
)
def test_what_stays_as_it_is(statements):
    names, body = kept_by(*statements)
    assert names == () and not any("_normalize" in statement for statement in body)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "granite"])
def test_a_residual_has_one_gradient_with_its_norm(family, monkeypatch):
    """Bits of forward stay the same, and a layer's backward makes one sum less."""
    model = family_model(family)
    fuse_layers(model, CPU)
    found, adds = [run(model)], []
    norm = type(model.model.layers[0].input_layernorm)
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        with SeenOperators() as seen:
            loss.backward()
        adds.append(sum(name.startswith("aten::add.") for name in seen.names))
        monkeypatch.delattr(norm, "normalize_and_keep", raising=False)
    found.append(run(model))
    assert adds[1] - adds[0] == len(model.model.layers)
    assert torch.equal(found[0][0], found[1][0])
    assert_same(*found)


def test_what_is_put_upon_a_norm_runs():
    model = family_model("llama")
    fuse_layers(model, CPU)
    expected, seen = run(model), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: seen.append("hook"))
    assert_same(run(model), expected)
    assert seen == ["hook"]


def test_without_gradients_it_is_as_before():
    norm = family_model("llama").model.norm
    x = torch.randn(2, 5, 32)
    y, residual = residual_sums.normalize_and_keep(norm, x)
    assert residual is x and torch.equal(y, norm(x))
