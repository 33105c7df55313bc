"""Checkpointing that keeps results: the same bits, fewer products, and no more memory than was given."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import pack_trees
from trl_fast.modeling.checkpointing import enable_checkpointing
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.selective_checkpointing import (
    ATTENTION,
    PRODUCT,
    Budget,
    ReusingMode,
    SavingMode,
    SelectiveCheckpointing,
    _draws_random_numbers,
    set_selective_checkpointing,
)
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.ops import HeadOptions

ALL = 1 << 40
NON_REENTRANT = {"use_reentrant": False}
# A window shorter than the sequences, and sinks.
WINDOWED = {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}


class Operations(TorchDispatchMode):
    """Counts floating point operations. (torch's own counter follows modules too, and stumbles over tiled ones.)"""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


def build(
    family="llama",
    *,
    changes=None,
    limit=None,
    lora=False,
    tiled=False,
    layout="shared_prefix",
    keywords=NON_REENTRANT,
    **kept,
):
    model = tiny_model(family, **(changes or {}))
    attach_scoring(model)
    if layout != "padded":
        use_segment_attention(model)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if tiled:
        tile_mlps(base_model(model), 30)
    if limit is not None:
        set_selective_checkpointing(base_model(model), limit, **kept)
    if keywords is not None:
        enable_checkpointing(model, dict(keywords))
        model.enable_input_require_grads()
    return model.train()


def run(model, layout="shared_prefix", autocast=False):
    """The log-probs, all gradients, and the operations of forward and backward."""
    trees = random_trees([(18, (3, 5)), (21, (6, 9))])
    with Operations() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs = score(model, pack_trees(trees, layout, 2), head=HeadOptions("torch")).tokens.logprobs
    with Operations() as backward:
        logprobs.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), grads, (forward.count, backward.count)


def assert_same_bits(got, expected):
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert torch.equal(got[1][name], grad), name


OPTIONS = [
    {},
    {"lora": True},
    {"tiled": True},
    {"family": "gemma2"},
    {"family": "qwen3_moe"},
    {"layout": "padded"},
    {"family": "gpt_oss", "changes": WINDOWED},
]
# Every option with each limit and each precision, and those with one another.
LIMITS = [[(60_000, False), (ALL, True)], [(60_000, True), (ALL, False)]]
SAME_BITS = [(options, *given) for place, options in enumerate(OPTIONS) for given in LIMITS[place % 2]]


@pytest.mark.parametrize("options, limit, autocast", SAME_BITS, ids=str)
def test_the_same_bits(options, limit, autocast):
    layout = options.get("layout", "shared_prefix")
    expected = run(build(**options), layout, autocast)
    model = build(**options, limit=limit)
    assert_same_bits(run(model, layout, autocast), expected)
    # And once more, with weights' gradients there.
    model.zero_grad()
    assert_same_bits(run(model, layout, autocast), expected)


@pytest.mark.parametrize("options", [{}, {"family": "cohere2", "changes": {"sliding_window": 8}}], ids=str)
def test_all_that_is_kept_is_computed_once(options):
    forward, backward = run(build(**options))[2]
    plain = run(build(**options, keywords=None))[2]
    kept = run(build(**options, limit=ALL))[2]
    assert forward == plain[0] == kept[0]
    assert backward > plain[1]
    assert kept[1] == plain[1]


def test_the_more_room_the_less_is_computed_again():
    model = build(limit=0)
    counts = []
    for limit in (0, 30_000, 60_000, 120_000, ALL):
        set_selective_checkpointing(model, limit)
        model.zero_grad()
        counts.append(run(model)[2][1])
        assert model.trl_fast_selective_checkpointing.budget.left >= 0
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts)


def held_bytes(model):
    """Bytes that the layers' results take at the end of a forward pass."""
    made = []
    contexts = SelectiveCheckpointing._contexts

    def contexts_kept(self):
        found = contexts(self)
        made.append(found[0])
        return found

    SelectiveCheckpointing._contexts = contexts_kept
    try:
        score(model, pack_trees(random_trees([(18, (3, 5)), (21, (6, 9))]), "shared_prefix", 2))
    finally:
        SelectiveCheckpointing._contexts = contexts
    return sum(t.untyped_storage().nbytes() for saving in made for result in saving.results for t in result.tensors)


@pytest.mark.parametrize("limit", [10_000, 50_000, 100_000, ALL])
def test_the_limit_holds(limit):
    model = build(limit=limit)
    held = held_bytes(model)
    assert 0 < held <= limit
    assert held == limit - model.trl_fast_selective_checkpointing.budget.left


