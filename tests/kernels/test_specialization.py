"""Tests when Triton compiles a kernel again: the key that its JIT looks kernels up by, for tensors of many sizes."""

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from trl_fast.kernels import (
    attention_merge,
    divergence_kernels,
    layer_kernels,
    linear_scores,
    rotary_kernels,
    row_kernels,
)
from trl_fast.ops.head.sweep import new_state

pytestmark = pytest.mark.gpu_code

NUM_ROWS, COLUMNS = 48, 64
# First and last row: lengths of 1 and of multiples of 16, starts at odd addresses, other widths of the states.
PARTS = ((0, 1), (1, 2), (0, 16), (1, 17), (3, 20), (0, 48))
TRANSFORM = (1.0, 0.0, 1.0)


class Launches:
    """In the place of a kernel: the keys of its launches, none of which runs."""

    def __init__(self, kernel):
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.keys = set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        _, specialization, _ = self.bind(*args, **options)
        self.keys.add(tuple(specialization))


@pytest.fixture
def keys_of(monkeypatch):
    def replace(module, name):
        launches = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, launches)
        return launches.keys

    return replace


def score(logits, targets, state):
    row_kernels.row_scores(logits, targets, torch.zeros(logits.shape[1]), *TRANSFORM, 0, 0, state)


def differentiate(logits, targets, lse, coefficients):
    row_kernels.row_grad(logits, targets, torch.zeros(logits.shape[1]), *TRANSFORM, lse, coefficients, 0, logits)


def test_row_kernels_are_compiled_once_whatever_the_rows(keys_of):
    scores, grads = keys_of(row_kernels, "row_scores_kernel"), keys_of(row_kernels, "row_grad_kernel")
    logits, targets, lse = torch.zeros(NUM_ROWS, COLUMNS), torch.zeros(NUM_ROWS, dtype=torch.int64), torch.zeros(48)
    whole = new_state(NUM_ROWS, logits.device)
    for first, last in PARTS:
        part = slice(first, last)
        for state in (whole[:, part], new_state(last - first, logits.device)):
            score(logits[part], targets[part], state)
        differentiate(logits[part], targets[part], lse[part], torch.zeros(4, last - first))
    assert len(scores) == len(grads) == 1
    # Widths of the logits do count, for the sake of 16-byte accesses.
    score(torch.zeros(NUM_ROWS, COLUMNS + 1), targets, whole)
    differentiate(torch.zeros(NUM_ROWS, COLUMNS + 1), targets, lse, torch.zeros(4, NUM_ROWS))
    assert len(scores) == len(grads) == 2


def test_rows_are_scored_by_the_same_kernel_whether_they_are_packed_or_not(keys_of):
    """Another kernel might add up in another order: a row's log-prob would depend on whether a gradient follows."""
    keys = keys_of(row_kernels, "row_scores_kernel")
    for columns, outputs in ((4096, 0), (2064, 15)):
        logits, targets = torch.zeros(NUM_ROWS, columns), torch.zeros(NUM_ROWS, dtype=torch.int64)
        words, tops = torch.empty(NUM_ROWS, 4112, dtype=torch.int16), torch.empty(NUM_ROWS, 3)
        state, before = new_state(NUM_ROWS, logits.device), len(keys)
        row_kernels.row_scores(logits, targets, None, *TRANSFORM, outputs, 0, state)
        for first, last in PARTS:
            part = slice(first, last)
            given = (logits[part], targets[part], None, 1.0, 1.0, outputs, 0, state[:, part])
            row_kernels.row_scores_packed(*given, words[part], tops[part])
        assert len(keys) == before + 1


