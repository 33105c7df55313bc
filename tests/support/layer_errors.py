"""Compares an op of a layer with transformers' code: both against the same code in float64."""

import torch

BACKENDS = ("cpp", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    """Returns normal numbers that `dtype` holds exactly, a leaf that wants a gradient."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return numbers.to(dtype).requires_grad_()


def results(function, given):
    """Returns what a function gives, and the gradients of all given tensors for fixed gradients of the results."""
    out = function(*given)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [draw(*o.shape, seed=7 + i, dtype=torch.bfloat16).detach().to(o.dtype) for i, o in enumerate(outs)]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, given, grads)]


def check_errors(ours, reference, exact, given):
    """Holds every result and gradient to twice the error of the reference in the same dtype.

    At its largest, to which two roundings are added, since the reference may hit a number by chance; and summed, where
    there are numbers enough.

    ours, reference: functions of `given`; exact: the same function in the dtype of its arguments, given float64.
    """
    upcast = [g.detach().double().requires_grad_() for g in given]
    for i, (got, plain, right) in enumerate(
        zip(results(ours, given), results(reference, given), results(exact, upcast), strict=True)
    ):
        assert got.dtype == plain.dtype and got.shape == plain.shape
        assert torch.isfinite(got).all()
        error, allowed = (got.double() - right).abs(), (plain.double() - right).abs()
        if got.numel() == 0:
            continue
        rounding = torch.finfo(got.dtype).eps * right.abs().max()
        assert error.max() <= 2 * (allowed.max() + rounding), i
        if got.numel() >= 100:
            assert error.sum() <= 2 * allowed.sum(), i
