"""Results that have no gradient, or get none: no zeros are filled for them in backward."""

import pytest
import torch

from support.layer_errors import draw
from support.seen_operators import SeenOperators
from trl_fast.ops.layers import (
    Adapter,
    joint_linear,
    lora_linear,
    norm_and_residual,
    qk_norm_rotary,
    residual_rms_norm,
    rms_norm,
)


def turned(query, key, weight):
    angles = torch.ones(1, 5, 8)
    return qk_norm_rotary(query, key, weight, weight, 1e-6, angles, angles)


def with_adapters(x, first, second, a, b):
    return joint_linear(x, (first, second), (None, None), (Adapter(a, b, 1.5), None))


OPS = {
    "rms_norm": (lambda x, w: [rms_norm(x, w, 1e-6)], [(5, 8), (8,)]),
    "norm_and_residual": (lambda x, w: norm_and_residual(x, w, 1e-6), [(5, 8), (8,)]),
    "residual_rms_norm": (lambda x, r, w: residual_rms_norm(x, r, w, 1e-6), [(5, 8), (5, 8), (8,)]),
    "qk_norm_rotary": (turned, [(1, 2, 5, 8), (1, 2, 5, 8), (8,)]),
    "lora_linear": (lambda x, w, a, b: [lora_linear(x, w, None, a, b, 1.0)], [(5, 8), (6, 8), (2, 8), (6, 2)]),
    "joint_linear with adapters": (with_adapters, [(5, 8), (6, 8), (3, 8), (2, 8), (6, 2)]),
    "joint_linear": (lambda x, v, w: joint_linear(x, (v, w), (None, None)), [(5, 8), (6, 8), (3, 8)]),
}


@pytest.mark.parametrize("name", OPS)
def test_no_zeros_are_filled(name):
    op, shapes = OPS[name]
    results = op(*(draw(*shape, seed=i) for i, shape in enumerate(shapes)))
    grads = [torch.ones_like(result) for result in results]
    with SeenOperators() as seen:
        torch.autograd.backward(results, grads)
    assert seen.names and not [each for each in seen.names if "zeros" in each or "fill" in each]


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("rms_norm", "lora_linear")])
@pytest.mark.parametrize("left_out", [0, 1])
def test_a_result_that_nothing_follows(name, left_out):
    """Gradients are those of a result whose gradient is zero."""
    op, shapes = OPS[name]
    given = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    results = op(*given)
    used = results[1 - left_out]
    grad = draw(*used.shape, seed=9).detach()
    got = torch.autograd.grad([used], given, [grad], retain_graph=True, materialize_grads=True)
    zeros = torch.zeros_like(results[left_out])
    expected = torch.autograd.grad([used, results[left_out]], given, [grad, zeros])
    torch.testing.assert_close(got, expected)
