"""Computes attention sinks from the results of attention without them.

A sink is a score of a head that every query sees beside those of its keys, with a value of 0 (gpt-oss; StreamingLLM,
arXiv 2309.17453). With output o and log-sum-exp l of the keys alone, the softmax over both has the log-sum-exp
l' = log(e^l + e^sink) and the output o' = e^(l - l') o. A flash backward with o' and l' gives the exact gradients of
query, key and value, as for any softmax that has more keys than those it is called with; the sink's is
-Σ e^(sink - l') (do' · o').
"""

from __future__ import annotations

import torch


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output (1, heads, T, Dv) and log-sum-exp (heads, T) with sinks (heads,), from those without.

    Nothing is changed in place: activation checkpointing keeps what a flash kernel gave.
    """
    shares = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (out * shares[..., None]).to(out.dtype), torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])


def sink_gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Computes the gradient of sinks (heads,) from that of the output (1, heads, T, Dv), all of a softmax with sinks.

    lse: (heads, T).
    """
    shares = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(shares * (grad[0].to(lse.dtype) * out[0]).sum(-1)).sum(-1).to(sinks.dtype)
