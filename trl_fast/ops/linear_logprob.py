"""Computes per-token log-probabilities from hidden states and the head's weight; the logits never exist whole."""

from __future__ import annotations

import torch

from .head.autograd import differentiable_scores
from .head.logit_transform import LogitTransform
from .head.plan import DEFAULT_SPARSE_THRESHOLD, HeadOptions
from .head.row_statistics import output_mask
from .head.transient_scores import transient_scores
from .head.transient_weight import TransientWeight
from .head.vocabulary_shard import VocabularyShard
from .token_scores import TokenScores, token_scores


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logprobs",),
    workspace_bytes: int | None = None,
    backend: str | None = None,
    head_grad: str = "exact",
    sparse_threshold: float = DEFAULT_SPARSE_THRESHOLD,
    shard: VocabularyShard | None = None,
) -> TokenScores:
    """Computes each target's log-probability: softmax(cap(logit_scale · (hidden weightᵀ + bias)) / temperature).

    Args:
        hidden: (N, H) float32|bfloat16|float16, contiguous or not.
        weight: (V, H), dtype of hidden (any float dtype under autocast).
        targets: (N,) integer in [0, V).
        bias: (V,) or None.
        temperature: the logits are divided by it, last.
        softcap: cap of the logits, softcap · tanh(logits / softcap), or None.
        logit_scale: factor of the logits, first.
        outputs: names among logprobs (always there), entropy (differentiable), log_sum_sq_probs, mean_logits, is_top1.
        workspace_bytes: limit of the memory that grows with N · V; default: see `workspace_of` in head/plan.py.
        backend: force "cuda", "triton", "cpp" or "torch"; None takes the best that can serve.
        head_grad: "exact", or "sparse" for an unbiased estimate without the backward products (see
            head/sparse_gradient.py). Its random numbers come from torch's default generator.
        sparse_threshold: smaller probabilities are sampled: 2⁻¹² keeps about 300 entries a row on real text at an
            error of 0.5%, 2⁻¹⁴ about 700 at 0.2%, as much as a bfloat16 product has.
        shard: where several processes hold columns of the vocabulary each (tensor parallelism): which columns these V
            are. Targets and results are those of the whole vocabulary, and of the gradients only that of hidden comes
            from all processes, which call with the same rows. workspace_bytes has to be the same for all; by default
            it is 1 GiB. There is no sparse gradient.

    Returns:
        TokenScores of (N,) tensors; float32, is_top1 bool. Outputs that were not asked for are None.

    Raises:
        ValueError: a shape, dtype, device, target, output name or number is not as above; or workspace_bytes holds no
            row of logits. With the environment variable TRL_FAST_CHECK=1 also if hidden is not finite; on a GPU the
            values of targets are looked at only then, and one outside the vocabulary makes its row NaN, with gradient.
        RuntimeError: the forced backend cannot serve.
    """
    transform = LogitTransform.of(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    options = HeadOptions(backend, workspace_bytes, head_grad, sparse_threshold)
    return token_logprobs(hidden, weight, targets, bias, transform, outputs, options, shard)


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: tuple[str, ...],
    options: HeadOptions,
    shard: VocabularyShard | None = None,
    source: TransientWeight | None = None,
) -> TokenScores:
    """Computes what linear_logprob does, with the logits' transform and the user's settings as values.

    hidden: (N, H) float32|bfloat16|float16; weight: (V, H); targets: (N,) integer; bias: (V,) or None; shard: which
    columns the V are; source: how the weight is made again in backward, where it is not kept.
    """
    mask = output_mask(outputs)
    given = (hidden, weight, targets, bias, transform, mask, options)
    if source is None:
        found = differentiable_scores("linear_logprob", *given, shard)
    else:
        found = transient_scores("linear_logprob", *given, source)
    return token_scores(found.statistics, outputs, logprobs=found.logprobs, entropy=found.entropy)
