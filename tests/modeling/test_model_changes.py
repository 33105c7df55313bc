"""Every change of a model is on its list once, and undoing it gives the very model of before, bit for bit."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from support.models import tiny_classifier, tiny_model
from trl_fast.data.packing import pack_trees
from trl_fast.modeling import upcast_linear_layers as upcasting
from trl_fast.modeling.activation_offloading import OFFLOADING, offload_activations
from trl_fast.modeling.checkpointing import enable_checkpointing
from trl_fast.modeling.classifier_head import CLASSIFIER_HEAD, attach_classifier_head
from trl_fast.modeling.lm_head import FLOAT32_HEAD, use_float32_head
from trl_fast.modeling.loading import disable_dropout
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.scoring import SCORING, attach_scoring, give_up_fused_head, score
from trl_fast.modeling.segment_attention import SEGMENTS, use_segment_attention
from trl_fast.modeling.selective_checkpointing import SELECTIVE_CHECKPOINTING, set_selective_checkpointing
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.modeling.upcast_linear_layers import UPCAST, upcast_linear_layers
from trl_fast.ops.device import device_facts

REQUIRES_GRADS = "make_inputs_require_grads"
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def language_model():
    return tiny_model("qwen2", attention_dropout=0.25).bfloat16()


# A model, what changes it, and the names of the changes.
CHANGES = {
    "scoring": (language_model, attach_scoring, (UPCAST, SCORING)),
    "capped scores": (
        lambda: tiny_model("gemma2", attn_logit_softcapping=0.5),
        attach_scoring,
        (UPCAST, "capped scores", SCORING),
    ),
    "classifier head": (lambda: tiny_classifier("llama"), attach_classifier_head, (UPCAST, CLASSIFIER_HEAD)),
    "segment attention": (language_model, use_segment_attention, (SEGMENTS,)),
    "selective checkpointing": (
        language_model,
        lambda model: set_selective_checkpointing(model, 1 << 20),
        (SELECTIVE_CHECKPOINTING,),
    ),
    "tiled layers": (language_model, lambda model: tile_mlps(model, 2), ("tiled layers",)),
    "offloading": (language_model, offload_activations, (OFFLOADING,)),
    "float32 head": (language_model, use_float32_head, (FLOAT32_HEAD,)),
    "dropout": (language_model, disable_dropout, ("dropout",)),
    "upcast": (language_model, upcast_linear_layers, (UPCAST,)),
}
every_change = pytest.mark.parametrize("how", CHANGES.values(), ids=CHANGES.keys())


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """One with a GPU, on whose CPU 16-bit products are slow, and transformers as version 5.17 declares Gemma 2."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    slow = replace(device_facts(torch.device("cpu")), multiplies_bf16=False)
    monkeypatch.setattr(upcasting, "device_facts", lambda device: slow)
    monkeypatch.setattr("trl_fast.ops.linear.product_dtype", lambda dtype, device: torch.float32)


def hooks_of(module):
    """A module's hooks but the one that transformers puts on embeddings whenever checkpointing is switched on."""
    kinds = [value for key, value in vars(module).items() if isinstance(value, dict) and "hooks" in key]
    return [hook for kind in kinds for hook in kind.values() if getattr(hook, "__name__", "") != REQUIRES_GRADS]


def anatomy(model):
    """All that a change may touch: attributes, classes, hooks, dtypes and values, by the modules' own identity."""
    found = {}
    for name, module in model.named_modules():
        own = {
            key: value
            for key, value in vars(module).items()
            if key not in ("trl_fast_changes", "_parameters", "_buffers", "_modules")
        }
        hooks = hooks_of(module)
        plain = {key: value for key, value in own.items() if not key.startswith("_")}
        found[name] = (type(module), hooks, plain, type(module).forward, module.forward)
    weights = {name: (weight.dtype, weight.detach().clone()) for name, weight in model.named_parameters()}
    return found, weights, model.config._attn_implementation, model._set_gradient_checkpointing


def assert_same(model, before):
    (found, weights, attention, checkpointing), now = before, anatomy(model)
    assert found == now[0] and attention == now[2] and checkpointing == now[3]
    assert weights.keys() == now[1].keys()
    for name, (dtype, weight) in weights.items():
        assert now[1][name][0] == dtype and torch.equal(now[1][name][1], weight)


