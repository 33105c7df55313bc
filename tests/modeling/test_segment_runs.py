"""In which batches the segments of a row run, and what of them is computed for nothing."""

import random

import pytest
import torch

from trl_fast.data.segments import num_tokens, segments_of
from trl_fast.modeling.segment_runs import BATCH_COSTS, MIN_CONTINUED_TOKENS, States, row_runs
from trl_fast.ops.device import simulated_device
from trl_fast.planning.device_facts import planned_facts

CPU = torch.device("cpu")
ROWS = {
    "prompts with branches": ((20, 3, 5), (300, 40, 1), (7, 2)),
    "sequences alone": ((5,), (400,), (6,), (0,), (399,)),
    "nested": ((30, (9, 4, (70, 2, 3)), 5), (12, (11, 1, 2), (40, (13, 1, (1, 2, 2)), 3))),
    "empty segments": ((0, 3, (0, 4, (2, 0, 1))), (9, 0, 0), (6, (0, 5, 6))),
    "one token": ((1, 1, 1), (1, (1, 1, (1, 1, 1))), (1,)),
    "empty row": (),
}


def paths(trees):
    """The tokens before each token of a row, in its own sequence."""
    segments, before = segments_of(trees), {None: []}
    found = {}
    for number, segment in enumerate(segments):
        tokens = list(before[segment.parent])
        for token in range(segment.start, segment.end):
            found[token] = list(tokens)
            tokens.append(token)
        before[number] = tokens
    return found


@pytest.mark.parametrize("kind", States, ids=lambda kind: kind.name)
@pytest.mark.parametrize("trees", ROWS.values(), ids=ROWS)
def test_each_token_runs_behind_the_tokens_of_its_sequence(trees, kind):
    runs = row_runs(trees, CPU, kind)
    expected, histories, outputs = paths(trees), [], []
    for batch in runs.batches:
        count, width = batch.shape
        tokens = batch.tokens.view(batch.shape)
        mask = torch.ones(batch.shape, dtype=torch.bool) if batch.mask is None else batch.mask
        for row in range(count):
            real = tokens[row][mask[row]].tolist()
            history = [] if batch.parents is None else list(histories[batch.parents[row]])
            outputs += [[*history, *real[:i]] for i in range(-(width - len(real)), len(real))]
            if batch.keeps_states:
                assert kind is not States.NONE and mask[row, -1]
                assert mask.all() or (kind is States.PADDED_LEFT and batch.parents is None)
                histories.append([*history, *real])
        if batch.parents is not None:
            assert width >= MIN_CONTINUED_TOKENS
    for token, place in enumerate(runs.places.tolist()):
        assert outputs[place] == expected[token]


def test_pads_and_batches_are_balanced():
    one = row_runs(((100, 30, 30),) * 8, CPU)
    assert [batch.shape for batch in one.batches] == [(8, 100), (16, 30)] and one.computed_tokens == 8 * 160
    near = row_runs(((100, 30), (90, 31)), CPU)
    assert [batch.shape for batch in near.batches] == [(2, 100), (2, 31)]
    far = row_runs(((100,), (100 - BATCH_COSTS["cpu"] - 1,)), CPU)
    assert [batch.shape for batch in far.batches] == [(1, 100), (1, 100 - BATCH_COSTS["cpu"] - 1)]


def test_a_gpu_runs_fewer_batches():
    trees = tuple((length, 40, 50) for length in range(100, 900, 50))
    cpu, gpu = (row_runs(trees, torch.device(kind)) for kind in ("cpu", "meta"))
    assert len(gpu.batches) < len(cpu.batches) and cpu.computed_tokens < gpu.computed_tokens


def test_a_simulated_gpu_has_the_batches_of_a_gpu():
    """Its tensors are on the CPU, and what was planned for the CPU itself is not taken."""
    trees = tuple((length, 40, 50) for length in range(100, 900, 50))
    cpu = row_runs(trees, CPU)
    with simulated_device(planned_facts("gpu")):
        simulated = row_runs(trees, CPU)
    assert len(simulated.batches) < len(cpu.batches)


def test_uneven_trees_waste_little():
    rng = random.Random(0)
    trees = tuple((int(rng.lognormvariate(5, 0.8)) + 1, *(rng.randint(1, 200) for _ in range(2))) for _ in range(24))
    total = sum(map(num_tokens, trees))
    assert row_runs(trees, CPU).computed_tokens < 1.1 * total
