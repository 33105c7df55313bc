"""Models in 16-bit numbers whose linear layers compute in float32."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from support.models import tiny_model
from support.simulated_device import set_bf16_products
from support.trees import random_trees
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data import pack_trees
from trl_fast.data.images import ImageReader
from trl_fast.modeling import upcast_linear_layers as upcast
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.upcast_linear_layers import upcast_linear_layers


class SlowProducts(TorchDispatchMode):
    """Counts products and attention of 16-bit numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(part in name for part in ("aten::mm", "aten::addmm", "aten::bmm", "flash_attention")):
            self.count += any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_hardware(monkeypatch):
    set_bf16_products(monkeypatch, False)


def upcast_layers(model):
    """The linear layers that were changed."""
    return [module for module in model.modules() if "plain_forward" in vars(module)]


def build(family, dtype, lora=False, plain=False):
    model = tiny_model(family).to(dtype)
    attach_scoring(model)
    if plain:
        model.model._forward_pre_hooks.clear()
        for module in upcast_layers(model):
            module.forward = module.plain_forward.__get__(module)
    use_segment_attention(model)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return model


def run(model, autocast=False):
    batch = pack_trees(random_trees([(18, (3, 5)), (21, (6, 9))]), "shared_prefix", 2)
    with SlowProducts() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logprobs = score(model, batch).tokens.logprobs
        logprobs.square().mean().backward()
    return logprobs.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, counted.count


def distance(got, right):
    """Relative, over all gradients."""
    found = torch.cat([grad.double().flatten() for grad in got[1].values()])
    true = torch.cat([right[1][name].double().flatten() for name in got[1]])
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_model_in_bfloat16(family, lora):
    """No slow product is left, and numbers are as near to float32's as the plain model's."""
    got = run(build(family, torch.bfloat16, lora))
    plain = run(build(family, torch.bfloat16, lora, plain=True))
    upcast_weights = build(family, torch.bfloat16, lora).float()
    exact = run(upcast_weights)
    assert got[2] == 0 < plain[2]
    assert (got[0] - exact[0]).abs().max() < 0.1
    assert got[1].keys() == plain[1].keys()
    assert all(grad.dtype == plain[1][name].dtype for name, grad in got[1].items())
    assert distance(got, exact) < 1.1 * distance(plain, exact)


def test_autocast_of_float32_weights():
    got = run(build("llama", torch.float32), autocast=True)
    plain = run(build("llama", torch.float32, plain=True), autocast=True)
    exact = run(build("llama", torch.float32))
    assert got[2] == 0 < plain[2]
    assert all(grad.dtype == torch.float32 for grad in got[1].values())
    assert 0 < distance(got, exact) < 1.1 * distance(plain, exact)


