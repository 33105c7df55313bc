"""Attention over two sets of keys, by hand, for what merges it."""

from __future__ import annotations

from collections.abc import Callable

import torch

INF = float("inf")


class Parts:
    """Both parts of a row of T tokens, strided as CPU and CUDA kernels give them, and both sets of keys in float64.

    Token 1 has no key in the first part and token 3 none in the second, whose outputs there are NaN: nobody may look.
    Token 5 has none in either. Every third token has no second part.
    """

    def __init__(self, tokens: int, heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        chosen = torch.tensor([t for t in range(tokens) if t % 3 or t == 3], dtype=torch.int64)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        self.place = torch.full((tokens,), -1, dtype=torch.int32)
        self.place[chosen] = torch.arange(len(chosen), dtype=torch.int32)
        # Rows of a larger tensor, and heads first.
        self.out = normal(tokens, heads, width + 8).to(dtype)[..., :width]
        self.other = normal(heads, len(chosen), width).to(dtype).transpose(0, 1)
        self.lse = 3 * normal(heads, tokens + 5).float()[:, :tokens]
        self.other_lse = 3 * normal(heads, len(chosen)).float() + 2
        self.lse[0] += 1e3  # a common offset
        self.other_lse[0] += 1e3
        for token, first, second in ((1, True, False), (3, False, True), (5, True, True)):
            if token < tokens and first:
                self.out[token], self.lse[:, token] = float("nan"), -INF
            if token < tokens and second:
                self.other[self.place[token]], self.other_lse[:, self.place[token]] = float("nan"), -INF
        if tokens > 5:
            self.out[5] = 0.0

    def given(self) -> tuple[torch.Tensor, ...]:
        return self.out, self.lse, self.other, self.other_lse, self.place

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The merged output and log-sum-exp in float64, token by token."""
        out, lse = self.out.double().clone(), self.lse.double().clone()
        for token, row in enumerate(self.place.tolist()):
            for head in range(out.shape[1]) if row >= 0 else ():
                a, b = self.lse[head, token].double(), self.other_lse[head, row].double()
                lse[head, token] = torch.logaddexp(a, b)
                if b > -INF:
                    second = (b - lse[head, token]).exp() * self.other[row, head].double()
                    first = (a - lse[head, token]).exp() * self.out[token, head].double() if a > -INF else 0.0
                    out[token, head] = first + second
        return out, lse


def assert_merged(parts: Parts, merged: torch.Tensor, lse: torch.Tensor) -> None:
    """One rounding to the dtype, and tokens without a second part to the bit."""
    exact, exact_lse = parts.exact()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[parts.out.dtype]
    assert merged.dtype == parts.out.dtype and merged.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(merged.double(), exact, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    alone = parts.place < 0
    assert torch.equal(merged[alone], parts.out[alone]) and torch.equal(lse[:, alone], parts.lse[:, alone])


def assert_nan_stays(merge: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """A log-sum-exp that is NaN, of either part, makes its token NaN in its head, and no other."""
    parts = Parts(9, 2, 16, torch.float32)
    exact, exact_lse = parts.exact()
    parts.lse[1, 2] = parts.other_lse[0, parts.place[4]] = float("nan")
    merged, lse = merge(*parts.given())
    for head, token in ((1, 2), (0, 4)):
        assert merged[token, head].isnan().all() and lse[head, token].isnan()
        merged[token, head], lse[head, token] = exact[token, head].float(), exact_lse[head, token].float()
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
