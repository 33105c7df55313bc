"""Says how heads are turned by the angles of their positions, in the ways that transformers' families do it.

A pair (a, b) of a head's numbers becomes (a cos_a - b sin_a, b cos_b + a sin_b). Each product and the sum are rounded
to the dtype, or the whole is computed in float32 and rounded once. Backward is the transposed rotation.
"""

from __future__ import annotations

import torch

from trl_fast.kernels.shared_constants import PAIRS

from ..memory_pool import reused_empty


def check_heads(query: torch.Tensor, key: torch.Tensor | None) -> None:
    """Checks queries (B, heads, T, D) of a float dtype, and keys, which may have fewer heads.

    Raises:
        ValueError: a shape or dtype is not as it has to be.
    """
    if query.dim() != 4 or not query.is_floating_point():
        raise ValueError(f"query: expected floats of shape (B, heads, T, D), got {query.dtype} {tuple(query.shape)}")
    batch, _, tokens, width = query.shape
    if key is None:
        return
    if key.dim() != 4 or key.dtype != query.dtype or (key.shape[0], *key.shape[2:]) != (batch, tokens, width):
        raise ValueError(
            f"key: expected {query.dtype} of shape ({batch}, heads, {tokens}, {width}), "
            f"got {key.dtype} {tuple(key.shape)}"
        )


def check_angles(
    query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str, one_angle_a_pair: bool, upcast: bool
) -> None:
    """Checks the angles of a rotation of the first R numbers of heads (B, heads, T, D): (B or 1, T, R or R / 2).

    Raises:
        ValueError: a shape or dtype is not as it has to be, or an angle wants a gradient.
    """
    if pairs not in PAIRS:
        raise ValueError(f"pairs: unknown name {pairs!r}; expected one of {PAIRS}")
    batch, _, tokens, width = query.shape
    dtypes = (query.dtype, torch.float32) if upcast else (query.dtype,)
    for name, angles in (("cos", cos), ("sin", sin)):
        has_shape = angles.dim() == 3 and tuple(angles.shape[:2]) in ((1, tokens), (batch, tokens))
        turned = angles.shape[-1] * (2 if one_angle_a_pair else 1) if has_shape else 0
        has_shape = has_shape and turned % 2 == 0 and turned <= width
        if not has_shape or angles.dtype not in dtypes or angles.requires_grad:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dtypes))} of shape ({batch} or 1, {tokens}, angles of an "
                f"even number of at most {width} numbers) without gradient, got {angles.dtype} {tuple(angles.shape)}"
            )
    if sin.shape[-1] != cos.shape[-1] or sin.dtype != cos.dtype:
        raise ValueError(f"sin: expected what cos is, {cos.dtype} {tuple(cos.shape)}, got {sin.dtype} {sin.shape}")


def _split(x: torch.Tensor, adjacent: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first and the second numbers of pairs: (..., R) as two of (..., R / 2)."""
    if adjacent:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def turn_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: str,
    one_angle_a_pair: bool,
    upcast: bool,
    is_backward: bool,
) -> torch.Tensor:
    """Turns x (B, heads, T, D) by cos and sin (B or 1, T, R or R / 2), or back; returns a tensor of its shape."""
    is_adjacent = pairs != "halves"
    reads_adjacent = is_adjacent and not (is_backward and pairs == "adjacent_to_halves")
    writes_adjacent = pairs == "adjacent" or (is_backward and pairs == "adjacent_to_halves")
    cos, sin = cos[:, None], sin[:, None]
    width = cos.shape[-1] * (2 if one_angle_a_pair else 1)
    a, b = _split(x[..., :width], reads_adjacent)
    cos_a, cos_b = (cos, cos) if one_angle_a_pair else _split(cos, is_adjacent)
    sin_a, sin_b = (sin, sin) if one_angle_a_pair else _split(sin, is_adjacent)
    if upcast:
        a, b, cos_a, cos_b, sin_a, sin_b = (t.float() for t in (a, b, cos_a, cos_b, sin_a, sin_b))
    if is_backward:
        turned = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        turned = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    joined = torch.stack(turned, dim=-1).flatten(-2) if writes_adjacent else torch.cat(turned, dim=-1)
    return torch.cat((joined.to(x.dtype), x[..., width:]), dim=-1)


def empty_by_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns room for (B, heads, T, D), a view of a contiguous (B, T, heads, D)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def room_by_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns the room for (B, heads, T, D) in memory of the pool, where there is much of it."""
    shape = x.shape[0], x.shape[2], x.shape[1], x.shape[3]
    return reused_empty(shape, x.dtype, x.device).transpose(1, 2)


def with_contiguous_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns tensors of any shape whose last dimension lies in one piece: copies where it does not."""
    # An empty tensor counts as contiguous whatever its strides.
    return tuple(t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format) for t in tensors)