def run(model):
    """Logits, and the gradients of their sum; dropout draws the same numbers every time."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().sum().backward()
    return logits.detach(), {name: weight.grad for name, weight in model.named_parameters()}


@every_change
def test_listed_once_and_undone(how):
    build, change, names = how
    model = build()
    before = anatomy(model)
    # SDPA, which capped scores are taken from, cannot compute them in the transformers that is installed.
    logits, gradients = (None, {}) if "capped scores" in names else run(model)
    assert len(changes_of(model)) == 0
    change(model)
    assert changes_of(model).names == names
    assert all(f"{name}: " in str(changes_of(model)) for name in names)
    changed = anatomy(model)
    change(model)
    assert changes_of(model).names == names
    assert_same(model, changed)
    with pytest.raises(AssertionError):
        assert_same(model, before)
    if OFFLOADING not in names:
        run(model)
    changes_of(model).undo_all()
    assert changes_of(model).names == ()
    assert_same(model, before)
    if logits is not None:
        now = run(model)
        assert torch.equal(now[0], logits)
        assert all(torch.equal(now[1][name], gradient) for name, gradient in gradients.items() if gradient is not None)
    # And it can be made again.
    change(model)
    assert changes_of(model).names == names


def make_all(model):
    attach_scoring(model)
    use_segment_attention(model)
    disable_dropout(model)
    set_selective_checkpointing(model, None)
    enable_checkpointing(model, {"use_reentrant": False})
    tile_mlps(model, 2)
    use_float32_head(model)
    return model


@pytest.mark.parametrize("backwards", [False, True])
def test_any_order(backwards):
    model = language_model()
    enable_checkpointing(model, {"use_reentrant": False})
    before = anatomy(model)
    functions = [m._gradient_checkpointing_func for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    logits, _ = run(model)
    make_all(model)
    names = changes_of(model).names
    assert names == (UPCAST, SCORING, SEGMENTS, "dropout", SELECTIVE_CHECKPOINTING, "tiled layers", FLOAT32_HEAD)
    for number, name in enumerate(reversed(names) if backwards else names, 1):
        changes_of(model).undo(name)
        assert name not in changes_of(model) and len(changes_of(model)) == len(names) - number
    assert_same(model, before)
    now = [m._gradient_checkpointing_func for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert [(f.func, f.keywords) for f in now] == [(f.func, f.keywords) for f in functions]
    assert torch.equal(run(model)[0], logits)


def test_a_copy_has_a_list_of_its_own(trees):
    model = make_all(language_model())
    batch = pack_trees(trees, "shared_prefix", 0)
    expected = score(model, batch).tokens.logprobs
    twin = copy.deepcopy(model)
    assert changes_of(twin) is not changes_of(model) and changes_of(twin).names == changes_of(model).names
    changed, hidden = anatomy(model), twin.model.layers[0].mlp.up_proj
    changes_of(twin).undo_all()
    assert_same(model, changed)
    assert torch.equal(score(model, batch).tokens.logprobs, expected)
    assert_modules_are_plain(twin)
    assert hidden is twin.model.layers[0].mlp.up_proj and "forward" not in vars(hidden)
    assert not hasattr(score(twin, batch), "tokens")


def assert_modules_are_plain(model):
    plain = language_model()
    for (name, module), other in zip(model.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(other), name
        assert "forward" not in vars(module) and not hooks_of(module), name


def test_a_changed_model_is_saved_as_it_would_be(tmp_path):
    model = language_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attach_scoring(model)
    tile_mlps(model, 2)
    set_selective_checkpointing(model, None)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_the_model_under_an_adapter_has_the_list():
    model = language_model()
    attach_scoring(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert changes_of(adapted) is changes_of(model)
    changes_of(adapted).undo_all()
    assert "forward" not in vars(model)
    assert not any(hasattr(module, "plain_forward") for module in adapted.modules())


def test_what_was_put_on_top_comes_off_first():
    model = language_model()
    attach_scoring(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="'scoring forward' cannot be undone: forward of Qwen2ForCausalLM has been"):
        changes_of(model).undo(SCORING)
    assert SCORING in changes_of(model)
    model.forward = ours
    changes_of(model).undo(SCORING)
    with pytest.raises(KeyError, match=f"is no change of this model; it has {UPCAST}"):
        changes_of(model).undo(SCORING)


def test_a_layer_with_something_on_top_stays_as_it_is():
    model = language_model()
    upcast_linear_layers(model)
    layer = model.model.layers[0].mlp.up_proj
    ours = layer.forward
    layer.forward = lambda x: ours(x)
    with pytest.raises(RuntimeError, match="linear layer has been changed since"):
        changes_of(model).undo(UPCAST)
    layer.forward = ours
    changes_of(model).undo(UPCAST)
    assert "forward" not in vars(layer)


def test_values_that_are_ours_may_have_changed():
    model = language_model()
    attach_scoring(model)
    give_up_fused_head(model, "it is told to")
    tile_mlps(model, 2)
    tile_mlps(model, 4)
    assert model.model.layers[0].mlp.tile_tokens == 4
    changes_of(model).undo_all()
    assert not hasattr(model, "trl_fast_fused_head") and not hasattr(model.model.layers[0].mlp, "tile_tokens")


def test_an_attention_that_was_chosen_since_stays():
    model = language_model()
    use_segment_attention(model)
    model.set_attn_implementation("eager")
    changes_of(model).undo_all()
    assert model.config._attn_implementation == "eager"


def test_an_unchanged_model_is_pickled():
    model = language_model()
    attach_scoring(model)
    changes_of(model).undo_all()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(again)[0], run(model)[0])
