"""Activation offloading: the same bits, no weights among what leaves, and everything in order.

Without a GPU stand-ins are put in the place of copies and streams. `LateCopies` make each copy as late as the waits
allow, `Races` looks at every access to memory of the real copies on streams that run nothing.
"""

from __future__ import annotations

import copy
import logging
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from support.copies import LateCopies
from support.models import tiny_model
from support.streams import Races, Streams
from support.trees import random_trees
from trl_fast.data import pack_trees
from trl_fast.modeling import activation_offloading, pinned_copies
from trl_fast.modeling.activation_offloading import Offloading, offload_activations
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.offload_schedule import Schedule
from trl_fast.modeling.pinned_copies import PinnedCopies
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.tiled_mlp import tile_mlps

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(activation_offloading, "is_on_device", lambda tensor: True)


@pytest.fixture
def stand_in(as_if_on_gpu, monkeypatch):
    copies = LateCopies()
    monkeypatch.setattr(activation_offloading, "copies_of", lambda device: copies)
    yield copies
    copies.finish()


@pytest.fixture
def races(as_if_on_gpu, monkeypatch):
    """The real copies, looked at; blocks of pinned memory are NaN at first."""
    streams = Streams()
    races, copies = Races(streams), PinnedCopies(torch.device("cpu"), streams)
    monkeypatch.setattr(activation_offloading, "copies_of", lambda device: copies)
    monkeypatch.setattr(pinned_copies, "pinned_memory", lambda size: torch.full((size,), 255, dtype=torch.uint8))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: races.note(tensor, stream))
    return races


def build(family="llama", lora=False, checkpointing=None, tiled=False):
    model = tiny_model(family)
    attach_scoring(model)
    use_segment_attention(model)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    if tiled:
        tile_mlps(base_model(model), 30)
    return model


def run(model, autocast=False):
    trees = random_trees([(18, (3, 5)), (21, (6, 9))])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs = score(model, pack_trees(trees, "shared_prefix", 2)).tokens.logprobs
    logprobs.square().mean().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["keep", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("options", [{}, {"lora": True}, {"tiled": True}, {"family": "gemma2"}], ids=str)
def test_the_same_bits(options, checkpointing, stand_in):
    expected = run(build(**options, checkpointing=checkpointing))
    assert not stand_in.left
    model = build(**options, checkpointing=checkpointing)
    offload_activations(base_model(model))
    assert_same(run(model), expected)
    # With checkpoints at least the hidden states that enter each layer.
    assert len(stand_in.left) >= (20 if checkpointing is None else 2)
    assert stand_in.asked_back >= len(stand_in.left) * (checkpointing is None)
    assert stand_in.forgotten == len(stand_in.left)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_weight_leaves_the_device(autocast, stand_in):
    """Nor do the copies of weights that autocast makes."""
    model = build()
    offload_activations(model)
    run(model, autocast)
    addresses = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert not addresses & {left.address for left in stand_in.left}
    # 62 tokens: whatever is an activation has them as a dimension.
    assert stand_in.left and all(62 in left.shape for left in stand_in.left)


def test_small_and_repeated_tensors_stay(stand_in):
    weight = torch.nn.Parameter(torch.randn(400, 2))
    x = torch.randn(300, requires_grad=True)
    with Offloading([weight]).running():
        repeated = torch.randn(1, 1).expand(300, 300)
        for factor in (torch.randn(10), repeated, weight, weight.T, weight.detach()[:200], weight.detach().T.clone()):
            (factor * torch.ones(factor.shape, requires_grad=True)).sum().backward()
        assert not stand_in.left
        (x * torch.randn(300)).sum().backward()
    assert len(stand_in.left) == 1


def test_the_head_and_the_loss_keep_theirs(stand_in):
    model = build()
    offload_activations(model)
    hidden = {"last": None}
    model.model.norm.register_forward_hook(lambda *given: hidden.update(last=given[-1]))
    run(model)
    # The final norm's input is the layers', its output the head's.
    assert stand_in.left and all(left.shape[-1] != 340 for left in stand_in.left)


def test_without_gradient_nothing_is_saved(stand_in):
    model = build()
    offload_activations(model)
    with torch.no_grad():
        score(model, pack_trees(random_trees([(18, (3, 5))]), "shared_prefix", 2))
    assert not stand_in.left


def test_a_copy_of_the_model_runs_its_own_weights(stand_in):
    model = build()
    offload_activations(model)
    offload_activations(model)
    twin = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data.zero_()
    assert twin(input_ids=torch.tensor([[5, 6, 7]])).logits.std() > 0


def test_without_a_gpu_it_says_that_it_does_nothing(caplog):
    if ON_GPU:
        pytest.skip("this machine has a GPU")
    model = build()
    with caplog.at_level(logging.WARNING, "trl_fast"):
        offload_activations(model)
    assert [record.message for record in caplog.records] == [
        "activation_offloading=True does nothing here: without a GPU, activations are in CPU memory."
    ]
    assert "forward" not in vars(activation_offloading.backbone(model))


# ---- order


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["keep", "non-reentrant", "reentrant"])
def test_no_memory_is_used_too_early_or_freed_too_early(checkpointing, races):
    expected = run(build(checkpointing=checkpointing))
    model = build(checkpointing=checkpointing)
    offload_activations(model)
    for _ in range(2):
        # The second pass finds pinned memory that the first one used.
        model.zero_grad()
        with races:
            got = run(model)
        assert_same(got, expected)
    assert not races.found


