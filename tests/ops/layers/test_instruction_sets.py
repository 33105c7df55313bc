"""The C++ kernels of layers, as compiled for each instruction set: their errors are PyTorch's."""

import pytest

from support.instruction_sets import CPU_FLAGS, check_instruction_set
from support.layer_errors import DTYPES


def check_all_kernels():
    # In a process where the tests' folder is a place of modules.
    import test_gated_activation
    import test_rms_norm
    import test_rotary

    for dtype in DTYPES:
        for shape in test_rms_norm.SHAPES:
            test_rms_norm.test_error_is_that_of_pytorch(shape, dtype, "llama", "cpp")
            test_rms_norm.test_error_is_that_of_pytorch(shape, dtype, "gemma", "cpp")
        for shape in test_gated_activation.SHAPES:
            for activation in test_gated_activation.ACTIVATIONS:
                test_gated_activation.test_error_is_that_of_pytorch(shape, dtype, activation, "cpp")
        for shape in test_rotary.SHAPES:
            test_rotary.test_error_is_that_of_pytorch(shape, dtype, "cpp")


@pytest.mark.parametrize("isa", CPU_FLAGS)
def test_every_instruction_set(isa):
    check_instruction_set(isa, __file__, "check_all_kernels")
