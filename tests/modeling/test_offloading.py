"""Activation offloading with stand-ins for the copies to and from a GPU: the same bits, and no weights among them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import pack_trees
from trl_fast.modeling import offloading
from trl_fast.modeling.attention import use_segment_attention
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.offloading import Offloading, offload_activations
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.tiled_mlp import tile_mlps


class StandIn:
    """Copies within the CPU in place of those to and from a GPU, all of them kept in mind."""

    def __init__(self):
        self.out, self.back = [], []

    def to_host(self, tensor):
        self.out.append(tensor)
        return tensor.clone()

    def to_device(self, tensor, device):
        self.back.append((tensor, device))
        return tensor.clone()


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Offloading, "is_on_device", staticmethod(lambda tensor: True))
    monkeypatch.setattr(Offloading, "to_host", staticmethod(stand_in.to_host))
    monkeypatch.setattr(Offloading, "to_device", staticmethod(stand_in.to_device))
    return stand_in


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


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["keep", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("options", [{}, {"lora": True}, {"tiled": True}, {"family": "gemma2"}], ids=str)
def test_the_same_bits(options, checkpointing, stand_in):
    expected = run(build(**options, checkpointing=checkpointing))
    assert not stand_in.out
    model = build(**options, checkpointing=checkpointing)
    offload_activations(base_model(model))
    got = run(model)
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
    # With checkpoints at least the hidden states that enter each layer.
    assert len(stand_in.out) >= (20 if checkpointing is None else 2)
    assert len(stand_in.back) >= len(stand_in.out) * (checkpointing is None)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_weight_leaves_the_device(autocast, stand_in):
    """Nor do the copies of weights that autocast makes."""
    model = build()
    offload_activations(model)
    run(model, autocast)
    storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in stand_in.out}
    # 62 tokens: whatever is an activation has them as a dimension.
    assert all(62 in tensor.shape for tensor in stand_in.out)


def test_small_and_repeated_tensors_stay(stand_in):
    weight = torch.nn.Parameter(torch.randn(400, 2))
    x = torch.randn(300, requires_grad=True)
    with Offloading([weight]):
        repeated = torch.randn(1, 1).expand(300, 300)
        for factor in (torch.randn(10), repeated, weight, weight.T, weight.detach()[:200], weight.detach().T.clone()):
            (factor * torch.ones(factor.shape, requires_grad=True)).sum().backward()
        assert not stand_in.out
        (x * torch.randn(300)).sum().backward()
    assert len(stand_in.out) == 1


def test_the_head_and_the_loss_keep_theirs(stand_in):
    model = build()
    offload_activations(model)
    hidden = {"last": None}
    model.model.norm.register_forward_hook(lambda *given: hidden.update(last=given[-1]))
    run(model)
    # The final norm's input is the layers', its output the head's.
    assert all(tensor.shape[-1] != 340 for tensor in stand_in.out)


def test_without_gradient_nothing_is_saved(stand_in):
    model = build()
    offload_activations(model)
    with torch.no_grad():
        score(model, pack_trees(random_trees([(18, (3, 5))]), "shared_prefix", 2))
    assert not stand_in.out


def test_a_copy_of_the_model_runs_its_own_weights(stand_in):
    model = build()
    offload_activations(model)
    offload_activations(model)
    twin = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data.zero_()
    assert twin(input_ids=torch.tensor([[5, 6, 7]])).logits.std() > 0


def test_without_a_gpu_it_says_that_it_does_nothing(caplog):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = build()
    with caplog.at_level(logging.WARNING, "trl_fast"):
        offload_activations(model)
    assert [record.message for record in caplog.records] == [
        "activation_offloading=True does nothing here: without a GPU, activations are in CPU memory."
    ]
    assert "forward" not in vars(offloading.backbone(model))


def test_pinned_memory_comes_in_blocks_that_are_used_again(monkeypatch):
    """Blocks of one size but for the last, in the order of memory: whatever the strides, no copy before the copy."""
    sizes = []

    def memory(count, dtype):
        sizes.append(count)
        return torch.full((count,), float("nan"), dtype=dtype)

    monkeypatch.setattr(offloading, "pinned_memory", memory)
    monkeypatch.setattr(offloading, "_BLOCK_BYTES", 64)
    whole = torch.randn(1, 7, 3, 2)
    for tensor in (
        whole,
        whole.transpose(1, 2),
        whole.permute(3, 0, 2, 1),
        whole[:, :5],
        whole[:, :, 1:],
        whole.half(),
    ):
        sizes.clear()
        copy = Offloading.to_host(tensor)
        back = Offloading.to_device(copy, tensor.device)
        assert torch.equal(back, tensor) and back.dtype == tensor.dtype
        full = 64 // tensor.element_size()
        assert set(sizes[:-1]) <= {full} and sum(sizes) == tensor.numel() and sizes[-1] <= full
    dense = whole.transpose(1, 2)
    assert Offloading.to_device(Offloading.to_host(dense), dense.device).stride() == dense.stride()