def test_a_backward_pass_that_goes_half_the_way(races):
    """Memory that was asked for and is not wanted after all is freed when its copy is done, not before."""
    model = build()
    offload_activations(model)
    batch = pack_trees(random_trees([(18, (3, 5)), (21, (6, 9))]), "shared_prefix", 2)
    with races:
        logprobs = score(model, batch).tokens.logprobs
        last = model.model.layers[-1].mlp.down_proj.weight
        torch.autograd.grad(logprobs.sum(), last)
        del logprobs
    assert not races.found


def test_a_graph_that_is_kept_gives_the_same_twice(stand_in):
    model = build()
    offload_activations(model)
    logprobs = score(model, pack_trees(random_trees([(18, (3, 5))]), "shared_prefix", 2)).tokens.logprobs
    weights = [*model.parameters()]
    first = torch.autograd.grad(logprobs.sum(), weights, retain_graph=True)
    second = torch.autograd.grad(logprobs.sum(), weights)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


class Written:
    """`Copies` that write down what is asked of them."""

    def __init__(self):
        self.log = []

    def to_host(self, tensor):
        self.log.append(f"out {int(tensor[0])}")
        return tensor

    def to_device(self, copy):
        self.log.append(f"back {int(copy[0])}")
        return copy.clone()

    def event(self):
        return self.log[-1] if self.log else None

    def wait(self, event):
        self.log.append(f"wait for {event}")

    def abandon(self, tensor):
        self.log.append(f"abandon {int(tensor[0])}")

    def forget(self, copy):
        self.log.append(f"forget {int(copy[0])}")


def saved_layers(schedule, sizes):
    """Saves numbered tensors, so many a layer."""
    numbers = iter(range(100))
    found = []
    for size in sizes:
        schedule.start_layer()
        found.append([schedule.save(torch.tensor([next(numbers)])) for _ in range(size)])
    schedule.end()
    return found


def test_forward_lags_behind_by_one_layer():
    copies = Written()
    saved_layers(Schedule(copies), (2, 1, 1, 1))
    log = [line for line in copies.log if "forget" not in line]
    # Layer 0's memory is waited for when layer 2 begins, and so on; the last two layers' at the end.
    assert log == ["out 0", "out 1", "out 2", "wait for out 1", "out 3", "wait for out 2", "out 4", "wait for out 4"]


def test_backward_asks_for_the_layer_before():
    copies = Written()
    layers = saved_layers(Schedule(copies), (2, 2, 0, 1))
    copies.log.clear()
    layers[3][0].restored()
    # A layer that saved nothing is none.
    assert copies.log == ["back 4", "back 3", "back 2", "wait for back 4"]
    copies.log.clear()
    layers[1][1].restored()
    assert copies.log == ["back 1", "back 0", "wait for back 3"]
    copies.log.clear()
    layers[1][0].restored()
    layers[0][0].restored()
    assert copies.log == ["wait for back 2", "wait for back 0"]
    copies.log.clear()
    layers[0].clear()
    assert copies.log == ["abandon 1", "forget 1", "forget 0"]


def test_no_more_than_the_room_is_on_its_way():
    """Tensors of 8 bytes, room for two: the third waits for the first, forward and backward."""
    copies = Written()
    (layer,) = saved_layers(Schedule(copies, room_bytes=16), (4,))
    log = [line for line in copies.log if "forget" not in line]
    assert log == ["out 0", "out 1", "out 2", "wait for out 0", "out 3", "wait for out 1", "wait for out 3"]
    copies.log.clear()
    layer[3].restored()
    assert copies.log == ["back 3", "back 2", "back 1", "wait for back 3"]
    copies.log.clear()
    layer[2].restored()
    layer[1].restored()
    assert copies.log == ["back 0", "wait for back 2", "wait for back 1"]


def test_one_that_is_larger_than_the_room_is_waited_for_at_once():
    copies = Written()
    layers = saved_layers(Schedule(copies, room_bytes=4), (1, 1))
    assert copies.log == ["out 0", "wait for out 0", "out 1", "wait for out 1"]
    copies.log.clear()
    layers[1][0].restored()
    layers[0][0].restored()
    assert copies.log == ["back 1", "wait for back 1", "back 0", "wait for back 0"]


def test_what_is_asked_for_out_of_order_comes_all_the_same():
    """A pass through the first layers only, and the last tensors of a layer after others."""
    copies = Written()
    layers = saved_layers(Schedule(copies), (1, 3, 1))
    copies.log.clear()
    layers[1][1].restored()
    assert copies.log == ["back 2", "back 3", "back 1", "back 0", "wait for back 2"]
    copies.log.clear()
    layers[2][0].restored()
    layers[1][2].restored()
    assert copies.log == ["back 4", "wait for back 4", "wait for back 3"]


