"""create_reference_model: what is shared, what is copied, what is frozen, as in TRL."""

import pytest
import torch
from trl.experimental.utils import create_reference_model as trls

import trl_fast
from support.models import tiny_model


def describe(model, reference):
    """For each parameter: trainable in the model, trainable in the reference, the same memory."""
    return {
        name: (parameter.requires_grad, twin.requires_grad, parameter.data_ptr() == twin.data_ptr())
        for (name, parameter), twin in zip(model.named_parameters(), reference.parameters(), strict=True)
    }


@pytest.mark.parametrize(
    "arguments", [{}, {"num_shared_layers": 1}, {"num_shared_layers": 0, "pattern": "layers.{layer}"}]
)
def test_it_is_what_trl_makes(arguments):
    results = []
    for create in (trl_fast.create_reference_model, trls):
        model = tiny_model()
        reference = create(model, **arguments)
        assert not reference.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
        results.append(describe(model, reference))
    assert results[0] == results[1]
    shared = [name for name, (_, _, same) in results[0].items() if same]
    assert any("layers.0" in name for name in shared) == (arguments.get("num_shared_layers") == 1)


@pytest.mark.parametrize("pattern", [None, "blocks.{layer}"])
def test_a_pattern_that_fits_nothing_is_named(pattern):
    with pytest.raises(ValueError, match="num_shared_layers=9.*(layers|blocks).9"):
        trl_fast.create_reference_model(tiny_model(), num_shared_layers=9, pattern=pattern)
