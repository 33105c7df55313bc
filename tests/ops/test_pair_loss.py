"""Tests pair_loss in PyTorch, the kernels' specification: against the DPO losses and numerical derivatives."""

import pytest
import torch

from support.losses import PairProblem, pair_problem
from trl_fast.losses.dpo import PAIR_LOSSES, DPOLossConfig, PreferencePairs
from trl_fast.ops import pair_loss, supports
from trl_fast.ops.pair_formulas import PAIR_FORMULAS

NUMBERS = {"beta": 0.3, "label_smoothing": 0.15, "discopop_tau": 0.4}
SHORT = (5, 3, 0, 2, 4, 1)


@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_equals_the_loss_of_the_trainer(loss_type):
    arguments = pair_problem(SHORT).arguments(torch.float64)
    losses, sequence_logprobs = pair_loss(*arguments, loss_type=loss_type, **NUMBERS)

    logprobs, cu_seqlens, ref_logprobs, lengths = arguments
    sums = torch.stack([part.sum() for part in logprobs.split(cu_seqlens.diff().tolist())])
    pairs = PreferencePairs.from_sequences(
        sums, ref_logprobs, sums - ref_logprobs, lengths, mean_chosen_token_logprob=torch.zeros(())
    )
    expected = PAIR_LOSSES[loss_type](pairs, DPOLossConfig(loss_type, **NUMBERS))
    torch.testing.assert_close(sequence_logprobs, sums)
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses.mean(), logprobs)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), logprobs)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_gradients_of_both_outputs(loss_type):
    logprobs, *rest = pair_problem(SHORT).arguments(torch.float64)
    assert torch.autograd.gradcheck(lambda x: pair_loss(x, *rest, loss_type=loss_type, **NUMBERS), logprobs)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_log_ratios_of_ten_thousand_stay_finite(loss_type, sign):
    logprobs = torch.tensor([sign * 1e4, -sign * 1e4], requires_grad=True)
    arguments = (torch.tensor([0, 1, 2]), torch.zeros(2), torch.ones(2, dtype=torch.int64))
    losses, _ = pair_loss(logprobs, *arguments, loss_type=loss_type, label_smoothing=0.15)
    losses.sum().backward()
    assert losses.isfinite().all() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 3), (2, 1)], ids=str)
def test_sizes(lengths):
    problem = pair_problem(lengths)
    problem.lengths = torch.tensor(lengths, dtype=torch.int64)
    arguments = problem.arguments()
    losses, sequence_logprobs = pair_loss(*arguments, loss_type="ipo")
    assert losses.shape == (len(lengths) // 2,) and sequence_logprobs.shape == (len(lengths),)
    losses.sum().backward()
    assert arguments[0].grad.shape == (sum(lengths),) and arguments[0].grad.isfinite().all()


def test_the_reference_gets_no_gradient():
    logprobs, cu_seqlens, ref_logprobs, lengths = pair_problem(SHORT).arguments()
    ref_logprobs.requires_grad_()
    pair_loss(logprobs, cu_seqlens, ref_logprobs, lengths).losses.sum().backward()
    assert ref_logprobs.grad is None and logprobs.grad is not None
    with torch.no_grad():
        assert not pair_loss(logprobs, cu_seqlens, ref_logprobs, lengths).losses.requires_grad


def test_backends():
    assert supports("pair_loss", "triton", "cuda", torch.float32).ok
    assert "float32" in supports("pair_loss", "triton", "cuda", torch.bfloat16).reason
    assert "no C++ kernel" in supports("pair_loss", "cpp", "cpu", torch.float32).reason
    with pytest.raises(RuntimeError, match="'triton' was forced for pair_loss.*CUDA"):
        pair_loss(*pair_problem(SHORT).arguments(), backend="triton")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("logprobs", torch.zeros(15, 1), r"logprobs: expected shape \(N,\), got shape \(15, 1\)"),
        ("logprobs", torch.zeros(15).bfloat16(), "logprobs: expected torch.float32, got torch.bfloat16"),
        ("ref_logprobs", torch.zeros(5), "ref_logprobs: expected an even number of sequences, two a pair, got 5"),
        ("ref_logprobs", torch.zeros(2, 3), r"ref_logprobs: expected shape \(6,\), got shape \(2, 3\)"),
        ("ref_logprobs", torch.zeros(6).double(), "ref_logprobs: expected torch.float32, got torch.float64"),
        ("lengths", torch.ones(6), "lengths: expected torch.int64, got torch.float32"),
        ("lengths", torch.ones(6, dtype=torch.int64, device="meta"), "lengths: expected device cpu.*got meta"),
        ("cu_seqlens", torch.zeros(6, dtype=torch.int64), r"cu_seqlens: expected shape \(7,\), got shape \(6,\)"),
        ("cu_seqlens", torch.tensor([0, 1, 2, 3, 4, 5, 6]), "cu_seqlens: expected numbers .* from 0 to the 15 .* 6"),
        ("cu_seqlens", torch.tensor([0, 5, 4, 8, 10, 14, 15]), "cu_seqlens: expected numbers that never fall"),
    ],
)
def test_bad_tensors(field, value, message):
    problem = PairProblem(**{**vars(pair_problem(SHORT)), field: value})
    with pytest.raises(ValueError, match=message):
        pair_loss(*vars(problem).values())


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"loss_type": "aot"}, "loss_type: unknown name 'aot'; expected one of sigmoid, "),
        ({"beta": -0.1}, "beta=-0.1: expected a positive number"),
        ({"loss_type": "ipo", "beta": 0.0}, "beta=0.0: expected a positive number"),
        ({"label_smoothing": 2.0}, r"label_smoothing=2.0: expected a number in \[0, 1\]"),
        ({"loss_type": "exo_pair"}, r"label_smoothing=0.0: expected a number in \(0, 1\)"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau=0.0: expected a positive number"),
    ],
)
def test_bad_parameters(keywords, message):
    with pytest.raises(ValueError, match=message):
        pair_loss(*pair_problem(SHORT).arguments(), **keywords)