def test_other_dtypes_and_single_tokens_go_their_own_way():
    model = build("llama", torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    one = torch.randn(1, layer.in_features).bfloat16()
    assert torch.equal(layer(one), torch.nn.functional.linear(one, layer.weight))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(one.float().expand(9, -1))


def test_upcasting_twice_and_copying():
    model = tiny_model("llama").bfloat16()
    upcast_linear_layers(model)
    forward = model.model.layers[0].mlp.up_proj.plain_forward
    upcast_linear_layers(model)
    assert model.model.layers[0].mlp.up_proj.plain_forward is forward
    assert len(model.model._forward_pre_hooks) == 1
    copied = copy.deepcopy(model)
    twin = copied.model.layers[0].mlp.up_proj
    assert twin.forward.__self__ is twin
    begin_pass(copied.to("meta"))
    assert not upcast_layers(copied) and upcast_layers(model)


def begin_pass(model):
    """Runs the hooks that precede a pass of the layers."""
    layers = base_model(model).model
    for hook in layers._forward_pre_hooks.values():
        hook(layers, ())


def linear_layers(model):
    return [module for module in model.modules() if type(module) is torch.nn.Linear]


def test_models_in_float32_are_left_alone_until_they_need_it():
    model = build("llama", torch.float32)
    run(model)
    assert not upcast_layers(model) and all("forward" not in vars(layer) for layer in linear_layers(model))
    run(model, autocast=True)
    assert upcast_layers(model) == linear_layers(model)
    # A pass in another dtype may come before that one's backward.
    run(model)
    assert upcast_layers(model) == linear_layers(model)


def test_models_that_become_narrow_later():
    model = build("llama", torch.float32).bfloat16()
    assert not upcast_layers(model)
    assert run(model)[2] == 0
    assert upcast_layers(model) == linear_layers(model)


def test_on_a_gpu_linear_layers_are_as_they_were():
    """Another device stands for it, on which tensors have no numbers."""
    model = build("llama", torch.bfloat16, lora=True)
    assert upcast_layers(model)
    begin_pass(model.to("meta"))
    assert not upcast_layers(model)
    assert all(layer.forward.__func__ is torch.nn.Linear.forward for layer in linear_layers(model))
    begin_pass(model.to_empty(device="cpu"))
    assert upcast_layers(model) == linear_layers(model)
    on_device = tiny_model("llama").bfloat16().to("meta")
    attach_scoring(on_device)
    assert not upcast_layers(on_device)


def test_a_cpu_with_hardware_for_them_leaves_them_alone(monkeypatch):
    set_bf16_products(monkeypatch, True)
    model = build("llama", torch.bfloat16)
    run(model)
    assert not upcast_layers(model)
    # There is none for float16.
    assert upcast_layers(build("llama", torch.float16))


def test_a_tower_is_changed_before_it_reads_the_first_images():
    """Under checkpointing it would be computed again in another way."""
    model = tiny_vision_model("llava")
    attach_scoring(model)
    image = ImageReader(tiny_processor("llava")).image_input(pictures(1, (84, 56))[0])
    tokens = torch.full((1, image.num_tokens), model.config.image_token_id)
    tower = {*linear_layers(model.model.vision_tower)}
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: seen.append({*upcast_layers(model)}))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens, **image.tensors)
    assert tower and tower <= seen[0]


def test_adapters_that_hold_a_whole_layer_are_changed_back():
    """PEFT's wrapper of a layer that trains whole answers for the attributes of the layer inside."""
    model = build("llama", torch.bfloat16)
    get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["down_proj"]))
    changes_of(model).undo(upcast.UPCAST)
    assert not upcast_layers(model) and "forward" not in vars(model.model.layers[0].mlp.down_proj.original_module)


def test_what_was_wrapped_since_is_not_unwrapped():
    model = build("llama", torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    inner = layer.forward
    layer.forward = wrapped = lambda x: inner(x)
    begin_pass(model.to("meta"))
    assert layer.forward is wrapped and upcast_layers(model) == [layer]
    begin_pass(model.to_empty(device="cpu"))
    assert layer.forward is wrapped
    layer(torch.randn(5, layer.in_features).bfloat16())


def test_all_weights_are_looked_at_once(monkeypatch):
    """And once more when something has changed, which may make products slow."""
    set_bf16_products(monkeypatch, True)
    looks = []
    of_weights = upcast._dtypes
    monkeypatch.setattr(upcast, "_dtypes", lambda *args: looks.append(args) or of_weights(*args))
    model = build("llama", torch.float32)
    for _ in range(3):
        begin_pass(model)
    assert len(looks) == 1
    with torch.autocast("cpu", torch.bfloat16):
        begin_pass(model)
        begin_pass(model)
    assert len(looks) == 2 and not upcast_layers(model)
    assert pickle.loads(pickle.dumps(model.trl_fast_upcast_seen)) == model.trl_fast_upcast_seen
    begin_pass(model.half())
    assert len(looks) == 3 and upcast_layers(model) == linear_layers(model)


def test_a_layer_that_became_narrow_is_seen_by_a_further_call():
    model = build("llama", torch.float32)
    layer = model.model.layers[1].mlp.up_proj.bfloat16()
    begin_pass(model)
    assert not upcast_layers(model)
    upcast_linear_layers(model)
    assert layer in upcast_layers(model)
