"""Operations of attention with windows, on fake tensors, against the pairs that a dense mask has."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.row_attention import dense_mask
from trl_fast.modeling.attention.row_attention import RowMask
from trl_fast.modeling.attention.tree_attention import tree_attention
from trl_fast.modeling.attention.varlen import _varlen_calls
from trl_fast.ops.device import device_facts, simulated_device
from trl_fast.planning.device_facts import GPU_KERNELS, KINDS_BY_CODE, padded_attention, planned_facts
from trl_fast.planning.memory_tracker import MemoryTracker
from trl_fast.planning.roofline.flops import flops_of
from trl_fast.planning.roofline.work import WorkCounter

CPU = torch.device("cpu")
HEADS, WIDTH = 4, 64


def counted(run):
    """The operations of attention of a call and of its backward pass, and the peak of memory."""
    tracker = MemoryTracker(
        kernels=GPU_KERNELS, kinds_by_code=KINDS_BY_CODE, observe=lambda *given: counter.observe(*given)
    )
    counter = WorkCounter(lambda: tracker.stage, tracker.was_there)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, simulated_device(planned_facts("gpu")):
        out = run(*make_states(tracker))
        tracker.enter("backward")
        out.sum().backward()
    forward, backward = (counter.by_stage[stage].attention_flops for stage in ("forward", "backward"))
    return forward, backward, tracker.timeline().peak().bytes


def make_states(tracker, tokens=900):
    made = [torch.empty(1, heads, tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True) for heads in (HEADS, 2, 2)]
    tracker.enter("forward")
    return made


@pytest.mark.parametrize("window", [7, 200])
def test_rows_with_windows_are_counted_by_what_their_tokens_see(window):
    trees = ((400, 60, (90, 30, 20)), (300,))
    query = torch.empty(900, HEADS, WIDTH, dtype=torch.bfloat16)
    flops = 0.0
    for call in _varlen_calls(RowMask(trees, window), CPU, device_facts(CPU)):
        given = {"query": query, "key": query, "cum_seq_q": call.cu_seqlens_q, "cum_seq_k": call.cu_seqlens_k}
        flops += flops_of(torch.ops.aten._flash_attention_forward.default, given | call.options).flops
    assert flops == 2 * 2 * HEADS * WIDTH * int(dense_mask(trees, window).sum())


def test_a_row_in_a_simulation_is_counted_by_its_longest_sequences():
    """The values of tensors are not known there: one sequence is counted as it is."""
    for window in (7, 200):
        forward, backward, _ = counted(
            lambda *states, window=window: tree_attention(*states, ((900,),), window=window)
        )
        pairs = int(dense_mask(((900,),), window).sum())
        assert (forward, backward) == (2 * 2 * HEADS * WIDTH * pairs, 5 * 2 * HEADS * WIDTH * pairs)


def test_padded_rows_with_windows_need_a_number_for_every_pair():
    """As SDPA has them: no kernel of its skips what a mask hides."""

    def padded(window):
        return counted(lambda *states: padded_attention(None, *states, None, sliding_window=window)[0])

    plain, windowed = padded(None), padded(200)
    assert windowed[0] == 2 * plain[0] and windowed[2] > plain[2] + 2 * 900 * 900
    # A window that holds the row is none.
    assert padded(900) == plain
