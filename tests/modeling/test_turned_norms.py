"""Attention that normalises queries and keys and turns them in one pass: which code it is, calls, numbers."""

from __future__ import annotations

import ast
import types
from collections import Counter

import pytest
import torch
from modeling.test_fused_layers import (  # noqa: F401 the fixture puts transformers' functions back
    CPU,
    IDS,
    OPS,
    _own_functions,
    assert_same,
    counting,
    family_model,
    fused_modules,
    run,
)
from peft import LoraConfig, get_peft_model

from trl_fast.modeling.fused_layers import FUSED_LAYERS, fuse_layers, turned_norms
from trl_fast.modeling.fused_layers.turned_norms import norms_before_turn
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.model_changes import changes_of

FAMILIES = ("qwen3", "gemma3_text", "olmo2")
TURN = "q, k = turn(q, k, cos, sin)"


def function_of(*statements):
    tree = ast.parse("def forward(self, x, cos, sin):\n" + "".join(f"    {each}\n" for each in statements)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def known_by(*statements):
    function = function_of(*statements)
    names = norms_before_turn(function)
    return names, [ast.unparse(statement) for statement in function.body]


@pytest.mark.parametrize(
    ("statements", "left", "of_all_heads"),
    [
        (
            ["q = self.a(self.p(x).view(s)).transpose(1, 2)", "k = self.b(self.r(x).view(s)).transpose(1, 2)"],
            ["q = self.p(x).view(s).transpose(1, 2)", "k = self.r(x).view(s).transpose(1, 2)"],
            False,
        ),
        (
            ["q = self.p(x)", "q = self.a(q)", "k = self.b(x)", "q = q.transpose(1, 2)"],
            ["q = self.p(x)", "q = q", "k = x", "q = q.transpose(1, 2)"],
            False,
        ),
        (
            ["q = self.a(self.p(x))", "k = self.b(self.r(x))", "q = q.view(s)", "k = k.view(s).transpose(1, 2)"],
            ["q = self.p(x)", "k = self.r(x)", "q = q.view(s)", "k = k.view(s).transpose(1, 2)"],
            True,
        ),
    ],
    ids=["qwen3", "gemma3", "olmo2"],
)
def test_what_is_rewritten(statements, left, of_all_heads):
    names, body = known_by(*statements, TURN)
    assert names == ("a", "b")
    turned = f"q, k = _norm_and_turn(self.a, self.b, turn, q, k, cos, sin, of_all_heads={of_all_heads})"
    assert body == [*left, turned]


@pytest.mark.parametrize(
    "statements",
    [
        ["q = self.a(x) * 2", "k = self.b(x)", TURN],
        ["q = self.a(x)", "k = self.b(x)", "y = q + 1", TURN],
        ["q = self.a(x)", "k = self.b(x)", "if self.c: q = q * 2", TURN],
        ["q = self.a(x)", "k = self.b(x)", "if self.c: q, k = turn(q, k, cos, sin)"],
        ["q = self.a(x).view(s)", "k = self.b(x).view(s)", TURN],  # heads are made of a norm of what is no projection
        ["q = self.a(self.p(x)).view(s)", "k = self.b(x)", TURN],  # one of all heads, one a head
        ["q = self.a(x)", "k = self.b(x)", "q, k = turn(q, k, cos, sin, 2)"],
        ["q = self.a(x)", "k = self.b(x)", "k, q = turn(q, k, cos, sin)"],
    ],
    ids=str,
)
def test_what_stays_as_it_is(statements):
    names, body = known_by(*statements)
    assert names == () and body == [ast.unparse(statement) for statement in function_of(*statements).body]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_op_runs_in_the_place_of_others(family, monkeypatch):
    calls = []
    for place, names in OPS.items():
        for name in names:
            monkeypatch.setattr(f"trl_fast.modeling.fused_layers.{place}.{name}", counting(name, calls))
    model = family_model(family)
    fuse_layers(model, CPU)
    calls.clear()
    model(input_ids=IDS, use_cache=False)
    assert Counter(calls)["qk_norm_rotary"] == 2 and "rotary" not in calls
    norms = sum("Norm" in type(module).__name__ for module in model.modules())
    assert sum(count for name, count in Counter(calls).items() if name in OPS["fused_classes"][:3]) == norms - 4


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens(family):
    """A cache is fed with what is turned; its rows are single tokens."""
    model = family_model(family).eval()
    prompt, length = IDS[:1], IDS.shape[1] + 6
    expected = model.generate(prompt, max_length=length, min_length=length, do_sample=False)
    fuse_layers(model, CPU)
    assert torch.equal(model.generate(prompt, max_length=length, min_length=length, do_sample=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_put_upon_a_norm_runs(family):
    """Norms with hooks or another forward are called, and numbers of two dtypes are transformers'."""
    model = family_model(family)
    fuse_layers(model, CPU)
    expected, seen = run(model), []
    hooked, replaced = (layer.self_attn.q_norm for layer in model.model.layers)
    hooked.register_forward_hook(lambda *_: seen.append("hook"))
    replaced.forward = types.MethodType(
        lambda self, x: seen.append("forward") or type(self).forward(self, x), replaced
    )
    assert_same(run(model), expected)
    assert seen == ["hook", "forward"]


def test_what_the_op_does_not_take():
    model = family_model("qwen3")
    layers = model.model.layers
    layers[0].self_attn.k_norm.variance_epsilon = 0.5
    layers[1].self_attn.q_norm.double()
    states, turns = torch.randn(2, 5, 32), (torch.randn(2, 5, 8), torch.randn(2, 5, 8))

    def given():
        normed = layers[1].self_attn.q_norm(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
        return layers[0].self_attn(states, position_embeddings=turns, attention_mask=None)[0], normed

    expected = given()
    fuse_layers(model, CPU)
    got = given()
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].dtype == torch.float64 and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_adapters(use_reentrant):
    torch.manual_seed(0)
    model = get_peft_model(family_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    disable_dropout(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 if "lora_B" in name else 0.0)
    inner = base_model(model)
    inner.enable_input_require_grads()
    expected = run(model)
    fuse_layers(inner, CPU)
    assert len(fused_modules(model)) == 9 + 2 + 2 + 2
    inner.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(run(model), expected)
    changes_of(model).undo(FUSED_LAYERS)
    assert not fused_modules(model)


def test_an_op_that_differs_is_not_taken(monkeypatch, caplog):
    from trl_fast.modeling.fused_layers import rotary_functions

    op = rotary_functions.qk_norm_rotary
    monkeypatch.setattr(rotary_functions, "qk_norm_rotary", lambda q, *given, **way: op(1.01 * q + 1, *given, **way))
    monkeypatch.setattr(turned_norms, "_found", {})
    caplog.set_level("INFO")
    model = family_model("qwen3")
    fuse_layers(model, CPU)
    assert "with norms of queries and keys" not in caplog.text
    reason = "Qwen3Attention: its numbers are others than those of the module's own code"
    assert f"2 modules of Qwen3ForCausalLM run as before. {reason}" in caplog.text


def test_a_second_model_of_the_family():
    """The function that turns stands in its place already."""
    for _ in range(2):
        model = family_model("qwen3")
        fuse_layers(model, CPU)
        assert sum("Attention" in type(module).__name__ for module in fused_modules(model)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family):
    """A compiler sees the op whole: no graph breaks at it."""
    model = family_model(family)
    expected = run(model)
    fuse_layers(model, CPU)
    torch._dynamo.reset()
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager", fullgraph=True)
    try:
        assert_same(run(model), expected)
    finally:
        torch._dynamo.reset()
