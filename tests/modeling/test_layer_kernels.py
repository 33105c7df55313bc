"""Kernels of other packages: found or not with a reason, and run with the states of segments where they are."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.olmo_hybrid import modeling_olmo_hybrid

from support.families import WITH_STATES
from support.models import tiny_config, tiny_model
from trl_fast.data.segments import num_tokens
from trl_fast.modeling import layer_kernels
from trl_fast.modeling.layer_kernels import CONVOLUTION, DELTA_RULE, KIMI_DELTA_RULE, MAMBA2
from trl_fast.modeling.recurrent_layers import (
    recurrent_layers_of,
    warn_of_missing_kernels,
    warn_of_unread_adapters,
)
from trl_fast.modeling.segment_attention import use_segment_attention

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}
# The second one: a single token goes on from a state, which would be a step of generation.
ROWS = (((20, 3, 5), (9, 30), (4,), (3, (4, (2, 0, 1)), (7, 1, 2)), (1, 1, 2)), ((9, 1),))


@pytest.fixture
def versions(monkeypatch):
    """The versions of installed packages, which a test may change."""
    found = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(layer_kernels.importlib.metadata, "version", version)
    return found


@pytest.fixture
def install(monkeypatch):
    """Puts a function into a package that is none, by its full name."""

    def put(path, function):
        *parents, name = path.split(".")
        module = None
        for depth in range(1, len(parents) + 1):
            full = ".".join(parents[:depth])
            child = sys.modules.get(full) or types.ModuleType(full)
            monkeypatch.setitem(sys.modules, full, child)
            if module is not None:
                setattr(module, parents[depth - 1], child)
            module = child
        setattr(module, name, function)

    return put


def test_a_package_that_is_missing_old_broken_or_fit(versions, install, monkeypatch):
    assert CONVOLUTION.fitness() == (False, "causal-conv1d is not installed")
    versions["causal-conv1d"] = "1.1.0"
    assert CONVOLUTION.fitness() == (False, "causal-conv1d 1.1.0 is too old: pip install 'causal-conv1d>=1.2.0'")
    versions["causal-conv1d"] = "1.6.0"
    install("causal_conv1d.causal_conv1d_fn", len)
    assert CONVOLUTION.fitness() == (True, "causal-conv1d 1.6.0")
    versions["fla-core"] = "0.3.2"
    install("fla.ops.gated_delta_rule.chunk_gated_delta_rule", len)
    assert DELTA_RULE.fitness() == (True, "fla-core 0.3.2")
    assert KIMI_DELTA_RULE.fitness()[1].startswith("fla-core 0.3.2 is too old")
    versions["mamba-ssm"] = "2.3.1"
    monkeypatch.setattr(layer_kernels.importlib, "import_module", lambda name: torch.ops.load_library("/none.so"))
    ok, reason = MAMBA2.fitness()
    assert not ok and reason.startswith("mamba-ssm 2.3.1 does not load (OSError: Could not load this library")


def test_a_function_that_is_gone(versions, install):
    versions["mamba-ssm"] = "9.0"
    install("mamba_ssm.ops.triton.ssd_combined.something_else", len)
    assert "has no mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined" in MAMBA2.fitness()[1]


def test_what_a_model_lacks_is_said_in_one_line(versions, install, caplog):
    model = tiny_model("olmo_hybrid", **WITH_STATES["olmo_hybrid"])
    versions["causal-conv1d"] = "1.6.0"
    install("causal_conv1d.causal_conv1d_fn", len)
    warn_of_missing_kernels(model)
    assert [record.message for record in caplog.records] == [
        "OlmoHybridForCausalLM computes in transformers' PyTorch code, not in kernels: the gated delta rule "
        "(flash-linear-attention is not installed)."
    ]
    caplog.clear()
    warn_of_missing_kernels(tiny_model("llama"))
    assert not caplog.records


def test_adapters_that_kernels_do_not_read_are_named(versions, install, caplog):
    def adapted(*targets):
        model = tiny_model("bamba", **WITH_STATES["bamba"])
        return get_peft_model(model, LoraConfig(target_modules=[*targets])).base_model.model

    warn_of_unread_adapters(adapted("in_proj", "out_proj"))  # transformers' own code reads all modules
    versions["mamba-ssm"] = "2.3.1"
    install("mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined", len)
    warn_of_unread_adapters(adapted("in_proj"))
    assert not caplog.records
    warn_of_unread_adapters(adapted("in_proj", "out_proj"))
    (record,) = caplog.records
    assert record.message.startswith("Adapters of BambaMixer.out_proj have no effect in training")


def run_layer(model, trees):
    """A recurrent layer's outputs on a row of trees, and the gradients of its parameters and inputs."""
    use_segment_attention(model)
    layer = next(iter(recurrent_layers_of(model).values()))
    torch.manual_seed(0)
    hidden = torch.randn(1, sum(map(num_tokens, trees)), model.config.hidden_size, requires_grad=True)
    out = layer(hidden, tree_lengths=trees)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), [hidden, *layer.parameters()], allow_unused=True)


def refuse(*args, **kwargs):
    raise AssertionError("a step of generation changes states in place and has no gradient")


STAND_INS = {
    "olmo_hybrid": (
        modeling_olmo_hybrid,
        WITH_STATES["olmo_hybrid"],
        {
            "causal_conv1d.causal_conv1d_fn": modeling_olmo_hybrid.causal_conv1d_fn,
            "causal_conv1d.causal_conv1d_update": refuse,
            "fla.ops.gated_delta_rule.chunk_gated_delta_rule": modeling_olmo_hybrid.torch_chunk_gated_delta_rule,
            "fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule": refuse,
        },
        "initial_state",
    ),
    "falcon_h1": (
        modeling_falcon_h1,
        MAMBA,
        {
            "causal_conv1d.causal_conv1d_fn": modeling_falcon_h1.causal_conv1d_fn,
            "causal_conv1d.causal_conv1d_update": refuse,
            "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined": modeling_falcon_h1.mamba2_chunk_scan,
            "mamba_ssm.ops.triton.selective_state_update.selective_state_update": refuse,
        },
        "initial_states",
    ),
}


@pytest.mark.parametrize("family", STAND_INS)
def test_installed_kernels_get_the_states_of_segments(family, install, monkeypatch):
    """transformers takes kernels when its code is loaded, so that it is loaded once more, with stand-ins in place."""
    modeling, values, functions, keyword = STAND_INS[family]
    plain = tiny_model(family, **values).eval()
    expected = [run_layer(plain, trees) for trees in ROWS]
    calls = []

    def noted(path, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls.append((path, kwargs))
            return function(*args, **kwargs)

        return call

    for path, function in functions.items():
        install(path, noted(path, function))
    spec = importlib.util.spec_from_file_location(f"{modeling.__name__}_with_kernels", modeling.__file__)
    with_kernels = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, with_kernels)
    spec.loader.exec_module(with_kernels)
    model_class = getattr(with_kernels, type(plain).__name__)
    torch.manual_seed(0)
    model = model_class(tiny_config(family, **values)).float().eval()
    for trees, tensors in zip(ROWS, expected, strict=True):
        for tensor, other in zip(run_layer(model, trees), tensors, strict=True):
            assert other is None or torch.equal(tensor, other)
    states = [kwargs[keyword] for path, kwargs in calls if keyword in kwargs]
    given = [state for state in states if state is not None]
    assert given and len(given) < len(states) and all(state.requires_grad for state in given)
    assert {path for path, _ in calls} == {path for path, function in functions.items() if function is not refuse}