def test_packed_gradients_are_compiled_once_whatever_the_rows(keys_of):
    keys = keys_of(row_kernels, "row_grad_packed_kernel")
    words, tops = torch.zeros(NUM_ROWS, 4096, dtype=torch.int16), torch.zeros(NUM_ROWS, 2)
    out, targets, lse = words.view(torch.bfloat16), torch.zeros(NUM_ROWS, dtype=torch.int64), torch.zeros(NUM_ROWS)
    for first, last in PARTS:
        part, coefficients = slice(first, last), torch.zeros(4, last - first)
        given = (targets[part], 1.0, 1.0, lse[part], coefficients, 0, out[part])
        row_kernels.row_grad_packed(words[part], None, *given, tops[part])
    assert len(keys) == 1


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_the_fused_kernel_is_compiled_once_whatever_the_rows_and_the_vocabulary(keys_of, capability):
    keys = keys_of(linear_scores, "linear_scores_kernel")
    merges = keys_of(linear_scores, "merge_tiles_kernel")
    hidden = torch.zeros(NUM_ROWS, 32, dtype=torch.bfloat16)
    targets = torch.zeros(NUM_ROWS, dtype=torch.int64)
    for scale, count in ((1.0, 1), (0.7, 2), (0.3, 2)):
        for (first, last), vocab_size in zip(PARTS, (1, 7, 16, 2049, 4096, 5000), strict=True):
            weight, state = torch.zeros(vocab_size, 32, dtype=torch.bfloat16), torch.zeros(7, last - first)
            given = (hidden[first:last], [weight], targets[first:last], None, (scale, 0.0, 1.0), 0, state, None, None)
            linear_scores.linear_scores(*given, linear_scores.TILES[capability], vocab_size=vocab_size)
        assert (len(keys), len(merges)) == (count, 1)


def test_attention_is_merged_by_one_kernel_whatever_the_tokens(keys_of):
    keys = keys_of(attention_merge, "merge_kernel")
    for tokens, second in ((1, 1), (16, 3), (17, 16), (4096, 1)):
        out, lse = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16), torch.zeros(4, tokens)
        place = torch.zeros(tokens + 1, dtype=torch.int32)[1:]
        other = (torch.zeros(second, 4, 64, dtype=torch.bfloat16), torch.zeros(4, second))
        attention_merge.merge(out, lse, *other, place, torch.empty_like(out), torch.empty_like(lse))
    assert len(keys) == 1


def test_layers_are_compiled_once_whatever_the_rows(keys_of):
    norms, norms_back = keys_of(layer_kernels, "norm_kernel"), keys_of(layer_kernels, "norm_backward_kernel")
    gates, rotations = keys_of(layer_kernels, "gate_kernel"), keys_of(rotary_kernels, "norm_rotary_kernel")
    rotations_back = keys_of(rotary_kernels, "norm_rotary_backward_kernel")
    weight, whole = torch.zeros(COLUMNS), torch.zeros(NUM_ROWS + 1, COLUMNS)
    for first, last in PARTS:
        x, rstd = whole[first:last], torch.zeros(NUM_ROWS)[first:last]
        layer_kernels.rms_norm(x, x, weight, 1e-6, 0, x, x, rstd)
        layer_kernels.rms_norm_backward(x, x, x, weight, rstd, 0, x, torch.zeros(last - first, COLUMNS))
        layer_kernels.gated_activation(whole[:, :32][first:last], whole[:, 32:][first:last], 0, torch.zeros(1, 32))
        heads, angles = x.view(1, -1, 2, 32).transpose(1, 2), torch.zeros(1, last - first, 32)
        way = (angles, angles, 0, False, False)
        rotary_kernels.norm_rotary(heads, weight[:32], 1e-6, 0, *way, heads, rstd)
        rotary_kernels.norm_rotary_backward(heads, heads, weight[:32], rstd, 0, *way, heads, torch.zeros(1, 32))
    assert len(norms) == len(norms_back) == len(rotations) == len(rotations_back) == 1
    assert len(gates) == 1


def test_divergences_are_compiled_once_whatever_the_rows_and_the_numbers(keys_of):
    keys = keys_of(divergence_kernels, "row_divergence_kernel")
    student, teacher = torch.zeros(2, NUM_ROWS, COLUMNS)
    weights, results = torch.zeros(NUM_ROWS), torch.zeros(3, NUM_ROWS)
    heads = ((1.0, 0.0, 0.5), (0.7, 0.0, 0.5), (1.0, 0.0, 0.3))
    for (first, last), numbers in zip(PARTS, (*heads, *heads), strict=True):
        part, (scale, softcap, mixture) = slice(first, last), numbers
        head_p, head_q = (student[part], None, scale, softcap), (teacher[part], None, 1.0, 0.0)
        formula = (mixture, 1 - mixture, mixture, False)
        given = (*head_p, *head_q, 1.0, *formula, weights[part], results[:, part], student[part])
        divergence_kernels.row_divergence(*given)
    assert len(keys) == 1
