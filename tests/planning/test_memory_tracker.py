"""Tests what a computation on fake tensors takes."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.seen_operators import SeenOperators
from trl_fast.ops import linear_logprob
from trl_fast.ops.head.gradients import active_rows
from trl_fast.planning.memory_timeline import GRADIENTS, WEIGHTS
from trl_fast.planning.memory_tracker import MemoryTracker


def track(function, **options):
    tracker = MemoryTracker(**options)
    with FakeTensorMode(), tracker:
        tracker.enter("all")
        function(tracker)
    return tracker.timeline()


def test_storages_count_once_and_as_long_as_anything_has_them():
    def compute(tracker):
        x = torch.empty(1000, dtype=torch.float32)
        view = x.view(10, 100).t()
        del x
        torch.empty(250, dtype=torch.float32)
        view.add_(1)
        del view
        torch.empty(1, dtype=torch.float32)

    assert track(compute).levels.sum(axis=0).tolist() == [4000, 4000, 4000, 5000, 4000, 4]


def test_autograd_keeps_what_backward_needs():
    def compute(tracker):
        x = torch.empty(1000, requires_grad=True)
        y = (x * 2).exp().sum()
        tracker.enter("backward")
        y.backward()

    peaks = track(compute).stage_peaks()
    # x, 2x while exp reads it, exp(2x), which exp keeps; 2 need not be kept.
    assert peaks["all"].bytes == 3 * 4000 or peaks["all"].bytes == 3 * 4000 + 4
    assert peaks["backward"].bytes <= 4 * 4000 + 8


def test_kinds_by_label_and_by_block():
    def compute(tracker):
        with tracker.labelling(WEIGHTS):
            weight = torch.empty(100, dtype=torch.float32)
        grad = torch.empty_like(weight)
        tracker.label(grad, GRADIENTS)
        torch.empty_like(weight)

    parts = track(compute).peak().parts
    assert parts[WEIGHTS] == parts[GRADIENTS] == 400


def test_sizes_are_rounded_up_and_operators_have_memory_of_their_own():
    def compute(tracker):
        torch.empty(1, dtype=torch.float32).exp()

    def workspace(func, args):
        return 1000 if func is torch.ops.aten.exp.default else 0

    assert track(compute, granularity=512, workspace=workspace).peak().bytes == 2 * 512 + 1024


def test_the_inside_of_our_ops_is_seen():
    tokens, vocab, width = 64, 512, 32

    def compute(tracker):
        hidden, weight = torch.empty(tokens, width), torch.empty(vocab, width)
        targets = torch.empty(tokens, dtype=torch.int64)
        linear_logprob(hidden, weight, targets, backend="torch")

    # A tile of logits, of which the fake implementation of the op knows nothing.
    assert track(compute).peak().bytes > 4 * tokens * vocab


def test_every_row_counts():
    def compute(tracker):
        assert active_rows(torch.empty(4, 10)) is None

    track(compute)


def test_rows_have_the_strides_of_real_ones():
    """A product of a row and a frozen weight is one of matrices by them, and is kept as such."""

    def attended():
        return torch.empty(6, 4, 8).transpose(0, 1)[None].transpose(1, 2).contiguous().reshape(1, 6, -1)

    with FakeTensorMode(), MemoryTracker():
        row, weight = attended(), torch.empty(32, 32)
        part, number = torch.empty(6)[2:].view(1, 4), torch.empty(()).view(())
        with SeenOperators() as seen:
            torch.nn.functional.linear(row, weight)
    assert row.stride() == attended().stride() == (192, 32, 1)
    assert part.stride() == (4, 1) and part.storage_offset() == 2 and number.dim() == 0
    assert "aten::mm" in seen.names and "aten::bmm" not in seen.names
