"""Gradients by the names of an op's arguments."""

from types import SimpleNamespace

import pytest
import torch

from trl_fast.ops.named_gradients import gradients_of, needs_gradients


@torch.library.custom_op("trl_fast_tests::scaled_difference", mutates_args=())
def scaled_difference(left: torch.Tensor, factor: float, right: torch.Tensor) -> torch.Tensor:
    return (left - right) * factor


OP = "trl_fast_tests::scaled_difference"


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, name, right):
        ctx.save_for_backward(left, right)
        return left * right

    @staticmethod
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        return gradients_of(Product.forward, right=grad * left, left=grad * right)


def test_gradients_stand_where_their_arguments_do():
    one, two = torch.ones(1), torch.ones(2)
    assert gradients_of(OP, right=two, left=one) == (one, None, two)
    assert gradients_of(OP) == (None, None, None)


def test_an_autograd_function_returns_them_in_the_order_of_its_forward():
    left, right = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    Product.apply(left, "name", right).backward()
    assert (left.grad, right.grad) == (5.0, 3.0)


def test_which_arguments_need_one():
    ctx = SimpleNamespace(needs_input_grad=(True, False, False))
    assert needs_gradients(ctx, OP, "right", "left") == [False, True]


def test_an_unknown_argument_is_an_error():
    with pytest.raises(KeyError, match="weight"):
        gradients_of(OP, weight=None)
