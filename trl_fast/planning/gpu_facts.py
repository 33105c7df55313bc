"""Lists GPUs: how much memory torch has of each, and the rates that its data sheet promises."""

from __future__ import annotations

from dataclasses import dataclass

from trl_fast.settings.choices import did_you_mean

from .memory_sizes import GIB

# The shares of a data sheet's rates that large products and long copies reach: those of an H200, by what was measured
# of its head's products and of a copy (docs/gpu-h200.md). Other GPUs are taken to reach the same.
PRODUCTS_REACH, MEMORY_REACHES = 700 / 989, 4.3 / 4.8
# The share of a link's rate that collectives of many megabytes are taken to reach; not measured by us.
LINK_REACHES = 0.8
# GPUs of a machine, as in NVIDIA's DGX and HGX; more ranks talk over the network. A rank's share of it, as in DGX A100
# (200 Gbit/s InfiniBand a GPU) and, from Hopper on, in DGX H100 (400 Gbit/s).
GPUS_OF_A_MACHINE = 8
_NETWORK, _NETWORK_FROM_HOPPER = 25.0, 50.0
# Of a GPU that is planned for and has no name.
DEFAULT_CAPABILITY = (9, 0)
# What a CUDA context takes, and the share of the rest that the allocator holds in pieces too small to serve.
CONTEXT_BYTES, FRAGMENTED = GIB // 2, 0.05


@dataclass(frozen=True)
class Gpu:
    """Holds what is known of a GPU.

    - `memory_bytes`: what torch says there is (`total_memory`), less than the name says.
    - `tflops`: of dense bfloat16 products with float32 sums, by the data sheet; `float32_tflops`: of float32 ones
      without tensor cores, as torch computes them by default.
    - `gigabytes_per_second`: of its memory, by the data sheet.
    - `nvlink`: gigabytes a second each way to the other GPUs of a machine, half of the data sheet's number for both
      ways; 0 where there is none, or a bridge between two cards only: then PCIe.
    """

    name: str
    memory_bytes: int
    tflops: float
    float32_tflops: float
    gigabytes_per_second: float
    capability: tuple[int, int]
    nvlink: float = 0.0

    @property
    def usable_bytes(self) -> int:
        """Returns the bytes that are left for tensors: without the CUDA context and what fragmentation takes."""
        return int((self.memory_bytes - CONTEXT_BYTES) * (1 - FRAGMENTED))

    @property
    def products(self) -> float:
        """Returns the operations a second that large products of 16-bit numbers reach."""
        return PRODUCTS_REACH * self.tflops * 1e12

    @property
    def float32_products(self) -> float:
        """Returns the operations a second that large products of float32 numbers reach."""
        return PRODUCTS_REACH * self.float32_tflops * 1e12

    @property
    def memory(self) -> float:
        """Returns the bytes a second that the memory reaches."""
        return MEMORY_REACHES * self.gigabytes_per_second * 1e9

    @property
    def host_bytes_per_second(self) -> float:
        """Returns the bytes a second of copies to pinned memory of the host: PCIe 5 or 4 with 16 lanes."""
        return 50e9 if self.capability >= (9, 0) else 25e9

    @property
    def link_bytes_per_second(self) -> float:
        """Returns the bytes a second that a rank sends to others of its machine: NVLink, else PCIe."""
        return LINK_REACHES * self.nvlink * 1e9 if self.nvlink else self.host_bytes_per_second

    @property
    def network_bytes_per_second(self) -> float:
        """Returns the bytes a second that a rank sends to other machines, by InfiniBand."""
        return LINK_REACHES * 1e9 * (_NETWORK_FROM_HOPPER if self.capability >= (9, 0) else _NETWORK)

    def milliseconds(self, narrow_flops: float, float32_flops: float, moved_bytes: float) -> float:
        """Estimates how long products and memory take one after the other: nothing hides behind anything."""
        return 1e3 * (narrow_flops / self.products + float32_flops / self.float32_products + moved_bytes / self.memory)


def _gpu(
    name: str,
    gibibytes: float,
    tflops: float,
    float32: float,
    bandwidth: float,
    capability: tuple[int, int],
    nvlink: float = 0.0,
) -> Gpu:
    return Gpu(name, int(gibibytes * GIB), tflops, float32, bandwidth, capability, nvlink)


# Memory in GiB is that of torch's own messages. Rates are those of NVIDIA's data sheets, without sparsity.
GPUS: dict[str, Gpu] = {
    "b200": _gpu("NVIDIA B200", 178.3, 2250, 75, 8000, (10, 0), 900),
    "h200": _gpu("NVIDIA H200", 139.7, 989, 67, 4800, (9, 0), 450),
    "h100-80": _gpu("NVIDIA H100 SXM", 79.1, 989, 67, 3350, (9, 0), 450),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 79.1, 756, 51, 2000, (9, 0)),
    "a100-80": _gpu("NVIDIA A100 80GB", 79.1, 312, 19.5, 2039, (8, 0), 300),
    "a100-40": _gpu("NVIDIA A100 40GB", 39.4, 312, 19.5, 1555, (8, 0), 300),
    "rtx6000-ada": _gpu("NVIDIA RTX 6000 Ada", 47.4, 364, 91, 960, (8, 9)),
    "a6000": _gpu("NVIDIA RTX A6000", 47.4, 155, 38.7, 768, (8, 6)),
    "l40s": _gpu("NVIDIA L40S", 44.4, 362, 91.6, 864, (8, 9)),
    "a40": _gpu("NVIDIA A40", 44.3, 150, 37.4, 696, (8, 6)),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", 31.3, 210, 105, 1792, (12, 0)),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 23.6, 165, 82.6, 1008, (8, 9)),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 23.6, 71, 35.6, 936, (8, 6)),
    "a10g": _gpu("NVIDIA A10G", 22.0, 70, 31.5, 600, (8, 6)),
    "l4": _gpu("NVIDIA L4", 22.0, 121, 30.3, 300, (8, 9)),
}
# Names that people use for one of them.
_OTHER_NAMES = {"h100": "h100-80", "h100-sxm": "h100-80", "a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090"}
_OTHER_NAMES |= {"5090": "rtx5090", "rtx-4090": "rtx4090", "rtx-3090": "rtx3090", "a10": "a10g"}


def gpu_named(name: str) -> Gpu:
    """Returns the GPU of that name.

    Raises:
        ValueError: it is not in the table.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    gpu = GPUS.get(_OTHER_NAMES.get(key, key))
    if gpu is None:
        raise ValueError(
            f"gpu={name!r} is unknown{did_you_mean(key, GPUS)}; expected one of {', '.join(GPUS)}, or give "
            "gpu_memory, such as 80GiB"
        )
    return gpu


def gpu_of_device(device_name: str, total_memory: int) -> Gpu | None:
    """Returns the GPU of the table that torch's device of that name and memory in bytes is; None: it is not there."""
    device = device_name.lower().replace(" ", "")
    for key, gpu in GPUS.items():
        named = all(part in device for part in key.split("-"))
        if named and abs(gpu.memory_bytes - total_memory) < 0.1 * total_memory:
            return gpu
    return None
