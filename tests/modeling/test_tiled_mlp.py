"""MLPs and norms in tiles: the gradients of whole ones, and a peak that does not grow with length."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.memory import measure_peak
from support.models import tiny_model
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.tiled_mlp import tile_mlps

# 26 tokens in two rows: three tiles, the last one shorter.
IDS = torch.randint(3, 340, (2, 13), generator=torch.Generator().manual_seed(0))
TILE = 10
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def run(model, autocast=False):
    """The loss, and every gradient that there is."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS, use_cache=False).logits.float()
    loss = logits.log_softmax(-1)[..., 5].square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, rtol=1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=rtol)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= rtol * max(gradient.norm(), 1e-3), name
        assert got[1][name].dtype == gradient.dtype


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["keep", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "gpt_neox", "starcoder2", "lfm2"])
def test_gradients(family, checkpointing):
    model = tiny_model(family)
    disable_dropout(model)
    expected = run(model)
    assert tile_mlps(model, TILE) == 2
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    assert_same(run(model), expected)


def test_the_mlp_runs_in_tiles():
    model, seen = tiny_model(), []
    tile_mlps(model, TILE)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    run(model)
    # Forward, and once more in backward.
    assert seen == [10, 10, 6] * 2
    seen.clear()
    model(input_ids=IDS[:1, :TILE])
    assert seen == [TILE]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo", "qwen3"])
def test_the_norms_of_hidden_states_run_in_tiles(family):
    model = tiny_model(family)
    tile_mlps(model, TILE)
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    tiled = {name for name, module in norms.items() if hasattr(module, "tile_tokens")}
    assert tiled == {name for name in norms if "attn." not in name} and len(tiled) >= 5


def adapted(model):
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.mark.parametrize("before", [True, False], ids=["tiled before", "tiled after"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "checkpointing"])
def test_lora_inside_the_mlp(before, checkpointing):
    expected = run(adapted(tiny_model()))
    model = tiny_model()
    if before:
        tile_mlps(model, TILE)
    model = adapted(model)
    if not before:
        tile_mlps(base_model(model), TILE)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    assert_same(run(model), expected)


def test_frozen_weights_below_get_no_gradient():
    """With an adapter in the attention alone, hidden states have gradients and the MLPs' weights none."""
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), config)
    expected = run(model)
    tile_mlps(base_model(model), TILE)
    assert_same(run(model), expected)


def test_autocast():
    model = tiny_model()
    expected, dtypes = run(model, autocast=True), []
    tile_mlps(model, TILE)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    assert_same(run(model, autocast=True), expected, rtol=2e-2)
    assert dtypes == [torch.bfloat16] * 6


def test_dropout_inside_the_mlp_falls_alike_in_both_passes():
    """In float64 the gradient is that of finite differences, the dropout's mask the same in every call."""
    model = tiny_model("gpt2", resid_pdrop=0.5).double().train()
    tile_mlps(model, 2)
    mlp = model.transformer.h[0].mlp
    hidden = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(0)
        return mlp(x)

    assert torch.autograd.gradcheck(call, (hidden,))
    before = torch.get_rng_state()
    out = mlp(hidden)
    state = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(state, before)


def test_weights_gradients_are_summed_in_float32():
    """In bfloat16 many tiles lose no more than one does."""
    torch.manual_seed(0)
    model = tiny_model().bfloat16()
    mlp = model.model.layers[0].mlp
    hidden, grad = torch.randn(2, 1, 4096, 32, dtype=torch.bfloat16)

    def gradient():
        mlp.zero_grad()
        mlp(hidden).backward(grad)
        return mlp.up_proj.weight.grad.double()

    whole = gradient()
    tile_mlps(model, 16)
    tiled = gradient()
    exact_mlp = copy.deepcopy(mlp).double()
    exact_mlp.zero_grad()
    exact_mlp(hidden.double()).backward(grad.double())
    exact = exact_mlp.up_proj.weight.grad
    assert (tiled - exact).norm() < 2 * (whole - exact).norm()


def test_a_copy_of_the_model_runs_its_own_weights():
    model = tiny_model()
    tile_mlps(model, TILE)
    twin = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data.zero_()
    _, gradients = run(twin)
    assert all(gradients[name].norm() > 0 for name, _ in twin.named_parameters() if "mlp" in name)


def test_twice_is_once():
    model = tiny_model()
    expected = run(model)
    tile_mlps(model, 5)
    tile_mlps(model, TILE)
    assert_same(run(model), expected)


# ---- models with other MLPs


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", EXPERTS),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("mamba", {}),
    ],
)
def test_none_that_can_be_tiled(family, changes):
    model = tiny_model(family, **changes)
    with pytest.raises(ValueError, match=f"tiled_mlp=10: {type(model).__name__} has no MLP that can be tiled"):
        tile_mlps(model, TILE)


def test_experts_are_left_alone_beside_mlps(caplog):
    model = tiny_model("qwen3_moe", **EXPERTS, mlp_only_layers=[0])
    expected = run(model)
    assert tile_mlps(model, TILE) == 1
    assert "1 of 2 MLPs are mixtures of experts" in caplog.text
    assert_same(run(model), expected)


# ---- memory


def peak_of(name, tokens, tile):
    """Peak bytes of forward and backward of a layer's wide MLP or norm, beyond its weights' gradients."""
    model = tiny_model(num_hidden_layers=1, intermediate_size=1024).bfloat16()
    if tile:
        tile_mlps(model, tile)
    module = model.model.layers[0].get_submodule(name)
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    hidden = torch.randn(1, tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    return measure_peak(lambda: module(hidden).sum().backward()).peak_bytes


@pytest.mark.parametrize("name, less", [("mlp", 1 / 10), ("post_attention_layernorm", 1 / 2)])
def test_the_peak_does_not_grow_with_length(name, less):
    """But for the hidden states themselves and their gradient, 2 · 32 bytes a token and tensor."""
    short, long = peak_of(name, 2048, 512), peak_of(name, 8192, 512)
    assert long - short < 5 * 6144 * 2 * 32
    whole = peak_of(name, 8192, None)
    assert long < whole * less
