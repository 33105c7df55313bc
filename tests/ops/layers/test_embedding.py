"""Embeddings: PyTorch's rows and gradients, each written once."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw
from trl_fast.ops.backends import BACKENDS as BACKENDS_OF_OPS
from trl_fast.ops.backends import supports
from trl_fast.ops.device import DeviceFacts, device_facts, simulated_device
from trl_fast.ops.layers import embedding
from trl_fast.ops.layers.embedding import _ADD, _SUM, rows_and_ids

# Rows of the weight, its width, and the shape of tokens.
CASES = [(11, 20, (3, 7)), (1, 5, (4,)), (9, 16, (0,)), (9, 16, (2, 0)), (300, 33, (2, 2, 90)), (7, 1, ())]


def tokens(vocabulary, shape, dtype=torch.int64):
    """Returns tokens of which some are frequent and some are none."""
    drawn = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return torch.where(drawn % 3 == 0, drawn // 2, drawn).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_pytorch(case, dtype, padding_idx, backend):
    vocabulary, width, shape = case
    ids = tokens(vocabulary, shape)
    check_errors(
        lambda w: embedding(ids, w, padding_idx, backend=backend),
        *(lambda w: F.embedding(ids, w, padding_idx),) * 2,
        (draw(vocabulary, width, dtype=dtype),),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_strided_tokens_weights_and_gradients(index_dtype, backend):
    ids = tokens(11, (7, 3), index_dtype).t()
    weight = draw(20, 11)
    outs = [f(ids, weight.t()).transpose(0, 1).transpose(1, 2) for f in (embedding, F.embedding)]
    grads = [torch.autograd.grad(out, weight, draw(*out.shape, seed=3))[0] for out in outs]
    assert torch.equal(*outs)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_the_same_in_every_run(backend):
    ids, weight = tokens(5, (400,)), draw(5, 33, dtype=torch.bfloat16)
    grads = [
        torch.autograd.grad(embedding(ids, weight, backend=backend), weight, draw(400, 33, dtype=torch.bfloat16))[0]
        for _ in range(3)
    ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_backward_keeps_tokens_alone():
    ids, weight = tokens(50, (3, 7)), draw(50, 20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        embedding(ids, weight)
    assert [t.data_ptr() for t in saved] == [ids.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    ids, weight = tokens(11, (3, 7)), draw(11, 20)
    torch.library.opcheck(torch.ops.trl_fast.embedding.default, (ids, weight, -1, backend))
    grad = torch.ones(3, 7, 20)
    torch.library.opcheck(torch.ops.trl_fast.embedding_backward.default, (grad, ids, 11, 2, backend))
    add = torch.ops.trl_fast.embedding_add_gradient.default
    torch.library.opcheck(add, (torch.ones(11, 20), grad, ids, -1, backend))


def test_bad_input():
    ids, weight = tokens(11, (3,)), draw(11, 20)
    with pytest.raises(ValueError, match="weight"):
        embedding(ids, weight[0])
    with pytest.raises(ValueError, match="input_ids"):
        embedding(ids.float(), weight)
    with pytest.raises(ValueError, match="padding_idx"):
        embedding(ids, weight, 11)
    with pytest.raises((IndexError, RuntimeError)):
        embedding(ids + 11, weight)


def test_a_second_derivative_is_refused():
    ids, weight = tokens(11, (3,)), draw(11, 20)
    (grad,) = torch.autograd.grad(embedding(ids, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_on_a_gpu_rows_of_padding_count_for_nothing_and_none_is_left_out():
    """How many are left would be known after a wait of the host only; a NaN of one stays out, too."""
    grad = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 4.0]])
    ids = torch.tensor([7, 2, 7])
    with simulated_device(DeviceFacts("cuda", multiplies_bf16=True)):
        rows, found = rows_and_ids(grad, ids, 2)
    assert rows.tolist() == [[1, 2], [0, 0], [3, 4]] and found.tolist() == [7, 2, 7]
    rows, found = rows_and_ids(grad, ids, 2)
    assert rows.tolist() == [[1, 2], [3, 4]] and found.tolist() == [7, 7]


def test_backends_without_a_kernel_say_so():
    """Where all that have one serve, they are those that this module has a function of."""
    with simulated_device(replace(device_facts(torch.device("cpu")), serves=lambda op, backend: True)):
        served = {name: supports("embedding", name, "cpu", torch.float32) for name in BACKENDS_OF_OPS}
    assert {name for name, support in served.items() if support.ok} == set(_SUM) == set(_ADD)
    assert served["cuda"].reason == "there is no cuda kernel of it, only in triton and cpp"
