"""Checkpointing on a GPU: the last layers are left alone as far as memory goes, with the same bits and no surprise."""

import copy
import functools
import gc
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from support.models import tiny_model
from support.simulated_device import SimulatedDevice
from support.trees import random_trees
from trl_fast.data import pack_trees
from trl_fast.modeling import selective_checkpointing
from trl_fast.modeling.checkpointing import disable_checkpointing, enable_checkpointing
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.selective_checkpointing import SelectiveCheckpointing, set_selective_checkpointing
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.modeling.uncheckpointed_layers import (
    MARGIN,
    PassSize,
    merged,
    missing_gradient_bytes,
)
from trl_fast.ops import HeadOptions

GIB = 1 << 30
DEPTH = 4
SMALL, LARGE = [(18, (3, 5)), (21, (6, 9))], [(40, (30, 25)), (60, (31, 20))]


def build(family="llama", *, keywords=None, limit=None, lora=False, tiled=False, layout="shared_prefix", **kept):
    model = tiny_model(family, num_hidden_layers=DEPTH)
    attach_scoring(model)
    if layout != "padded":
        use_segment_attention(model)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if tiled:
        tile_mlps(base_model(model), 30)
    set_selective_checkpointing(base_model(model), limit, **kept)
    enable_checkpointing(model, {"use_reentrant": False} if keywords is None else keywords)
    model.enable_input_require_grads()
    return model.train()


def forward(model, lengths=SMALL, layout="shared_prefix", autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scored = score(model, pack_trees(random_trees(lengths), layout, 2), head=HeadOptions("torch"))
    return scored.tokens.logprobs


def step(model, *given, **options):
    """The log-probs and all gradients, which are taken away."""
    logprobs = forward(model, *given, **options)
    logprobs.square().mean().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return logprobs.detach(), grads


def assert_same_bits(got, expected):
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert torch.equal(got[1][name], grad), name


@pytest.fixture
def device(monkeypatch):
    """A GPU's memory, followed on the CPU."""
    with SimulatedDevice() as simulated:
        monkeypatch.setattr(SelectiveCheckpointing, "device_memory", staticmethod(simulated.memory))
        yield simulated


def checkpointing_of(model):
    return base_model(model).trl_fast_selective_checkpointing


def runs_of_layers(model, *given, **options):
    """How often each layer's attention ran in a step: twice where the layer was computed again."""
    layers = base_model(model).model.layers
    counts = [0] * len(layers)

    def count(number):
        def hook(*_):
            counts[number] += 1

        return hook

    hooks = [layer.self_attn.register_forward_hook(count(number)) for number, layer in enumerate(layers)]
    found = step(model, *given, **options)
    for hook in hooks:
        hook.remove()
    return counts, found


def room_for(device, model, layers):
    """Sets the device's size so that this many layers of a model that was measured fit, and half a one more."""
    gc.collect()
    found = checkpointing_of(model)._footprint
    size = max(found.layer_bytes(found.size))
    reserve = found.reserve(found.size, missing_gradient_bytes(model.parameters()))
    device.total = (device.live + reserve + int((layers + 0.5) * size)) * MARGIN // (MARGIN - 1)


def measured(model, *given, **options):
    """The model after a first pass, what that found having been taken over."""
    gc.collect()
    step(model, *given, **options)
    selective = checkpointing_of(model)
    selective._footprint, selective._meter = merged(selective._footprint, selective._meter.footprint()), None
    return model


def test_the_first_pass_checkpoints_all_and_the_next_none(device):
    model = build()
    assert runs_of_layers(model)[0] == [2] * DEPTH
    assert runs_of_layers(model)[0] == [1] * DEPTH


@pytest.mark.parametrize("layers", range(DEPTH))
def test_the_last_layers_are_left_alone_as_memory_allows(layers, device):
    model = measured(build())
    room_for(device, model, layers)
    counts, got = runs_of_layers(model)
    assert counts == [2] * (DEPTH - layers) + [1] * layers
    assert_same_bits(got, runs_of_layers(build())[1])


@pytest.mark.parametrize(
    "large, autocast",
    [
        (False, False),
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"lora": True}, {"tiled": True}, {"family": "gemma2"}, {"family": "qwen3_moe"}, {"layout": "padded"}],
    ids=str,
)
def test_the_same_bits(options, large, autocast, device, monkeypatch):
    monkeypatch.setattr(selective_checkpointing, "LARGE_LAYER", 0 if large else 1 << 41)
    given = {"layout": options.get("layout", "shared_prefix"), "autocast": autocast}
    with monkeypatch.context() as patched:
        patched.setattr(SelectiveCheckpointing, "device_memory", staticmethod(lambda _: None))
        expected = step(build(**options, limit=0), **given)
    model = measured(build(**options), **given)
    room_for(device, model, 2)
    counts, got = runs_of_layers(model, **given)
    assert counts == [2, 2, 1, 1]
    assert_same_bits(got, expected)
    asked = checkpointing_of(model).budget.asked
    assert bool(asked) == large


