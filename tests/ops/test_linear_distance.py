"""Distances between two heads' probabilities: values and gradients, in one tile and in several."""

import pytest
import torch

from trl_fast.losses.uld import HybridDistance, SortedDistance
from trl_fast.ops import HeadOptions
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.linear_distance import DistanceHead, linear_distance, logit_distance

ROWS, COLUMNS, OTHERS = 13, 40, 33
ONE_TILE, SMALL_TILES = 1 << 20, 3 * (COLUMNS * 44 + OTHERS * 36)


def tensors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    factors = [torch.rand(ROWS, generator=generator) for _ in range(3)]
    return [drawn(ROWS, 8), drawn(COLUMNS, 8), drawn(COLUMNS), drawn(ROWS, 6), drawn(OTHERS, 6)], factors


def plain(given, factors, transforms):
    """The same by autograd, from whole rows of probabilities."""
    (hidden, weight, bias, other_hidden, other_weight), (own, other, weights) = given, factors
    logits = transforms[0].apply(hidden.float() @ weight.float().t(), bias)[0]
    student = logits.softmax(-1) * own[:, None]
    others = transforms[1].apply(other_hidden.float() @ other_weight.float().t(), None)[0]
    teacher = others.softmax(-1) * other[:, None]
    first = student.sort(-1, descending=True).values
    second = torch.nn.functional.pad(teacher.sort(-1, descending=True).values, (0, COLUMNS - OTHERS))
    return ((first - second).abs().sum(-1) * weights).sum()


def heads(given, factors, transforms):
    student = DistanceHead(*given[:3], transforms[0], factors[0])
    return student, DistanceHead(given[3], given[4], None, transforms[1], factors[1])


TRANSFORMS = {
    "plain": (LogitTransform.of(), LogitTransform.of()),
    "temperatures": (LogitTransform.of(temperature=0.7), LogitTransform.of(temperature=1.6)),
    "capped": (LogitTransform.of(temperature=1.3, softcap=2.0, logit_scale=0.5), LogitTransform.of(softcap=3.0)),
}


@pytest.mark.parametrize("workspace", [ONE_TILE, SMALL_TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_and_gradients(name, workspace):
    given, factors = tensors()
    leaves = [*(each.requires_grad_() for each in given[:3]), factors[0].requires_grad_()]
    expected = plain(given, factors, TRANSFORMS[name])
    wanted = torch.autograd.grad(2 * expected, leaves)
    factors[0] = factors[0].detach()
    options = HeadOptions(workspace_bytes=workspace)
    found = linear_distance(*heads(given, factors, TRANSFORMS[name]), factors[2], SortedDistance(), options)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(2 * found.loss, leaves[:3]), wanted[:3])
    torch.testing.assert_close(2 * found.factor_gradients, wanted[3])
    torch.testing.assert_close((found.parts[0] * factors[2]).sum(), expected)


@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_what_is_frozen_has_no_gradient(trained):
    given, factors = tensors()
    leaves = [each.requires_grad_(needed) for each, needed in zip(given[:2], trained, strict=True)]
    transforms = TRANSFORMS["plain"]
    wanted = (
        torch.autograd.grad(plain(given, factors, transforms), leaves, allow_unused=True) if all(trained) else None
    )
    found = linear_distance(*heads(given, factors, transforms), factors[2], SortedDistance(), HeadOptions())
    found.loss.backward()
    assert [each.grad is not None for each in leaves] == list(trained) and wanted is None


def test_no_rows_and_no_gradient():
    given, factors = tensors()
    given[0], given[3] = given[0][:0].requires_grad_(), given[3][:0]
    given[1].requires_grad_()
    ids = torch.arange(5)
    for distance, parts in ((SortedDistance(), 1), (HybridDistance.of(ids, ids, (COLUMNS, OTHERS), 0.5, None), 3)):
        sides = heads(given, [each[:0] for each in factors], TRANSFORMS["plain"])
        found = linear_distance(*sides, factors[2][:0], distance, HeadOptions())
        found.loss.backward()
        assert found.loss == 0 and found.parts.shape == (parts, 0) and not given[1].grad.any()
    given, factors = tensors()
    with torch.no_grad():
        found = linear_distance(
            *heads(given, factors, TRANSFORMS["plain"]), factors[2], SortedDistance(), HeadOptions()
        )
    assert not found.loss.requires_grad and found.loss > 0


def test_a_workspace_without_a_row_is_refused():
    given, factors = tensors()
    with pytest.raises(ValueError, match="hold no row of both heads' logits"):
        sides = heads(given, factors, TRANSFORMS["plain"])
        linear_distance(*sides, factors[2], SortedDistance(), HeadOptions(workspace_bytes=100))


def test_16_bits_are_close():
    given, factors = tensors(torch.bfloat16)
    given[0].requires_grad_()
    expected = plain(given, factors, TRANSFORMS["plain"])
    wanted = torch.autograd.grad(expected, given[0])[0]
    found = linear_distance(*heads(given, factors, TRANSFORMS["plain"]), factors[2], SortedDistance(), HeadOptions())
    torch.testing.assert_close(found.loss, expected, rtol=2e-2, atol=0)
    assert (torch.autograd.grad(found.loss, given[0])[0] - wanted).norm() < 0.1 * wanted.norm()


def test_logits_that_are_there_already():
    given, factors = tensors()
    logits = (given[0] @ given[1].t()).requires_grad_()
    others = given[3] @ given[4].t()
    transforms = TRANSFORMS["temperatures"]
    student = [logits, torch.eye(COLUMNS), None, others, torch.eye(OTHERS)]
    expected = plain(student, factors, transforms)
    found = logit_distance(logits, others, (factors[0], factors[1]), (0.7, 1.6), factors[2], SortedDistance())
    torch.testing.assert_close(found.loss, expected)
    wanted = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(torch.autograd.grad(found.loss, logits), wanted)