def test_what_is_gone_is_not_asked_for():
    copies = Written()
    layers = saved_layers(Schedule(copies), (2, 1))
    del layers[0][1]
    copies.log.clear()
    layers[1][0].restored()
    assert copies.log == ["back 2", "back 0", "wait for back 2"]


def test_without_layers_each_tensor_is_one():
    copies = Written()
    schedule = Schedule(copies)
    saved = [schedule.save(torch.tensor([number])) for number in range(3)]
    schedule.end()
    assert copies.log == ["out 0", "out 1", "wait for out 0", "out 2", "wait for out 2"]
    copies.log.clear()
    saved[2].restored()
    assert copies.log == ["back 2", "back 1", "wait for back 2"]


def test_a_model_is_offloaded_layer_by_layer(stand_in, monkeypatch):
    waits = []
    wait = stand_in.wait
    monkeypatch.setattr(stand_in, "wait", lambda event: waits.append(event) or wait(event))
    model = build()
    offload_activations(model)
    score(model, pack_trees(random_trees([(18, (3, 5))]), "shared_prefix", 2))
    assert len(stand_in.left) >= 20
    # One for each layer but the last two, and one at the end.
    assert len(waits) == 1


def test_the_source_is_held_only_until_it_is_copied(stand_in):
    schedule = Schedule(stand_in)
    sources = []
    for _ in range(3):
        schedule.start_layer()
        tensor = torch.randn(400)
        sources.append(weakref.ref(tensor))
        schedule.save(tensor)
        del tensor
    assert [source() is not None for source in sources] == [False, True, True]
    schedule.end()
    assert all(source() is None for source in sources)


# ---- pinned memory


@pytest.fixture
def pinned(monkeypatch):
    """Sizes of the blocks of pinned memory that are made, small ones."""
    sizes = []

    def memory(size):
        sizes.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    monkeypatch.setattr(pinned_copies, "pinned_memory", memory)
    monkeypatch.setattr(pinned_copies, "_BLOCK_BYTES", 64)
    return sizes


WHOLE = torch.randn(1, 7, 3, 2)
STRIDED = {
    "dense": WHOLE,
    "transposed": WHOLE.transpose(1, 2),
    "permuted": WHOLE.permute(3, 0, 2, 1),
    "shorter": WHOLE[:, :5],
    "with gaps": WHOLE[:, :, 1:],
    "half": WHOLE.half(),
    "flags": WHOLE > 0,
}


@pytest.mark.parametrize("tensor", STRIDED.values(), ids=STRIDED.keys())
def test_there_and_back(tensor, pinned):
    """In the order of memory, in blocks of one size but for the last, a power of two."""
    copies = PinnedCopies(torch.device("cpu"), Streams())
    back = copies.to_device(copies.to_host(tensor))
    assert torch.equal(back, tensor) and back.dtype == tensor.dtype
    assert set(pinned[:-1]) <= {64} and pinned[-1].bit_count() == 1 and pinned[-1] <= 64
    assert tensor.nbytes <= sum(pinned) < 2 * tensor.nbytes
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        assert back.stride() == tensor.stride()


def test_blocks_are_used_again(pinned):
    copies = PinnedCopies(torch.device("cpu"), Streams())
    first, second = torch.randn(40), torch.randn(39)
    kept = copies.to_host(first)
    copies.forget(copies.to_host(first))
    made = len(pinned)
    again = copies.to_host(second)
    assert len(pinned) == made
    assert torch.equal(copies.to_device(again), second) and torch.equal(copies.to_device(kept), first)


# ---- on a GPU


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [None, False], ids=["keep", "non-reentrant"])
@pytest.mark.parametrize("slow", ["out", "back", None])
def test_the_same_bits_on_a_gpu(checkpointing, slow, monkeypatch):
    """Also where copies, one way or the other, come much later than what computes."""
    device = torch.device("cuda", 0)
    expected = run_on(device, build(checkpointing=checkpointing))

    class Slow(PinnedCopies):
        def to_host(self, tensor):
            self.sleep(slow == "out")
            return super().to_host(tensor)

        def to_device(self, copy):
            self.sleep(slow == "back")
            return super().to_device(copy)

        def sleep(self, now):
            if now:
                with torch.cuda.stream(self._side):
                    torch.cuda._sleep(2_000_000)

    copies = Slow(device)
    monkeypatch.setattr(activation_offloading, "copies_of", lambda device: copies)
    model = build(checkpointing=checkpointing)
    offload_activations(model)
    for _ in range(3):
        model.zero_grad()
        assert_same(run_on(device, model), expected)


def run_on(device, model):
    model.to(device)
    trees = random_trees([(180, (30, 50)), (210, (60, 90))])
    logprobs = score(model, pack_trees(trees, "shared_prefix", 2).to(device)).tokens.logprobs
    logprobs.square().mean().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