def test_what_is_left_is_for_results_of_large_layers_only(device, monkeypatch):
    entered = []
    contexts = SelectiveCheckpointing._contexts
    monkeypatch.setattr(SelectiveCheckpointing, "_contexts", lambda self: entered.append(self) or contexts(self))
    model = measured(build())
    room_for(device, model, 2)
    step(model)
    assert not entered
    monkeypatch.setattr(selective_checkpointing, "LARGE_LAYER", 0)
    step(model)
    assert entered == [checkpointing_of(model)] * 2
    assert (
        checkpointing_of(model).budget.left < max(checkpointing_of(model)._footprint.layer_bytes(PassSize(62, 62))) / 2
    )


def test_measured_bytes_are_what_a_layer_saves(device):
    model = measured(build(), LARGE)
    found = checkpointing_of(model)._footprint
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    storages = [{} for _ in range(DEPTH)]
    plain = build()
    disable_checkpointing(plain)
    for layer, saved in zip(plain.model.layers, storages, strict=True):
        counting = saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
        )
        layer.register_forward_pre_hook(lambda *_, hooks=counting: hooks.__enter__())
        layer.register_forward_hook(lambda *_, hooks=counting: hooks.__exit__())
    weights = {weight.untyped_storage()._cdata for weight in plain.parameters()}
    logprobs = forward(plain, LARGE)
    sizes = [sum(t.untyped_storage().nbytes() for key, t in s.items() if key not in weights) for s in storages]
    del logprobs
    assert found.casts == 0 and found.size == PassSize(206, 206)
    for size, known in zip(found.layer_bytes(found.size), sizes, strict=True):
        # The layer's input and the table of positions are there anyway, and counted by the hooks.
        assert 0.8 * known < size < 1.15 * known


def fresh(device):
    """Takes garbage away, and forgets the peak."""
    gc.collect()
    device.peak = device.live


