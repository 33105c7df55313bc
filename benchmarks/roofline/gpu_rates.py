"""Holds GPUs' rates: the roofline that turns counted work into milliseconds, which are estimates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Holds the rates that a GPU reaches, not those of its data sheet.

    products: operations a second of dense 16-bit matrix products; float32_products: of float32 ones; memory: bytes a
    second; memory_bytes: how much there is; capability: its compute capability.
    """

    name: str
    products: float
    float32_products: float
    memory: float
    memory_bytes: int
    capability: tuple[int, int]

    def milliseconds(self, narrow_flops: float, float32_flops: float, moved_bytes: float) -> float:
        """Estimates how long products and memory take one after the other: nothing hides behind anything."""
        return 1e3 * (narrow_flops / self.products + float32_flops / self.float32_products + moved_bytes / self.memory)


# H100 SXM: 700 TFLOP/s of a data sheet's 989 and 3.0 TB/s of 3.35; H200: the same chip with a copy that was measured
# at 4.3 TB/s. The rates of float32 products are the same share of the data sheet.
GPUS = {
    "h100": Gpu("H100 SXM", 700e12, 47e12, 3.0e12, 80 << 30, (9, 0)),
    "h200": Gpu("H200", 700e12, 47e12, 4.3e12, 141 << 30, (9, 0)),
}