def test_attention_goes_first():
    attention, product = 100, 60
    budget = Budget(1000, 3)
    taken = []
    for _ in range(3):
        budget.start_layer()
        taken.append([budget.take(PRODUCT, product) for _ in range(4)] + [budget.take(ATTENTION, attention)])
        taken[-1] += [budget.take(PRODUCT, product) for _ in range(4)]
    assert all(layer[4] for layer in taken)
    assert sum(map(sum, taken)) > 3 and budget.left >= 0
    # Long rows: no room but for attention.
    budget = Budget(250, 3)
    budget.start_layer()
    assert not budget.take(PRODUCT, product + 40)
    assert budget.take(ATTENTION, attention)


def test_selective_keeps_attention_alone_whatever_the_limit():
    model = build(limit=0, attention_always=True)
    kept = []
    take = Budget.take

    def seen(self, kind, size):
        found = take(self, kind, size)
        kept.append((kind, found))
        return found

    Budget.take = seen
    try:
        got = run(model)
    finally:
        Budget.take = take
    assert all(found == (kind == ATTENTION) for kind, found in kept)
    assert {kind for kind, _ in kept} == {ATTENTION, PRODUCT}
    assert_same_bits(got, run(build()))


@pytest.mark.parametrize("keywords", [{"selective": True}, {"selective": False}, {"selective": True, **NON_REENTRANT}])
def test_the_key_of_trl_does_not_reach_torch(keywords):
    assert_same_bits(run(build(limit=ALL, keywords=keywords)), run(build()))


def test_reentrant_checkpointing_computes_all_again():
    got = run(build(limit=ALL, keywords={"use_reentrant": True}))
    assert_same_bits(got, run(build()))
    assert got[2][1] == run(build(keywords={"use_reentrant": True}))[2][1]


def test_a_model_whose_code_is_of_another_time_is_left_alone():
    model = tiny_model("llama")

    def old(self, module, value=False):
        module.gradient_checkpointing = value

    model._set_gradient_checkpointing = old.__get__(model)
    set_selective_checkpointing(model, ALL)
    assert not hasattr(model, "trl_fast_selective_checkpointing") and model._set_gradient_checkpointing.__func__ is old


def test_a_copy_has_a_budget_of_its_own():
    model = build(limit=ALL)
    twin = copy.deepcopy(model)
    set_selective_checkpointing(twin, 0)
    assert run(model)[2][1] < run(twin)[2][1]
    assert twin.trl_fast_selective_checkpointing is not model.trl_fast_selective_checkpointing


def test_backward_twice():
    model = build(limit=ALL)
    hidden = torch.randint(0, 30, (1, 12))
    out = model.model(input_ids=hidden, use_cache=False).last_hidden_state.square().sum()
    first = torch.autograd.grad(out, model.model.layers[0].mlp.up_proj.weight, retain_graph=True)[0]
    second = torch.autograd.grad(out, model.model.layers[0].mlp.up_proj.weight)[0]
    assert torch.equal(first, second)


def checkpointed(function, *args):
    saving = SavingMode(Budget(ALL, 1))
    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (saving, ReusingMode(saving.results))
    )


def test_what_is_changed_in_place_is_computed_again():
    x, w = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def layer(x):
        first = x @ w
        second = first.sigmoid() @ w
        first.view(-1)[:3].add_(second.flatten()[:3])
        return (first.tanh() @ w).sin()

    expected = torch.autograd.grad(layer(x).sum(), (x, w))
    for got, right in zip(torch.autograd.grad(checkpointed(layer, x).sum(), (x, w)), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=0)


def test_a_last_product_that_is_changed_in_place_gives_its_room_back_once():
    budget, x = Budget(1000, 1), torch.ones(4, 4)
    with SavingMode(budget) as saving:
        (x @ x) @ x.add(1)
        (x @ x).add_(1)
    kept = sum(t.nbytes for result in saving.results for t in result.tensors)
    assert budget.left == 1000 - kept


def test_attention_that_draws_random_numbers_is_computed_again():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)

    def layer(q):
        dropped = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True)[0]
        return torch.nn.functional.dropout(dropped, 0.5).sin()

    saving = SavingMode(Budget(ALL, 1))
    with saving:
        layer(q)
    assert saving.results[0].values is not None
    op = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert _draws_random_numbers(op, (q, q, q, None, True, 0.1), {})
    assert _draws_random_numbers(op, (q, q, q, None, True), {"dropout_p": 0.1})
    assert not _draws_random_numbers(op, (q, q, q, None, True), {})


def test_a_layer_that_does_something_else_in_backward():
    calls = []

    def layer(x):
        calls.append(x)
        x = x @ x if len(calls) == 1 else torch.addmm(x, x, x)
        return (x.sin() @ x).sin()

    out = checkpointed(layer, torch.randn(3, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="computed aten.mm.default in forward and aten.addmm.default"):
        out.sum().backward()
