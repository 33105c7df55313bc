"""Packed logits: PyTorch's row kernels, which specify them, and the C++ ones, as torch.library ops too."""

import pytest
import torch

from support.packed_rows import (
    COLUMNS,
    EVERYTHING,
    PLAIN,
    TRANSFORMED,
    check_empty,
    check_packing,
    pack_hard_rows,
)
from trl_fast.ops.head.kept_logits import pack, unpack
from trl_fast.ops.head.row_kernels import (
    ROW_KERNELS,
    RowKernels,
    row_grad_packed_reference,
    row_grad_reference,
    row_scores_packed_reference,
    row_scores_reference,
)
from trl_fast.ops.head.row_statistics import ENTROPY
from trl_fast.ops.head.sweep import new_state

pytestmark = pytest.mark.usefixtures("extension")

REFERENCE = RowKernels(
    row_scores_reference, row_grad_reference, 0, None, row_scores_packed_reference, row_grad_packed_reference
)
BACKENDS = pytest.mark.parametrize("kernels", [REFERENCE, ROW_KERNELS["cpp"]], ids=["torch", "cpp"])


@BACKENDS
@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMED], ids=["plain", "transformed"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_packing(kernels, columns, transform):
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if kernels is REFERENCE else (torch.float32,)
    check_packing(kernels, columns, transform, dtypes)


@BACKENDS
def test_scores_alone_and_with_some_outputs(kernels):
    for outputs in (0, ENTROPY):
        pack_hard_rows(kernels, 2049, TRANSFORMED, misplaced=1, outputs=outputs)


@BACKENDS
def test_empty_tiles(kernels):
    check_empty(kernels)


def test_the_format_word_by_word():
    """The documented numbers, not those of another implementation."""
    inf, nan = float("inf"), float("nan")
    u = torch.tensor([[3.0, 3.0 - 1 / 1024, 2.0, -61.0, -100.0, -inf, nan, 3.0 - 1.5 / 1024]])
    words, tops = torch.empty(1, 8, dtype=torch.int16), torch.empty(1, 1)
    pack(u, words, tops)
    assert tops.tolist() == [[3.0]]
    assert (words.int() & 0xFFFF).tolist() == [[0, 1, 1024, 65534, 65534, 65535, 65535, 2]]
    unpacked = unpack(words, tops)
    assert unpacked.tolist() == [[3.0, 3.0 - 1 / 1024, 2.0, *[3.0 - 65534 / 1024] * 2, -inf, -inf, 3.0 - 2 / 1024]]


def test_opcheck():
    logits, words, tops = torch.randn(4, 33), torch.zeros(4, 33, dtype=torch.int16), torch.zeros(4, 1)
    targets, index = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1, 0, 0])
    scored = (logits, targets, torch.randn(33), 1.0, 0.5, EVERYTHING, 0, new_state(4, logits.device), words, tops)
    torch.library.opcheck(torch.ops.trl_fast.row_scores_packed, scored)
    graded = (words, index, targets, 1.0, 0.5, torch.zeros(4), torch.rand(4, 4), 0, logits, tops)
    torch.library.opcheck(torch.ops.trl_fast.row_grad_packed, graded)


WORDS_AND_TOPS = [
    ({"words": torch.zeros(4, 33, dtype=torch.int32)}, "words: expected int16"),
    ({"words": torch.zeros(4, 32, dtype=torch.int16)}, "words: expected at least 33 a row"),
    ({"words": torch.zeros(4, 66, dtype=torch.int16)[:, ::2]}, "words: expected contiguous rows"),
    ({"tops": torch.zeros(4, 1, dtype=torch.float64)}, "tops: expected float32"),
    ({"tops": torch.zeros(4, 0)}, r"tops: expected float32 of shape \(4, 1\) for 33 columns"),
    ({"tops": torch.zeros(3, 1)}, r"tops: expected float32 of shape \(4, 1\)"),
]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(4, 33, dtype=torch.bfloat16)}, "logits: expected float32"),
        ({"words": torch.zeros(3, 33, dtype=torch.int16), "tops": torch.zeros(3, 1)}, "words: expected 4 rows"),
        *WORDS_AND_TOPS,
    ],
)
def test_bad_input_of_packed_scores_is_named(change, message):
    given = {"logits": torch.zeros(4, 33), "words": torch.zeros(4, 33, dtype=torch.int16), "tops": torch.zeros(4, 1)}
    given |= change
    targets, state = torch.zeros(4, dtype=torch.int64), new_state(4, given["logits"].device)
    terms = (targets, None, 1.0, 1.0, 0, 0, state)
    with pytest.raises(ValueError, match=message):
        torch.ops.trl_fast.row_scores_packed(given["logits"], *terms, given["words"], given["tops"])


SHARED = torch.zeros(4, 66, dtype=torch.int16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out": torch.zeros(4, 33, dtype=torch.bfloat16)}, "out: expected float32"),
        ({"words": torch.zeros(5, 33, dtype=torch.int16), "tops": torch.zeros(5, 1)}, "words: expected 4 rows"),
        ({"index": torch.tensor([0, 1, 2, 4])}, "index: expected rows of words, below 4"),
        ({"index": torch.tensor([0, -1, 2, 3])}, "index: expected rows of words, below 4"),
        ({"index": torch.tensor([0, 1])}, "index: expected shape"),
        ({"words": SHARED, "out": SHARED.view(torch.float32)}, "out: only a 16-bit gradient of all rows"),
        *WORDS_AND_TOPS,
    ],
)
def test_bad_input_of_packed_gradients_is_named(change, message):
    given = {"words": torch.zeros(4, 33, dtype=torch.int16), "index": None, "out": torch.zeros(4, 33)}
    given |= {"tops": torch.zeros(4, 1), **change}
    terms = (torch.zeros(4, dtype=torch.int64), 1.0, 1.0, torch.zeros(4), torch.zeros(4, 4), 0)
    with pytest.raises(ValueError, match=message):
        torch.ops.trl_fast.row_grad_packed(given["words"], given["index"], *terms, given["out"], given["tops"])
