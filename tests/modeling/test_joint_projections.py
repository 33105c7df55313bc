"""Linear layers that read one input: which code it is, calls, numbers, and what leaves them as they are."""

from __future__ import annotations

import ast
import types

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
from peft import LoHaConfig, get_peft_model
from torch import nn

from support.models import tiny_model
from support.seen_operators import SeenOperators
from support.simulated_device import set_bf16_products
from trl_fast.modeling.fused_layers import FUSED_LAYERS, attach, fuse_layers, projections
from trl_fast.modeling.fused_layers.joint_projections import join_projections
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.model_changes import changes_of

LINEARS = ("a", "b", "c", "d")


def joined(*statements):
    """The layers' names, and the statements that are left."""
    function = ast.parse("def forward(self, x, y):\n" + "".join(f"    {each}\n" for each in statements)).body[0]
    assert isinstance(function, ast.FunctionDef)
    names = join_projections(function, LINEARS)
    return names, [ast.unparse(statement) for statement in function.body]


def made(variable, names, number=0):
    layers = ", ".join(f"'{name}': self.{name}" for name in names)
    return f"_made{number} = _project({variable}, {{{layers}}})"


@pytest.mark.parametrize(
    ("statements", "left"),
    [
        (
            ["q = self.a(x).view(s)", "k = self.n(self.b(x))", "v = self.c(x)"],
            [
                made("x", "abc"),
                "q = _made0.pop('a').view(s)",
                "k = self.n(_made0.pop('b'))",
                "v = _made0.pop('c')",
            ],
        ),
        (
            ["return self.d(f(self.a(x)) * self.b(x))"],
            [made("x", "ab"), "return self.d(f(_made0.pop('a')) * _made0.pop('b'))"],
        ),
        (
            ["q = self.a(x)", "if self.n: q = self.n(q)", "x = self.b(x)", "v = self.c(x)"],
            [
                made("x", "ab"),
                "q = _made0.pop('a')",
                "if self.n:\n    q = self.n(q)",
                "x = _made0.pop('b')",
                "v = self.c(x)",
            ],
        ),
        (
            ["q = self.a(x)", "k = self.b(y)", "q = q + self.c(x)", "v = self.d(y)"],
            [
                made("x", "ac"),
                "q = _made0.pop('a')",
                made("y", "bd", 1),
                "k = _made1.pop('b')",
                "q = q + _made0.pop('c')",
                "v = _made1.pop('d')",
            ],
        ),
        (
            ["q = self.a(x)", "k = self.b(x)", "x = self.n(x)", "q, k = (self.a(x), self.c(x))"],
            [
                made("x", "ab"),
                "q = _made0.pop('a')",
                "k = _made0.pop('b')",
                "x = self.n(x)",
                made("x", "ac", 1),
                "q, k = (_made1.pop('a'), _made1.pop('c'))",
            ],
        ),
    ],
    ids=["attention", "MLP", "a branch between", "two inputs", "stored between"],
)
def test_what_is_rewritten(statements, left):
    names, body = joined(*statements)
    assert len(names) >= 2 and body == left


@pytest.mark.parametrize(
    "statements",
    [
        ["q = self.a(x)", "x = f(x)", "k = self.b(x)"],
        ["q = self.a(x)", "if self.n: x = f(x)", "k = self.b(x)"],
        ["q = self.a(x)", "x[0] = 0", "k = self.b(x)"],
        ["q = self.a(x)", "x += 1", "k = self.b(x)"],
        ["q = self.a(x)", "if self.n: return q", "k = self.b(x)"],
        ["q = self.a(x)", "k = self.b(x) if self.n else q"],
        ["q = self.a(x)", "k = [self.b(x) for x in y]"],
        ["q = self.a(x)", "if self.n:\n        k = self.b(x)"],
        ["q = self.a((x := f(y)))", "k = self.b(x)"],
        ["q = self.a(x) + (x := self.b(x))"],
        ["q = self.a(x, 1)", "k = self.b(x)"],
        ["q = self.a(x)", "k = self.other(x)"],
        ["q = self.a(x)", "k = self.a(x)"],
        ["q = self.a(x)", "k = self.b(y)"],
    ],
    ids=str,
)
def test_what_stays_as_it_is(statements):
    names, body = joined(*statements)
    assert names == () and not any("_made" in statement for statement in body)


def counted_calls(monkeypatch):
    """How many layers each call of the op has."""
    counted, op = [], projections.joint_linear

    def call(x, weights, *others):
        counted.append(len(weights))
        return op(x, weights, *others)

    monkeypatch.setattr(projections, "joint_linear", call)
    return counted


@pytest.fixture
def calls(monkeypatch):
    return counted_calls(monkeypatch)


def fused(family, calls):
    model = family_model(family)
    fuse_layers(model, CPU)
    calls.clear()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "starcoder2", "olmo2", "gpt_oss"])
def test_forward_has_the_same_bits(family, dtype, calls, monkeypatch):
    set_bf16_products(monkeypatch, True)
    model = fused(family, calls).to(dtype)
    got = run(model), model(input_ids=IDS, use_cache=False).logits
    assert 3 in calls
    monkeypatch.setattr(projections, "_joint_parts", lambda *_: None)
    expected = run(model), model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(got[1], expected[1])
    assert_same(got[0], expected[0], rtol=1e-5 if dtype == torch.float32 else 3e-2)