def train(model, lengths, accumulate=1):
    """Steps of that many passes each, a row of these lengths in each pass."""
    for number, length in enumerate(lengths):
        forward(model, [(length, (length // 2, length // 3))]).square().mean().backward()
        if (number + 1) % accumulate == 0:
            model.zero_grad()


@pytest.mark.parametrize(
    "lora, accumulate",
    [
        (False, 1),
        pytest.param(True, 3, marks=pytest.mark.slow),
        pytest.param(False, 3, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
)
def test_never_out_of_memory_where_checkpointing_all_fits(lora, accumulate, device, monkeypatch):
    rng = random.Random(5)
    lengths = [rng.randint(20, 70) for _ in range(4)] + [30, 90, 40, 71]
    fresh(device)
    before = device.live
    train(build(lora=lora, limit=0), lengths, accumulate)
    needed = device.peak - before
    left_alone = set()
    share_out = SelectiveCheckpointing._share

    def seen(self, layers, whole, limit):
        left_alone.add(whole)
        share_out(self, layers, whole, limit)

    monkeypatch.setattr(SelectiveCheckpointing, "_share", seen)
    for share in (1.0, 1.2, 1.5, 1.8):
        fresh(device)
        device.total = device.live + int(needed * share)
        train(build(lora=lora), lengths, accumulate)
        assert device.peak <= device.total, share
    assert left_alone >= {0, 1, DEPTH}


def test_a_longer_row_is_measured_first(device):
    model = build()
    step(model)
    assert runs_of_layers(model)[0] == [1] * DEPTH
    assert runs_of_layers(model, LARGE)[0] == [2] * DEPTH
    assert runs_of_layers(model, LARGE)[0] == [1] * DEPTH
    assert runs_of_layers(model, SMALL)[0] == [1] * DEPTH
    # Rows are as long, but there are more of them.
    assert runs_of_layers(model, LARGE * 2, layout="padded")[0] == [2] * DEPTH
    # They are shorter; what was known of long ones still is.
    assert runs_of_layers(model, LARGE)[0] == [1] * DEPTH
    assert runs_of_layers(model, LARGE * 2, layout="padded")[0] == [1] * DEPTH


def test_a_pass_without_backward_measures_nothing(device):
    model = build()
    forward(model, LARGE)
    assert runs_of_layers(model, SMALL)[0] == [2] * DEPTH
    selective = checkpointing_of(model)
    forward(model, SMALL)
    assert selective._footprint.size == PassSize(62, 62)
    assert runs_of_layers(model, LARGE)[0] == [2] * DEPTH


def test_a_large_pass_without_backward_is_not_measured_by_a_small_one(device):
    model = measured(build())
    room_for(device, model, 2)
    forward(model, LARGE)
    assert runs_of_layers(model)[0] == [2, 2, 1, 1]
    device.total = 1 << 40
    assert runs_of_layers(model, LARGE)[0] == [2] * DEPTH


def test_two_passes_before_a_backward(device):
    """Each takes what the other leaves, and they are measured together."""
    _, expected = step(build())
    peaks = []
    for count in (1, 2):
        fresh(device)
        model = build()
        for _ in range(3):
            model.zero_grad()
            sum(forward(model).square().mean() for _ in range(count)).backward()
            for name, weight in model.named_parameters():
                torch.testing.assert_close(weight.grad, count * expected[name])
        assert len(checkpointing_of(model).whole) == DEPTH
        peaks.append(checkpointing_of(model)._footprint.peak)
    assert peaks[1] > peaks[0]


def test_passes_without_gradient_change_nothing_for_those_with(device):
    expected = step(build())
    model = build()
    step(model)
    logprobs = forward(model)
    with torch.no_grad():
        forward(model, LARGE)
        assert torch.equal(forward(model), logprobs)
    model.eval()
    forward(model, LARGE)
    model.train()
    logprobs.square().mean().backward()
    assert_same_bits((logprobs, {name: w.grad for name, w in model.named_parameters()}), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        # Layers that are offloaded.
        {"whole_layers": False},
        {"keywords": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_none_is_left_alone(options, device):
    model = build(**options)
    for _ in range(2):
        assert runs_of_layers(model)[0] == [2] * DEPTH
    assert checkpointing_of(model)._footprint is None


def test_another_function_than_torchs_checkpoints_every_layer(device):
    """transformers offloads the layers' inputs by one that wraps torch's."""
    model, called = build(), []

    def own(function, *args, **kwargs):
        called.append(function)
        return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)

    model._set_gradient_checkpointing(True, functools.partial(own, use_reentrant=False))
    for number in (1, 2):
        assert runs_of_layers(model)[0] == [2] * DEPTH
        assert len(called) == number * DEPTH
    with torch.no_grad():
        forward(model)
    assert len(called) == 2 * DEPTH


def test_a_budget_that_was_asked_for_is_the_most_that_is_spent(device):
    size = max(checkpointing_of(measured(build()))._footprint.layer_bytes(PassSize(62, 62)))
    model = build(limit=int(size * 2.5))
    step(model)
    assert runs_of_layers(model)[0] == [2, 2, 1, 1]


def test_selective_keeps_attention_of_the_layers_that_are_checkpointed(device):
    expected = step(build())
    model = measured(build(attention_always=True))
    room_for(device, model, 2)
    assert_same_bits(step(model), expected)
    asked = checkpointing_of(model).budget.asked
    assert len(asked) == 2 and all(kind for layer in asked for kind, _ in layer)


def test_other_layers_are_measured_anew(device):
    model = build()
    step(model)
    enable_checkpointing(model, {"use_reentrant": False}, every_n_layers=2)
    assert runs_of_layers(model)[0] == [2, 1, 2, 1]
    assert runs_of_layers(model)[0] == [1] * DEPTH


def test_a_copy_is_measured_on_its_own(device):
    model = build()
    step(model)
    step(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        room_for(device, one, 1)
        assert runs_of_layers(one)[0] == [2, 2, 2, 1]
    assert checkpointing_of(twin).whole == {twin.model.layers[-1]}


def test_a_model_on_several_devices_says_once_that_no_layer_is_left_alone(device, caplog):
    selective_checkpointing._say_once.cache_clear()
    model = build()
    layers = list(model.model.layers)
    layers[0].to("meta")
    for _ in range(2):
        assert selective_checkpointing._says_why_none_whole(layers)
    (line,) = caplog.messages
    assert "no whole layers uncheckpointed: the model lies on several devices (cpu, meta)" in line
    layers.pop(0)
    assert not selective_checkpointing._says_why_none_whole(layers)
    next(layers[0].parameters()).ds_id = 3
    assert selective_checkpointing._says_why_none_whole(layers)
    assert "ZeRO-3" in caplog.messages[-1]


def test_on_a_cpu_there_is_a_budget_for_results_that_grows_with_the_tokens():
    model = build()
    step(model)
    selective = checkpointing_of(model)
    assert selective._footprint is None and not selective.whole
    spent = sum(size for layer in selective.budget.asked for _, size in layer)
    assert selective.default_limit - spent <= selective.budget.left < selective.default_limit
