"""The choice of uncheckpointed layers as arithmetic: what layers save, what a pass needs, how many layers fit."""

import pytest
import torch

from support.models import tiny_model
from trl_fast.modeling.uncheckpointed_layers import (
    MARGIN,
    STRETCH,
    DeviceMemory,
    Footprint,
    Meter,
    PassSize,
    layers_that_fit,
    merged,
    missing_gradient_bytes,
    room_for_layers,
    split_layers,
    working_weights,
)

GIB = 1 << 30


def memory(free, total=64 * GIB):
    return DeviceMemory(free, total, total - free, total - free)


@pytest.mark.parametrize(
    "sizes, room, expected",
    [
        ([5, 5, 5], 4, 0),
        ([5, 5, 5], 5, 1),
        ([5, 5, 5], 14, 2),
        ([5, 5, 5], 15, 3),
        ([], 9, 0),
        # A large one in the way is not passed over: backward comes to it before the small ones.
        ([1, 9, 1], 5, 1),
        ([9, 0, 0], 0, 2),
    ],
)
def test_the_last_layers_that_fit(sizes, room, expected):
    assert layers_that_fit(sizes, room) == expected


def test_room_is_what_is_free_beyond_the_reserve_and_the_margin():
    device = 40 * GIB, 64 * GIB
    room = 30 * GIB - 64 * GIB // MARGIN
    assert room_for_layers(*device, 10 * GIB, None) == room == room_for_layers(*device, 10 * GIB, 500 * GIB)
    assert room_for_layers(*device, 10 * GIB, 3 * GIB) == 3 * GIB
    assert room_for_layers(9 * GIB, 64 * GIB, 10 * GIB, None) == 0


def footprint(**changes):
    values = {"size": PassSize(1000, 500), "layers": (3.0, 4.0), "casts": 600, "peak": 9000, "missing_gradients": 70}
    return Footprint(**{**values, **changes})


def test_bytes_of_a_layer_follow_the_tokens():
    found = footprint()
    assert found.layer_bytes(PassSize(1000, 500)) == [3000, 4000]
    # Half of the tokens: half of the bytes, but for copies of the weights, of which there are at most 600.
    assert found.layer_bytes(PassSize(500, 500)) == [1800, 2300]
    assert found.layer_bytes(PassSize(1200, 500)) == [3600, 4800]
    # A longer row: attention that keeps tokens x tokens.
    assert found.layer_bytes(PassSize(1000, 600)) == [3600, 4800]


def test_the_reserve_is_the_measured_peak_and_gradients_that_were_there_then():
    found = footprint()
    assert found.reserve(PassSize(10, 10), 70) == 9000
    assert found.reserve(PassSize(10, 10), 0) == 9000
    assert found.reserve(PassSize(10, 10), 270) == 9200
    assert found.reserve(PassSize(1100, 500), 70) == 9900


def test_sizes_that_were_not_measured_are_not_planned():
    found = footprint()
    assert found.covers(PassSize(1000, 500)) and found.covers(PassSize(int(1000 * STRETCH), 1))
    assert not found.covers(PassSize(1300, 500)) and not found.covers(PassSize(900, 700))


def test_footprints_of_two_passes():
    one, two = footprint(), footprint(size=PassSize(400, 800), layers=(5.0, 1.0), peak=50, missing_gradients=0)
    both = merged(one, two)
    assert both == footprint(size=PassSize(1000, 800), layers=(5.0, 4.0), missing_gradients=0)
    assert merged(None, two) == two == merged(two, None) and merged(None, None) is None


def test_a_split_is_a_function_of_numbers():
    size, given = PassSize(1000, 500), footprint(layers=(2e6, 2e6, 2e6), peak=4 * GIB, casts=0)
    plenty, some = memory(60 * GIB), memory(12 * GIB + 5 * 10**9)
    assert split_layers(given, size, plenty, 0, None).whole == 3
    found = split_layers(given, size, some, 0, None)
    assert (found.whole, found.left) == (2, 10**9)
    assert split_layers(given, size, some, 2 * 10**9, None).whole == 1
    found = split_layers(given, size, some, 0, 3 * 10**9)
    assert (found.whole, found.left) == (1, 10**9)
    assert split_layers(given, size, memory(GIB), 0, None) == type(found)(0, 0)


def test_weights_that_a_token_meets():
    model = tiny_model("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    layer = model.model.layers[0]
    experts = [weight.numel() for weight in layer.parameters() if weight.dim() == 3]
    everything = sum(weight.numel() for weight in layer.parameters())
    assert experts and working_weights(layer, 2) == everything - sum(experts) * 6 // 8


def test_gradients_that_are_still_to_come():
    layer = torch.nn.Linear(3, 5)
    assert missing_gradient_bytes(layer.parameters()) == 4 * 20
    layer.bias.requires_grad_(False)
    assert missing_gradient_bytes(layer.parameters()) == 4 * 15
    layer(torch.ones(3)).sum().backward()
    assert missing_gradient_bytes(layer.parameters()) == 0


def test_a_meter_adds_up_what_a_layer_leaves_behind_and_counts_from_the_least_start():
    shared, other, never = layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    allocated = [100]
    meter = Meter(layers, torch.device("cpu"), lambda _: DeviceMemory(0, 0, allocated[0], 900))

    def at(bytes_):
        allocated[0] = bytes_
        return DeviceMemory(0, 0, bytes_, 900)

    def left_behind(count):
        allocated[0] += count

    meter.start(PassSize(10, 10), 50, at(300))
    first = [meter.watched(layer, left_behind) for layer in (shared, shared, other)]
    meter.start(PassSize(40, 5), 20, at(200))
    meter.start(PassSize(400, 400), 30, at(250))
    assert meter.watched(torch.nn.Linear(2, 2), left_behind) is left_behind
    for run in first:
        run(1000)
    assert meter.footprint() is None
    for run, count in zip(first, (30, 50, 70), strict=True):
        run(count)
    # The passes that had no backward count for nothing but where they began.
    assert meter.footprint() == Footprint(PassSize(10, 10), (8.0, 7.0, 8.0), 0, 700, 20)
