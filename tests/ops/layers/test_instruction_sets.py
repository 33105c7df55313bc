"""The C++ kernels of layers, as compiled for each instruction set: their errors are PyTorch's."""

import pytest

from support.instruction_sets import CPU_FLAGS, check_instruction_set
from support.layer_errors import DTYPES
from support.plain_norms import NORM_SHAPES
from tests.ops.layers import (
    test_chunked_gated_activation,
    test_embedding,
    test_gated_activation,
    test_qk_norm_rotary,
    test_residual_rms_norm,
    test_rms_norm,
    test_rotary,
    test_tied_embedding,
)
from trl_fast.ops.layers import NORM_CASTS


def check_all_kernels():
    for dtype in DTYPES:
        for shape in NORM_SHAPES:
            for cast in NORM_CASTS:
                test_rms_norm.test_error_is_that_of_pytorch(shape, dtype, cast, "cpp")
                test_residual_rms_norm.test_error_is_that_of_pytorch(shape, dtype, cast, "cpp")
        for shape in test_gated_activation.SHAPES:
            for activation in test_gated_activation.ACTIVATIONS:
                test_gated_activation.test_error_is_that_of_pytorch(shape, dtype, activation, "cpp")
        for shape in test_chunked_gated_activation.SHAPES:
            test_chunked_gated_activation.test_error_is_that_of_pytorch(shape, dtype, "silu", "cpp")
        for shape in test_rotary.SHAPES:
            test_rotary.test_error_is_that_of_pytorch(shape, dtype, "cpp")
        for family in test_rotary.FAMILIES:
            for width in test_rotary.WIDTHS:
                test_rotary.test_error_is_that_of_families(width, dtype, family, "cpp")
        for family in test_qk_norm_rotary.FAMILIES:
            for shape in test_qk_norm_rotary.SHAPES:
                test_qk_norm_rotary.test_error_is_that_of_transformers(shape, dtype, family, "cpp")
        for case in test_embedding.CASES:
            test_embedding.test_error_is_that_of_pytorch(case, dtype, None, "cpp")
        for shape in test_tied_embedding.SHAPES:
            test_tied_embedding.test_error_is_that_of_pytorch(shape, dtype, None, "cpp")


@pytest.mark.parametrize("isa", CPU_FLAGS)
def test_every_instruction_set(isa):
    check_instruction_set(isa, check_all_kernels, tested_here=True)
