"""Tries the ops beside the head: log-probabilities of given logits, losses of pairs and policies, merging, linear."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import torch

from support.fuzz.draw import Draw
from support.fuzz.head_cases import NOTHING, exact_scores
from support.fuzz.hold import Held
from support.losses import LOSS_KERNELS
from support.merging import Parts
from support.triton_interpreter import interpreted
from trl_fast.kernels import loss_kernels
from trl_fast.ops import pair_loss, policy_loss, selective_log_softmax, selective_log_softmax_and_entropy
from trl_fast.ops.attention_merge import merge_attention
from trl_fast.ops.pair_formulas import PAIR_FORMULAS
from trl_fast.ops.policy_loss import LOSS_TYPES

EPS = torch.finfo(torch.float32).eps


def try_selective(draw: Draw, held: Held) -> None:
    """Tries selective_log_softmax with and without the entropy, on logits of any shape and stride."""
    backend = draw.choose("backend", *["cpp"] * 6, "torch", "torch", "triton")
    dtype = draw.choose("dtype", torch.float32, torch.float32, torch.bfloat16, torch.float16)
    shape = draw.choose("shape", (0,), (), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4))
    v = draw.choose("v", 1, 2, 33, 128, 700, 2500)
    nature = draw.choose("nature", "plain", "peaked", "offset", "minus infinity", "confident", "denormal")
    logits, index = draw.normal(*shape, v) * 4, draw.indices(v, *shape)
    if nature == "peaked":
        logits = logits * 20
    elif nature == "offset":
        logits = logits + draw.choose("offset", -1e4, 1e4)
    elif nature == "denormal":
        logits = logits * 1e-40
    elif nature == "confident":
        logits = logits / 8
        logits.scatter_add_(-1, index[..., None], 40 * draw.uniform(*shape, 1))
    elif nature == "minus infinity":
        out = draw.uniform(*shape, v) < 0.4
        logits = logits.masked_fill(out.scatter(-1, index[..., None], False), -math.inf)
    logits, index = draw.laid_out("logits", logits.to(dtype)), draw.laid_out("index", index) if shape else index
    if nature == "minus infinity":
        # A layout may have repeated other indices or logits.
        index = logits.argmax(-1)
    logits.requires_grad_()
    temperature = draw.choose("temperature", 1.0, 1.0, 0.4)
    given = (logits, index)
    if draw.chance("entropy", 0.5):
        logprobs, entropy = selective_log_softmax_and_entropy(*given, temperature=temperature, backend=backend)
    else:
        logprobs, entropy = selective_log_softmax(*given, temperature=temperature, backend=backend), None
    upstream, by_entropy = draw.normal(*shape).double(), draw.normal(*shape).double() * (entropy is not None)
    results = {"got": (logprobs, entropy)}
    u = logits.double().reshape(-1, v) / temperature
    flat = exact_scores(u, index.reshape(-1))
    rounded = exact_scores((logits.float() / temperature).double().reshape(-1, v), index.reshape(-1))
    for name, scores in (("exact", flat), ("plain", rounded)):
        results[name] = (scores["logprobs"].view(shape), scores["entropy"].view(shape))
    p = u.detach().softmax(-1)
    size = 1 + u.detach().masked_fill(u.isinf(), 0).abs().amax(-1).view(shape)
    true, plain = results["exact"], results["plain"]
    own = (true[0].detach().abs() + NOTHING) * size
    held.close("logprobs", logprobs, plain[0], true[0], own, 4 * EPS)
    if entropy is not None:
        held.close("entropy", entropy, plain[1], true[1], true[1].detach().clamp(min=1) * size, 4 * EPS)
    losses = {
        name: (upstream * pair[0].double()).sum() + (0 if pair[1] is None else (by_entropy * pair[1].double()).sum())
        for name, pair in results.items()
    }
    gradients = {name: torch.autograd.grad(loss, logits)[0] for name, loss in losses.items()}
    index = index.reshape(-1, 1)
    logp = u.detach().log_softmax(-1)
    others = logp.scatter(1, index, -math.inf).logsumexp(1, keepdim=True).exp()
    logp = torch.where(p > 0, logp, 0.0)
    unit = upstream.abs().view(-1, 1) * p.scatter(1, index, others)
    unit = unit + by_entropy.abs().view(-1, 1) * p * (logp.abs() + true[1].detach().view(-1, 1) + 1)
    unit = ((unit * size.view(-1, 1) + NOTHING) / temperature).view(logits.shape)
    floor, least = 8 * EPS + torch.finfo(dtype).eps, 4 * torch.finfo(dtype).tiny
    held.close("gradient", gradients["got"], gradients["plain"], gradients["exact"], unit, floor, least)


def _losses_of(backend: str) -> contextlib.AbstractContextManager[None]:
    """Lets the launchers of the loss kernels run in the interpreter, which `fuzzing` has repaired."""
    patches = contextlib.ExitStack()
    for name in LOSS_KERNELS if backend == "triton" else ():
        patches.enter_context(mock.patch.object(loss_kernels, name, interpreted(getattr(loss_kernels, name))))
    return patches


def _vector_backend(draw: Draw) -> str:
    return draw.choose("backend", *["torch"] * 8, "triton")


def try_pair_loss(draw: Draw, held: Held) -> None:
    """Tries pair_loss: every formula, empty sequences, log-ratios of any size."""
    backend, loss_type = _vector_backend(draw), draw.choose("loss_type", *PAIR_FORMULAS)
    pairs = draw.choose("pairs", 0, 1, 3, 9)
    counts = torch.tensor([draw.choose("length", 0, 1, 5, 40) for _ in range(2 * pairs)], dtype=torch.int64)
    draw.said.pop("length", None)
    logprobs = -draw.uniform(int(counts.sum())) * draw.choose("size", 1e-6, 1.0, 30.0)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sums = torch.stack([x.sum() for x in logprobs.split(counts.tolist())]) if pairs else torch.zeros(0)
    ref = sums + draw.choose("spread", 0.0, 1.0, 60.0) * draw.normal(2 * pairs)
    numbers = {"beta": draw.choose("beta", 0.01, 0.1, 1.0), "loss_type": loss_type}
    numbers["label_smoothing"] = draw.choose("label_smoothing", 1e-3, 0.1, 0.3)
    results = {}
    for name, dtype, used in (
        ("exact", torch.float64, "torch"),
        ("got", torch.float32, backend),
    ):
        leaf = draw_leaf(logprobs, dtype)
        given = (leaf, cu_seqlens, ref.to(dtype), counts + 1)
        with _losses_of(used):
            loss = pair_loss(*given, **numbers, backend=used)
            upstream = torch.linspace(-1, 1, pairs, dtype=dtype)
            (gradient,) = torch.autograd.grad((loss.losses * upstream).sum(), leaf)
        results[name] = (loss.losses, loss.sequence_logprobs, gradient)
    got, exact = results["got"], results["exact"]
    size = 1 + exact[1].detach().abs() + ref.double().abs()
    pair_size = (size[0::2] + size[1::2]) * numbers["beta"] + 1
    held.close("sequence_logprobs", got[1], exact[1], exact[1], size, 8 * EPS)
    unit = (1 + exact[0].detach().abs()) * pair_size
    held.close("losses", got[0], exact[0], exact[0], unit, 16 * EPS)
    per_token = pair_size.repeat_interleave(2).repeat_interleave(counts)
    unit = per_token * (exact[2].abs() + numbers["beta"])
    held.close("gradient", got[2], exact[2], exact[2], unit, 32 * EPS)


def draw_leaf(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a copy (N,) of `tensor` in `dtype` that gets a gradient."""
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def try_policy_loss(draw: Draw, held: Held) -> None:
    """Tries policy_loss: every type, with and without old and reference log-probabilities, ratios of any size."""
    backend = _vector_backend(draw)
    n, sequences = draw.choose("n", 0, 1, 6, 50), draw.choose("sequences", 1, 2, 5)
    logprobs = -draw.uniform(n) * draw.choose("size", 1e-6, 1.0, 30.0)
    old = None if draw.chance("on_policy", 0.3) else logprobs + draw.choose("off", 0.0, 0.3, 20.0) * draw.normal(n)
    beta = draw.choose("beta", 0.0, 0.04, 1.0)
    ref = logprobs + draw.choose("away", 0.0, 1e-3, 0.5, 15.0) * draw.normal(n) if beta else None
    advantages, branch = draw.normal(sequences), draw.indices(sequences, n)
    weights = draw.uniform(sequences)
    numbers = {
        "loss_type": draw.choose("loss_type", *LOSS_TYPES),
        "delta": draw.choose("delta", None, 1.5),
        "bias_correct_kl": draw.choose("bias_correct_kl", True, False),
        "beta": beta,
    }
    results = {}
    for name, dtype, used in (
        ("exact", torch.float64, "torch"),
        ("got", torch.float32, backend),
    ):
        leaf = draw_leaf(logprobs, dtype)
        others = [None if x is None else x.to(dtype) for x in (old, advantages, weights, ref)]
        given = (leaf, others[0], others[1], branch, others[2])
        with _losses_of(used):
            loss = policy_loss(*given, ref_logprobs=others[3], **numbers, backend=used)
            (gradient,) = torch.autograd.grad(loss.loss, leaf)
        results[name] = (loss.loss, loss.kl, gradient)
    got, exact = results["got"], results["exact"]
    ratio = torch.ones(n).double() if old is None else (logprobs.double() - old.double()).clamp(max=40).exp()
    size = 1 + logprobs.double().abs()
    kl_size = torch.zeros(n).double()
    if ref is not None:
        kl_factor = ratio if numbers["bias_correct_kl"] else 1.0
        kl_size = exact[1].abs() + kl_factor * (ref - logprobs).double().abs()
        held.close("kl", got[1], exact[1], exact[1], kl_size * size, 16 * EPS)
    share = weights.double()[branch]
    unit = share * size * ((4 + ratio) * advantages.double().abs()[branch] * size + beta * kl_size)
    held.close("loss", got[0], exact[0], exact[0], unit.sum(), 16 * EPS)
    held.close("gradient", got[2], exact[2], exact[2], unit, 16 * EPS)


def try_merge(draw: Draw, held: Held) -> None:
    """Tries merge_attention: tokens without keys on either side, outputs there NaN, strided inputs."""
    dtype = draw.choose("dtype", torch.float32, torch.bfloat16, torch.float16)
    given = Parts(
        draw.choose("tokens", 1, 2, 6, 31), draw.choose("heads", 1, 3), draw.choose("width", 1, 8, 17), dtype
    )
    out, lse = merge_attention(*given.given())
    exact, exact_lse = given.exact()
    eps = torch.finfo(dtype).eps
    unit = 1 + exact.abs().nan_to_num(0.0)
    held.close("merged", out, exact.to(dtype), exact, unit, 4 * eps + 1e3 * EPS)
    held.close("lse", lse, exact_lse.float(), exact_lse, 1 + exact_lse.abs().nan_to_num(0.0, 0.0, 0.0), 4 * EPS)
