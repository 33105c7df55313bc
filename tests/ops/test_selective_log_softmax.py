"""The selective ops on every backend against log_softmax in float64."""

from __future__ import annotations

import pytest
import torch

from support.heads import DTYPES, FLOOR, assert_as_good, error, scores_from_logits
from trl_fast.ops import selective_log_softmax, selective_log_softmax_and_entropy
from trl_fast.ops.head.row_statistics import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS
from trl_fast.ops.selective_log_softmax import _selective_scores, _selective_scores_backward


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(5, 700), (2, 3, 129), (0, 40), (1, 1), (40,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, shape, temperature, backend):
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    index = torch.randint(0, shape[-1], shape[:-1])
    logprobs, entropy = selective_log_softmax_and_entropy(logits, index, temperature=temperature, backend=backend)
    alone = selective_log_softmax(logits, index, temperature=temperature, backend=backend)
    assert logprobs.shape == index.shape and logprobs.dtype == torch.float32
    assert torch.equal(alone, logprobs)

    def plain(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return scores_from_logits(x.reshape(-1, shape[-1]) / temperature, index.reshape(-1))

    exact, baseline = plain(logits.double()), plain(logits.float())
    floor = FLOOR[torch.float32]
    assert_as_good(logprobs.reshape(-1), baseline["logprobs"], exact["logprobs"], "logprobs", floor)
    assert_as_good(entropy.reshape(-1), baseline["entropy"], exact["entropy"], "entropy", floor)

    def gradient(lp: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(lp.square().sum() + h.sum(), logits, retain_graph=True)[0]

    ours = gradient(logprobs, entropy)
    assert ours.shape == logits.shape and ours.dtype == dtype
    assert_as_good(
        ours,
        gradient(baseline["logprobs"], baseline["entropy"]),
        gradient(exact["logprobs"], exact["entropy"]),
        "gradient",
        10 * FLOOR[dtype],
    )


def test_strided_inputs_and_retained_graph(backend):
    torch.manual_seed(0)
    logits = torch.randn(300, 6).t().requires_grad_()
    index = torch.randint(0, 300, (6, 2))[:, 1]
    assert not index.is_contiguous()
    total = selective_log_softmax(logits, index, backend=backend).sum()
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    (second,) = torch.autograd.grad(total, logits)
    (true,) = torch.autograd.grad(logits.double().log_softmax(-1).gather(1, index[:, None]).sum(), logits)
    assert torch.equal(first, second) and error(first, true) < 1e-6


def test_the_callers_logits_stay_as_they_are(backend):
    torch.manual_seed(0)
    logits = torch.randn(4, 100, requires_grad=True)
    before = logits.detach().clone()
    selective_log_softmax(logits, torch.zeros(4, dtype=torch.long), backend=backend).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_opcheck(backend):
    if backend == "triton":
        pytest.skip("the interpreter reads pointers, which fake tensors do not have; the same op is checked on cpp")
    logits, index = torch.randn(4, 20, requires_grad=True), torch.tensor([1, 2, 3, 0])
    outputs = ENTROPY | LOG_SUM_SQ_PROBS | MEAN_LOGITS | IS_TOP1
    torch.library.opcheck(_selective_scores, (logits, index, 0.5, outputs, backend))
    torch.library.opcheck(
        _selective_scores_backward, (logits.detach(), index, torch.zeros(4), torch.ones(4, 4), 0.5, backend)
    )


@pytest.mark.parametrize("shape, several", [((5, 300), 3), ((2, 3, 129), 4), ((0, 40), 2), ((3, 7), 1)], ids=str)
def test_several_tokens_a_row(shape, several, backend):
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape)).requires_grad_()
    index = torch.randint(0, shape[-1], (*shape[:-1], several))
    weights = torch.randn(index.shape)
    ours = selective_log_softmax(logits, index, 0.7, backend=backend)
    exact, baseline = (
        (logits.to(dtype) / 0.7).log_softmax(-1).gather(-1, index) for dtype in (torch.double, logits.dtype)
    )
    assert ours.shape == index.shape and ours.dtype == torch.float32
    assert_as_good(ours, baseline, exact, "logprobs", FLOOR[torch.float32])
    gradients = [
        torch.autograd.grad((values * weights).sum(), logits, retain_graph=True)[0]
        for values in (ours, baseline, exact)
    ]
    assert_as_good(*gradients, "gradient", 10 * FLOOR[torch.float32])
    alone = [selective_log_softmax(logits, column, 0.7, backend=backend) for column in index.movedim(-1, 0)]
    assert torch.allclose(ours, torch.stack(alone, -1), atol=1e-6)


@pytest.mark.parametrize("several", [None, 2])
def test_rows_that_are_masked(several, backend):
    torch.manual_seed(0)
    logits = torch.randn(4, 30, requires_grad=True)
    index = torch.randint(0, 30, (4,) if several is None else (4, several))
    mask = (torch.arange(4) % 2).view(-1, *[1] * (index.dim() - 1)).expand_as(index)
    outside = index.where(mask == 1, -100)
    whole = selective_log_softmax(logits, index, backend=backend)
    masked = selective_log_softmax(logits, outside, row_mask=mask, backend=backend)
    assert torch.equal(masked, whole * mask)
    (gradient,) = torch.autograd.grad(masked.sum(), logits)
    assert not gradient[::2].any() and gradient[1::2].any()
    if several is None:
        both = selective_log_softmax_and_entropy(logits, outside, False, row_mask=mask, backend=backend)
        assert torch.equal(both[0], masked) and not both[1].requires_grad
        assert not both[1][::2].any() and both[1][1::2].all()
    with pytest.raises(ValueError, match=r"row_mask: shape \(3,\), expected that of index"):
        selective_log_softmax(logits, index, row_mask=torch.ones(3), backend=backend)


def test_values_are_trls():
    from trl.trainer import utils

    torch.manual_seed(0)
    logits, index = torch.randn(2, 5, 40), torch.randint(0, 40, (2, 5))
    mask = torch.randint(0, 2, (2, 5))
    for arguments in ((index, 0.8), (index, 0.8, mask), (torch.randint(0, 40, (2, 5, 3)), 0.8)):
        expected = utils.selective_log_softmax(logits, *arguments)
        assert torch.allclose(selective_log_softmax(logits, *arguments), expected, atol=1e-6)
    expected = utils.selective_log_softmax_and_entropy(logits, index, False, 0.8, mask)
    ours = selective_log_softmax_and_entropy(logits, index, False, 0.8, mask)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, expected, strict=True))