def test_no_sum_of_its_own(calls, monkeypatch):
    """Of what a layer's queries, keys and values read, and of what its gate and up read: three a layer."""
    model, adds = fused("llama", calls), []
    for _ in range(2):
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        with SeenOperators() as seen:
            loss.backward()
        adds.append(sum(name.startswith("aten::add.") for name in seen.names))
        monkeypatch.setattr(projections, "_joint_parts", lambda *_: None)
    assert adds[1] - adds[0] == 3 * 2 and calls == [3, 2, 3, 2]


def test_where_nothing_is_to_be_summed(calls):
    model = fused("llama", calls)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    model.requires_grad_(False)
    model(input_ids=IDS, use_cache=False)
    assert calls == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, calls):
    expected = run(family_model("qwen2"))
    model = fused("qwen2", calls)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(run(model), expected)
    # Where checkpointing is reentrant, the first pass has no gradients.
    assert calls == [3, 2, 3, 2] * (1 if use_reentrant else 2)


@pytest.mark.parametrize("part", ["q_proj.weight", "k_proj.bias", "proj"])
def test_frozen_weights(part, calls):
    results = []
    for model in (family_model("qwen2"), fused("qwen2", calls)):
        for name, weight in model.named_parameters():
            weight.requires_grad_(part not in name)
        results.append(run(model))
    assert_same(results[1], results[0])
    assert calls == [3, 2, 3, 2]


def test_autocast(calls, monkeypatch):
    """Gradients are as near to those of float32 as transformers' own."""
    set_bf16_products(monkeypatch, True)
    model = family_model("qwen2")
    right, errors = run(model)[1], []
    for fuses in (False, True):
        if fuses:
            fuse_layers(model, CPU)
            calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = run(model)[1]
        errors.append([(found[name] - gradient).norm() / gradient.norm() for name, gradient in right.items()])
    assert calls == [3, 2, 3, 2]
    assert all(ours <= 2 * plain + 1e-6 for plain, ours in zip(*errors, strict=True))


def with_hook(layer, seen):
    layer.register_forward_hook(lambda *_: seen.append("hook"))


def with_backward_hook(layer, seen):
    layer.register_full_backward_hook(lambda *_: seen.append("hook"))


def with_another_forward(layer, seen):
    layer.forward = types.MethodType(lambda self, x: seen.append("hook") or type(self).forward(self, x), layer)


@pytest.mark.parametrize("put", [with_hook, with_backward_hook, with_another_forward])
def test_what_is_put_upon_a_layer_runs(put, calls):
    model = fused("llama", calls)
    expected, seen = run(model), []
    calls.clear()
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        put(model.model.layers[0].get_submodule(name), seen)
    assert_same(run(model), expected)
    assert seen == ["hook", "hook"] and calls == [3, 2]


def doubled_precision(model):
    # Not float16: its roundings would make one of float32 five hundred times as large.
    model.model.layers[0].self_attn.v_proj.double()
    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda _, args: args[0].double())
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _, args, out: out.float())


class Doubled(nn.Linear):
    """A layer that does more than multiply."""

    def forward(self, x):
        return 2 * super().forward(x)


def another_class(model):
    model.model.layers[0].self_attn.v_proj.__class__ = Doubled


def in_parts(model):
    """As ZeRO-3 marks weights."""
    model.model.layers[0].self_attn.v_proj.weight.ds_status = "AVAILABLE"


@pytest.mark.parametrize(
    ("change", "joint"), [(in_parts, [2, 3, 2]), (doubled_precision, [2, 3, 2]), (another_class, [2, 2, 3, 2])]
)
def test_layers_of_another_kind_run_as_before(change, joint, calls):
    results = []
    for fuses in (False, True):
        model = family_model("llama")
        change(model)
        if fuses:
            fuse_layers(model, CPU)
            calls.clear()
        results.append(run(model))
    assert_same(results[1], results[0])
    assert calls == joint


def test_adapters_of_other_kinds_say_why(caplog, calls):
    attach._say_once.cache_clear()
    caplog.set_level("INFO")
    model = get_peft_model(tiny_model(), LoHaConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    fuse_layers(base_model(model), CPU)
    reason = "LlamaAttention: gradients by what its projections read are summed one by one, of peft.Linear"
    assert f"2 modules of LlamaForCausalLM run as before. {reason}" in caplog.text
    calls.clear()
    run(model)
    assert calls == [2, 2]


def test_an_op_that_differs_is_not_taken(monkeypatch, caplog):
    op = projections.joint_linear
    monkeypatch.setattr(projections, "joint_linear", lambda x, *given: op(x * 1.01, *given))
    monkeypatch.setattr(projections, "_found", {})
    caplog.set_level("INFO")
    model = family_model("llama")
    fuse_layers(model, CPU)
    attention = model.model.layers[0].self_attn
    assert not hasattr(attention, "fused_class")
    reason = "LlamaAttention: its numbers are others than those of the module's own code"
    assert f"2 modules of LlamaForCausalLM run as before. {reason}" in caplog.text


def test_undone_it_is_the_model_of_before(calls):
    model = family_model("qwen3")
    attention, expected = model.model.layers[0].self_attn, run(model)
    cls, printed = type(attention), str(model)
    fuse_layers(model, CPU)
    assert type(attention) is not cls and str(model) == printed
    changes_of(model).undo(FUSED_LAYERS)
    calls.clear()
    undone = run(model)
    assert type(attention) is cls and calls == []
    assert all(torch.equal(undone[1][name], gradient) for name, gradient in expected[1].items())
