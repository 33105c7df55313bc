"""Linear layers, embeddings and LoRA layers where layers are fused: what is exchanged, its numbers, and undoing it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

from support.models import tiny_model
from trl_fast.modeling.fused_layers import FUSED_LAYERS, fuse_layers, plain_modules
from trl_fast.modeling.fused_layers.rotary_functions import restore_function
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.upcast_linear_layers import upcast_linear_layers
from trl_fast.ops.device import DeviceFacts, device_facts, simulated_device

CPU = torch.device("cpu")
IDS = torch.randint(3, 340, (2, 13), generator=torch.Generator().manual_seed(0))
# LoRA layers of a Llama of two that read what no other reads, and those of the first whose input has no gradient; the
# rest is `joint_linear`'s.
ALONE = 2 * 2 + 3


@pytest.fixture(autouse=True)
def _own_products():
    """Products are ours, whatever this CPU is; ops.linear takes ATen's where the kernels are not there."""
    with simulated_device(replace(device_facts(CPU), own_products=True)):
        yield


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the ops."""
    counted = Counter()
    for name in ("linear", "lora_linear", "embedding"):
        plain = getattr(plain_modules, name)

        def call(*args, name=name, plain=plain):
            counted[name] += 1
            return plain(*args)

        monkeypatch.setattr(plain_modules, name, call)
    return counted


def run(model):
    """The loss, and every gradient that there is."""
    model.zero_grad()
    loss = model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)[..., 5].square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, rtol=1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=rtol)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= rtol * max(gradient.norm(), 1e-3), name


def with_lora(model, **options):
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False, **options))
    disable_dropout(model)
    return model


@pytest.fixture(autouse=True)
def plain_rotary_function():
    """A family's models share it, and one that another test has fused may be there still."""
    restore_function(modeling_llama.__name__, "apply_rotary_pos_emb")


@pytest.mark.parametrize(("family", "cls", "layers"), [("llama", nn.Linear, 4), ("gpt2", Conv1D, 8)])
def test_numbers_and_undoing(family, cls, layers, calls):
    """Of Llama's layers, those that read what no other reads: the rest is `joint_linear`'s."""
    model = tiny_model(family)
    disable_dropout(model)
    expected, classes = run(model), [type(module) for module in model.modules()]
    fuse_layers(model, CPU, required=True)
    assert_same(run(model), expected)
    assert calls["linear"] == layers and calls["embedding"] == sum(
        type(m).__base__ is nn.Embedding for m in model.modules()
    )
    # The head's products are not the layer's.
    assert type(model.lm_head) is nn.Linear
    changes_of(model).undo(FUSED_LAYERS)
    assert [type(module) for module in model.modules()] == classes
    undone = run(model)
    assert all(torch.equal(undone[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    model = with_lora(tiny_model())
    expected = run(model)
    fuse_layers(base_model(model), CPU)
    base_model(model).gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(run(model), expected)


def test_lora(calls):
    model = with_lora(tiny_model())
    expected = run(model)
    fuse_layers(base_model(model), CPU)
    assert_same(run(model), expected)
    assert calls["lora_linear"] == ALONE and calls["linear"] == 0
    model.merge_adapter()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert calls["lora_linear"] == ALONE
    model.unmerge_adapter()
    assert_same(run(model), expected, rtol=1e-4)


def dropped(model):
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_dropout["default"] = nn.Dropout(0.5)


def second_adapter(model):
    model.add_adapter("other", LoraConfig(target_modules=["up_proj", "q_proj"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def hooked(model):
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.base_layer.register_forward_hook(lambda _, args, out: 2 * out)


@pytest.mark.parametrize(
    ("change", "options", "fused"),
    [(dropped, {}, 0), (second_adapter, {}, 10), (hooked, {}, 0), (None, {"use_dora": True}, 0)],
    ids=["dropout", "two adapters", "hook", "dora"],
)
def test_lora_of_other_kinds_runs_as_before(change, options, fused, calls):
    model = with_lora(tiny_model(), **options)
    if change is not None:
        change(model)
    torch.manual_seed(0)
    expected = run(model)
    fuse_layers(base_model(model), CPU)
    torch.manual_seed(0)
    assert_same(run(model), expected)
    assert calls["lora_linear"] == fused


def test_16_bits_and_autocast_are_not_ours(calls):
    model = tiny_model()
    fuse_layers(model, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, use_cache=False)
    assert calls["linear"] == 0
    narrow = tiny_model().bfloat16()
    fuse_layers(narrow, CPU)
    narrow(input_ids=IDS, use_cache=False)
    assert calls["linear"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_under_autocast_is_ours_on_a_gpu(dtype, calls):
    """The adapter is in float32, as PEFT makes it; on a CPU, whose 16-bit products have other ways, all is PEFT's."""
    model = with_lora(tiny_model().to(dtype))
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {torch.float32}
    right = run(copy.deepcopy(model).float())
    gpu = DeviceFacts("cuda", multiplies_bf16=True, serves=lambda *_: False)
    with simulated_device(gpu), torch.autocast("cpu", torch.bfloat16):
        expected = run(model)
        fuse_layers(base_model(model), CPU)
        got = run(model)
    assert calls["lora_linear"] == ALONE
    for name, gradient in right[1].items():
        error, allowed = ((found[1][name].float() - gradient).norm() for found in (got, expected))
        assert error <= 2 * allowed, name
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert calls["lora_linear"] == ALONE


def test_single_tokens_are_not_ours(calls):
    model = tiny_model()
    fuse_layers(model, CPU)
    model(input_ids=IDS[:1, :1], use_cache=False)
    assert calls["linear"] == 0


def test_upcasting_besides(calls):
    """Under autocast a fused layer's 16-bit products are upcast, and each change is undone alone."""
    model = tiny_model()
    upcast_linear_layers(model)
    fuse_layers(model, CPU)
    layer = model.model.layers[0].mlp.up_proj
    with simulated_device(replace(device_facts(CPU), multiplies_bf16=False)), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, use_cache=False)
        assert hasattr(layer, "plain_forward")
    changes_of(model).undo_all()
    assert type(layer) is nn.Linear and "forward" not in vars(layer)


class Scaled(nn.Embedding):
    """An embedding that does more than look up."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_subclasses_and_other_embeddings_stay_as_they_are():
    model = tiny_model()
    for cls, options in (
        (Scaled, {}),
        (nn.Embedding, {"max_norm": 1.0}),
        (nn.Embedding, {"scale_grad_by_freq": True}),
    ):
        model.set_input_embeddings(cls(340, 32, **options))
        fuse_layers(model, CPU)
        assert type(model.get_input_embeddings()) is cls
        changes_of(model).undo(FUSED_LAYERS)
