"""Says what RMSNorms of transformers compute, and where each family rounds; the norms in one pass are held to it.

With r = 1 / sqrt(mean(x²) + eps) and n = x r in float32, the result is

- "llama": weight · dtype(n) (Llama, Qwen, Mistral, Phi-3, GLM),
- "gemma": dtype(n (1 + weight)) (Gemma to Gemma 3, Qwen3-Next),
- "olmo": dtype(n weight) (OLMo 2 and 3, gpt-oss, Gemma 4, Nemotron-H, Helium),

and dtype(n) without a weight. With g the gradient by n, the one by x is r (g - n mean(g n)).
"""

from __future__ import annotations

import torch

from trl_fast.kernels.shared_constants import NORM_CASTS


def check_norm(x: torch.Tensor, weight: torch.Tensor | None, cast: str) -> None:
    """Checks the arguments of a norm: x (..., H) of a float dtype, weight (H,) of the same dtype or None.

    Raises:
        ValueError: a shape, dtype or `cast` is not as it has to be.
    """
    if cast not in NORM_CASTS:
        raise ValueError(f"cast: unknown name {cast!r}; expected one of {NORM_CASTS}")
    if x.dim() < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x: expected floats of shape (..., H), H at least 1, got {x.dtype} {tuple(x.shape)}")
    if weight is not None and (weight.shape != x.shape[-1:] or weight.dtype != x.dtype):
        raise ValueError(
            f"weight: expected {x.dtype} of shape {tuple(x.shape[-1:])}, as x has them, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )


def _factors(weight: torch.Tensor | None, cast: str) -> torch.Tensor | float:
    """Returns what the normalised row is multiplied by in float32: a scalar or (H,)."""
    if weight is None:
        return 1.0
    return 1.0 + weight.float() if cast == "gemma" else weight.float()


def norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norm of x (..., H), and 1 / sqrt(mean of squares + eps) of its R rows, (R,) in float32."""
    upcast = x.float()
    rstd = torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + eps)
    normed = upcast * rstd
    if weight is not None and cast == "llama":
        y = weight * normed.to(x.dtype)
    else:
        y = (normed * _factors(weight, cast)).to(x.dtype)
    return y, rstd.reshape(-1)


def norm_backward_reference(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, cast: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients by x (..., H) and by the weight (H,), without one by a weight of ones.

    grad: (..., H), by the norm; rstd: (R,), of `norm_reference`.
    """
    rstd = rstd.view(*x.shape[:-1], 1)
    normed = x.float() * rstd
    if weight is not None and cast == "llama":
        by_normed, factor = (grad * weight).float(), normed.to(x.dtype).float()
    else:
        by_normed, factor = grad.float() * _factors(weight, cast), normed
    grad_x = (rstd * (by_normed - normed * (by_normed * normed).mean(-1, keepdim=True))).to(x.dtype)
    return grad_x, (grad.float() * factor).reshape(-1, x.shape[-1]).sum(0).to(x.dtype)
