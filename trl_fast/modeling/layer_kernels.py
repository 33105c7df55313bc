"""Tells which packages' kernels serve layers that carry a state, and why others do not.

transformers takes a function of these packages in the place of its own PyTorch code if the package can be imported
when the model's code is. It looks at no version, and takes a package that does not load for one that is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True)
class LayerKernel:
    """Describes a kernel that transformers takes from another package.

    - `serves`: what it computes, for people.
    - `distributions`: the packages that bring it, as pip knows them; the first one is to be installed.
    - `module`, `function`: where it is.
    - `oldest`: the first version whose function is called as transformers calls it.
    """

    serves: str
    distributions: tuple[str, ...]
    module: str
    function: str
    oldest: str

    def fitness(self) -> tuple[bool, str]:
        """Returns whether transformers can take the kernel, and the package's version or why not."""
        for distribution in self.distributions:
            try:
                version = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            return self._fitness_of(distribution, version)
        return False, f"{self.distributions[0]} is not installed"

    def _fitness_of(self, distribution: str, version: str) -> tuple[bool, str]:
        found = f"{distribution} {version}"
        if Version(version) < Version(self.oldest):
            return False, f"{found} is too old: pip install '{distribution}>={self.oldest}'"
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # Whatever keeps a compiled package from loading: transformers catches it too.
            lines = str(error).splitlines() or [""]
            again = f"pip install --force-reinstall --no-deps --no-build-isolation {distribution}"
            return (
                False,
                f"{found} does not load ({type(error).__name__}: {lines[0]}); build it for this torch: {again}",
            )
        if not hasattr(module, self.function):
            return False, f"{found} has no {self.module}.{self.function}: install another version"
        return True, found


_FLA = ("flash-linear-attention", "fla-core")
DELTA_RULE = LayerKernel(
    "the gated delta rule", _FLA, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", oldest="0.2.2"
)
KIMI_DELTA_RULE = LayerKernel("Kimi's delta rule", _FLA, "fla.ops.kda", "chunk_kda", oldest="0.4.0")
CONVOLUTION = LayerKernel(
    "short convolutions", ("causal-conv1d",), "causal_conv1d", "causal_conv1d_fn", oldest="1.2.0"
)
MAMBA1 = LayerKernel(
    "Mamba 1", ("mamba-ssm",), "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", oldest="1.2.0"
)
MAMBA2 = LayerKernel(
    "Mamba 2", ("mamba-ssm",), "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", oldest="2.0.4"
)
LAYER_KERNELS = (DELTA_RULE, KIMI_DELTA_RULE, CONVOLUTION, MAMBA1, MAMBA2)
