"""The key of a reference's scores: all that makes it the policy that it is, and nothing else."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from support.models import tiny_model
from trl_fast.modeling.reference_cache import reference_hash
from trl_fast.modeling.reference_policy import copy_adapter_as_reference


def adapted(seed=0, **changes):
    model = tiny_model()
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": {"q_proj", "v_proj", "lm_head"}, "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(**config))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rms_norm_eps": 1e-3},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_weights_and_configuration_count(changes):
    assert reference_hash(tiny_model(**changes)) != reference_hash(tiny_model()) == reference_hash(tiny_model())


def test_the_dtype_counts_and_where_it_came_from_does_not():
    model = tiny_model()
    before = reference_hash(model)
    model.config._name_or_path = "elsewhere"
    assert reference_hash(model) == before != reference_hash(model.bfloat16())


def test_of_adapters_the_reference_counts():
    assert reference_hash(adapted()) == reference_hash(adapted(seed=1)) == reference_hash(adapted(lora_alpha=1))
    assert reference_hash(adapted(), "default") != reference_hash(adapted(seed=1), "default")
    assert reference_hash(adapted(), "default") != reference_hash(adapted(lora_alpha=1), "default")
    models = [adapted(), adapted(), adapted(seed=1)]
    for model in models:
        copy_adapter_as_reference(model)
    with torch.no_grad():
        for name, weight in models[0].named_parameters():
            weight.mul_(2 if ".default." in name else 1)
    # What the active adapter has learned since is no matter.
    first, second, third = map(reference_hash, models)
    assert first == second != third
