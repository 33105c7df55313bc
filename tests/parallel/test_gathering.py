"""Sharded weights are whole where they are read: all for a generation, a module's at a time where they are sent on."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from support.models import tiny_model
from support.ranks import run_on_ranks
from trl_fast.parallel.gathering import gathered, is_sharded
from trl_fast.rollout.vllm_engine import VLLMServerEngine
from trl_fast.rollout.weights import merged_weights, weight_metadata

IDS = torch.tensor([[5, 6, 7, 8]])


def adapted(family="qwen2"):
    """A model with an adapter on layers and on the embeddings, and a saved head, none of which is as it began."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    config.init_lora_weights = False
    return get_peft_model(tiny_model(family, tie_word_embeddings=False), config)


def prepared(model):
    """The model as the engine of the environment prepares it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.1))
    return model, accelerator.unwrap_model(model)


def merged(model):
    return {name: weight.clone() for name, weight in merged_weights(model)}


class Watch:
    """Remembers how many bytes of whole weights were there at once."""

    def __init__(self):
        self._there, self.most = weakref.WeakSet(), 0

    def see(self, tensor):
        self._there.add(tensor)
        self.most = max(self.most, sum(each.numel() * each.element_size() for each in self._there))
        return tensor


def send_weights():
    """The weights that come out of a sharded model, with an adapter and without; the most bytes whole at once."""
    watch, full_tensor = Watch(), DTensor.full_tensor
    DTensor.full_tensor = lambda self, **kwargs: watch.see(full_tensor(self, **kwargs))
    found = {}
    for name, made in (("plain", tiny_model()), ("adapted", adapted())):
        wrapped, model = prepared(made)
        whole = wrapped if isinstance(wrapped, FullyShardedDataParallel) else model
        assert is_sharded(whole)
        before = [parameter.shape for parameter in model.parameters()]
        found[name] = merged(whole), weight_metadata(whole)
        assert [parameter.shape for parameter in model.parameters()] == before
    return found, watch.most


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp1", "zero3"))]
)
def test_weights_are_sent_on_a_module_at_a_time(engine):
    expected = {"plain": merged(tiny_model()), "adapted": merged(adapted())}
    for found, most in run_on_ranks(send_weights, engine=engine):
        for name, weights in expected.items():
            got, metadata = found[name]
            assert list(got) == list(weights)
            assert metadata == [(key, "float32", list(value.shape)) for key, value in weights.items()]
            for key, value in weights.items():
                torch.testing.assert_close(got[key], value, rtol=0, atol=1e-7, msg=f"{name} {key}")
        if engine == "fsdp2":
            largest = max(weight.numel() * weight.element_size() for weight in expected["plain"].values())
            assert largest <= most < 1.2 * largest


def forwards(model, count):
    with torch.no_grad():
        return [model(input_ids=IDS).logits for _ in range(count)][-1]


def gather(by_layer):
    """Logits of a model that is whole in a context, once by rank 0 and thrice by rank 1; then of the sharded one."""
    found = []
    for made in (tiny_model(), adapted()):
        wrapped, model = prepared(made)
        rank = PartialState().process_index
        with gathered(wrapped, part=model, layers=not by_layer), gathered(wrapped):
            # Whole from the start: a rank may make no forward at all.
            assert by_layer or not any(isinstance(parameter, DTensor) for parameter in model.parameters())
            found.append(forwards(model, 1 if by_layer else 1 + 2 * rank))
        found.append(forwards(wrapped, 1))
    return found


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp1", "zero3"))]
)
@pytest.mark.parametrize("by_layer", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_gathered_model_makes_forwards_alone(by_layer, engine):
    expected = [forwards(model, 1) for model in (tiny_model(), adapted()) for _ in range(2)]
    for found in run_on_ranks(lambda: gather(by_layer), engine=engine):
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def sync(fails):
    """The weights that rank 0's server was sent, or every rank's error."""
    _, model = prepared(tiny_model())
    engine, sent = object.__new__(VLLMServerEngine), {}
    engine.state, engine._metadata, engine._step = PartialState(), None, None

    def load(metadata, weights):
        name, weight = next(weights)
        if fails:
            raise ConnectionError("the server is gone")
        sent.update({name: weight.clone()} | {name: weight.clone() for name, weight in weights})

    engine.weights = SimpleNamespace(send=load)
    try:
        engine.sync_weights(model, 0)
    except ConnectionError as error:
        return str(error)
    return sent


def test_the_first_rank_sends_and_a_request_that_fails_holds_nobody_up():
    first, second = run_on_ranks(lambda: (sync(False), sync(True)), engine="fsdp2")
    expected = merged(tiny_model())
    assert list(first[0]) == list(expected) and not second[0]
    for name, weight in expected.items():
        torch.testing.assert_close(first[0][name], weight, rtol=0, atol=0)
    assert first[1] == second[1] == "the server is gone"
