"""Distances of rows of probabilities over two vocabularies: values and gradients against plain autograd."""

import pytest
import torch
import torch.nn.functional as F

from trl_fast.losses.uld import SMALLEST_PROBABILITY, HybridDistance, SortedDistance, named_divergence, sorted_distance

SIZES = [(7, 7), (9, 5), (5, 9)]


def probabilities(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 2).softmax(-1)


def plain_sorted(student, teacher):
    width = max(student.shape[1], teacher.shape[1])
    ordered = [F.pad(each.sort(-1, descending=True).values, (0, width - each.shape[1])) for each in (student, teacher)]
    return (ordered[0] - ordered[1]).abs().sum(-1)


def plain_divergence(student, teacher, beta):
    p, q = (each.clamp_min(SMALLEST_PROBABILITY).log() for each in (student, teacher))
    if beta in (0, 1):
        one, other = (q, p) if beta == 0 else (p, q)
        return F.kl_div(other, one, reduction="none", log_target=True).sum(-1)
    mixture = ((1 - beta) * p.exp() + beta * q.exp()).log()
    parts = [F.kl_div(mixture, each, reduction="none", log_target=True) for each in (q, p)]
    return (beta * parts[0] + (1 - beta) * parts[1]).sum(-1)


def gradient_of(function, student):
    student = student.clone().requires_grad_()
    values = function(student)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_sorted_distance(sizes):
    student, teacher = probabilities(6, sizes[0]), probabilities(6, sizes[1], 1) * 0.7
    found = sorted_distance(student.clone(), teacher)
    torch.testing.assert_close(found, gradient_of(lambda given: plain_sorted(given, teacher), student))
    parts, gradient = SortedDistance()(student, teacher)
    assert parts.shape == (1, 6) and torch.equal(parts[0], found[0]) and torch.equal(gradient, found[1])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_of_named_tokens(beta):
    student, teacher = probabilities(6, 8) * 0.6, probabilities(6, 8, 1)
    student[0, 0] = teacher[1, 1] = SMALLEST_PROBABILITY / 4
    found = named_divergence(student, teacher, beta)
    torch.testing.assert_close(found, gradient_of(lambda given: plain_divergence(given, teacher, beta), student))
    assert found[1][0, 0] == 0


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("weights", [None, (0.4, 1.5)])
def test_a_hybrid_weighs_both_parts(sizes, weights):
    student, teacher = probabilities(6, sizes[0]), probabilities(6, sizes[1], 1)
    own, others = torch.tensor([4, 0, 2]), torch.tensor([1, 3, 4])
    distance = HybridDistance.of(own, others, sizes, 0.5, weights)
    share = 3 / sizes[1]
    matched_weight, unmatched_weight = weights or (share, 1 - share)
    rest = [
        [column for column in range(size) if column not in ids] for size, ids in zip(sizes, (own, others), strict=True)
    ]

    def plain(given):
        matched = plain_divergence(given[:, own], teacher[:, others], 0.5)
        return matched_weight * matched + unmatched_weight * plain_sorted(given[:, rest[0]], teacher[:, rest[1]])

    parts, gradient = distance(student, teacher)
    torch.testing.assert_close((parts[0], gradient), gradient_of(plain, student))
    torch.testing.assert_close(parts[1], plain_divergence(student[:, own], teacher[:, others], 0.5))
    torch.testing.assert_close(parts[2], plain_sorted(student[:, rest[0]], teacher[:, rest[1]]))


def test_a_hybrid_of_one_vocabulary_sorts_nothing():
    student, teacher = probabilities(3, 4), probabilities(3, 4, 1)
    every = torch.arange(4)
    parts, _ = HybridDistance.of(every, every, (4, 4), 0.5, None)(student, teacher)
    assert torch.equal(parts[0], parts[1]) and not parts[2].any()
