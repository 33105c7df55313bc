"""The GPUs that code is compiled for in tests."""

import pytest

from benchmarks.gpu_machine_code import TARGETS

# One by default; `make test-slow` and `make check-gpu-code` take them all.
QUICK_TARGETS = [pytest.param(target, marks=() if target == 90 else pytest.mark.slow) for target in TARGETS]
