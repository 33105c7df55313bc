"""Tests the fused product and row statistics in Triton: against float64, kept logits, layouts, machine code."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu_machine_code import SHARED_BYTES, SHARED_RESERVED
from benchmarks.kernel_report import HEAD_KERNELS, compile_kernel, resources
from support.heads import FLOOR, assert_as_good, make_problem, scores_from_logits
from support.triton_interpreter import interpreted_kernels
from trl_fast.kernels import linear_scores
from trl_fast.kernels.linear_scores import INTERPRETED_TILES
from trl_fast.ops import device, linear_logprob, linear_token_loss
from trl_fast.ops.head import fused_kernel, gradients, sweep
from trl_fast.ops.head.fused_kernel import SlicedWeight, empty_packed, fused_tiles, score_rows_fused, try_out
from trl_fast.ops.head.kept_logits import KeptLogits, unpack
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.plan import slices
from trl_fast.ops.head.row_statistics import (
    ENTROPY_ROW,
    IS_TOP1_ROW,
    LOG_SUM_SQ_ROW,
    LOGPROB_ROW,
    LSE_ROW,
    MEAN_LOGITS_ROW,
    output_mask,
)
from trl_fast.ops.head.sweep import finish_scores, new_state

pytestmark = pytest.mark.gpu_code

CPU = torch.device("cpu")
ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
EVERYTHING = output_mask(ALL_OUTPUTS)
ROW_OF = {
    "logprobs": LOGPROB_ROW,
    "entropy": ENTROPY_ROW,
    "log_sum_sq_probs": LOG_SUM_SQ_ROW,
    "mean_logits": MEAN_LOGITS_ROW,
}
# The interpreter is slow: tiles of 16 rows and 128 columns.
SMALL, THREE_TILES = INTERPRETED_TILES, 2 * 128 + 77
# Matrices by TMA or by pointers, loops flattened or not, a single piece: what configurations differ in.
KINDS = {
    "tma": SMALL,
    "pointers": SMALL._replace(tma=False, flatten=False),
    "pieces of 16": SMALL._replace(pieces=8, flatten=False),
    "one piece": SMALL._replace(pieces=1, group=2),
}
# First and last columns of tiles and of their pieces.
EDGES = (0, 63, 64, 127, 128, 255, 256, THREE_TILES - 1)
DTYPES = (torch.bfloat16, torch.float16)

SHAPES = {
    "plain": dict(n=13, v=257),
    "one row": dict(n=1, v=1000),
    "zero rows": dict(n=0, v=130),
    "one word": dict(n=3, v=1),
    "several blocks of rows": dict(n=37, v=130),
    "targets in each of three tiles": dict(n=len(EDGES), v=THREE_TILES),
    "many tiles": dict(n=3, v=40 * 128 + 5),
    "hidden size beyond one step": dict(n=5, v=200, h=104, spread=0.2),
    "offset 1e4": dict(n=9, v=300, offset=1e4),
    "temperature": dict(n=9, v=300, temperature=0.6),
    "all": dict(n=9, v=300, bias=True, logit_scale=0.5, temperature=1.7),
    "softcap": dict(n=9, v=300, softcap=3.0),
    "softcap and all": dict(n=9, v=300, bias=True, softcap=2.0, logit_scale=1.5, temperature=0.8),
    "peaked": dict(n=9, v=300, spread=20.0),
}


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Every test but those that compile runs the kernels in the interpreter."""
    if "target" in request.fixturenames:
        yield
    else:
        with interpreted_kernels():
            yield


def problem_of(shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    if shape["v"] == THREE_TILES:
        problem.targets = torch.tensor(EDGES)
    return problem


def sliced(weight, columns):
    """The weight by slices of so many columns, in one place: that of the slice before is gone."""
    place = torch.empty(columns, weight.shape[1], dtype=weight.dtype)

    def tile(part):
        place.fill_(float("nan"))
        return place[: part.stop - part.start].copy_(weight[part])

    return SlicedWeight(slices(0, len(weight), columns), tile)


def raw_room(kept, v):
    values = torch.empty(1, kept, -(-v // 64) * 64)
    return KeptLogits(values, None, v)


def run(problem, outputs=EVERYTHING, kept=0, part_bytes=1 << 30, columns=None, tiles=SMALL, raw=False):
    """Statistics (7, N), and what was kept of the first rows; memory is poisoned before.

    columns: of a slice of the weight; raw: float32 logits are kept, not words.
    """
    n, v = len(problem.targets), len(problem.weight)
    keep = (raw_room(kept, v) if raw else empty_packed(kept, v, CPU, SMALL.columns)) if kept else None
    if raw:
        keep.values.fill_(float("nan"))
    elif kept:
        keep.values.fill_(12345)
        keep.tops.fill_(float("nan"))
    transform = LogitTransform.of(**problem.transform)
    bias = None if problem.bias is None else problem.bias.detach()
    weight = problem.weight.detach()
    weight = SlicedWeight.whole(weight) if columns is None else sliced(weight, columns)
    given = (problem.hidden.detach(), weight, problem.targets, bias, transform, outputs)
    state = new_state(n, CPU)
    score_rows_fused(*given, state, keep, tiles, part_bytes)
    return finish_scores(state, outputs, v, torch.float32), keep


def assert_scores(problem, statistics, dtype):
    exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
    baseline = scores_from_logits(problem.logits(None), problem.targets)
    for name, row in ROW_OF.items():
        assert_as_good(statistics[row], baseline[name], exact[name], name, FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(shape, tiles, dtype):
    problem = problem_of(shape, dtype)
    statistics, _ = run(problem, tiles=tiles)
    assert_scores(problem, statistics, dtype)
    if not shape.get("offset"):
        # Products of 16-bit numbers are exact in float32, and so is, nearly, their sum: there are no ties.
        exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
        assert torch.equal(statistics[IS_TOP1_ROW].bool(), exact["is_top1"])


@pytest.mark.parametrize("kept", [1, 20, 37])
@pytest.mark.parametrize("tiles", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("shape", [dict(v=THREE_TILES), dict(v=300, bias=True, temperature=0.7)])
def test_kept_logits_and_the_same_bits_with_and_without(kept, tiles, shape):
    problem = make_problem(n=37, **shape, dtype=torch.bfloat16, spread=0.5)
    statistics, keep = run(problem, kept=kept, tiles=tiles)
    assert torch.equal(statistics, run(problem, tiles=tiles)[0])
    v = shape["v"]
    logits = unpack(keep.values[0, :, :v], keep.tops[0], SMALL.columns)
    targets = problem.targets[:kept, None]
    assert (logits.gather(1, targets) == float("-inf")).all()
    away = (logits - problem.logits(torch.float64)[:kept]).scatter(1, targets, 0.0)
    assert away.abs().max() <= 2**-11 + 1e-5


@pytest.mark.parametrize("kept", [1, 20, 37])
@pytest.mark.parametrize("tiles", KINDS.values(), ids=KINDS.keys())
def test_raw_logits_of_a_capped_head_and_the_same_bits_with_and_without(kept, tiles):
    problem = make_problem(n=37, v=THREE_TILES, dtype=torch.bfloat16, softcap=2.0, bias=True)
    statistics, keep = run(problem, kept=kept, tiles=tiles, raw=True)
    assert torch.equal(statistics, run(problem, tiles=tiles)[0])
    raw = problem.hidden.detach().double() @ problem.weight.detach().double().t()
    torch.testing.assert_close(keep.values[0, :, :THREE_TILES].double(), raw[:kept], rtol=1e-6, atol=1e-6)
    assert keep.values[0, :, THREE_TILES:].isnan().all()


def test_a_row_has_the_same_bits_whatever_the_others():
    problem = make_problem(n=50, v=THREE_TILES, dtype=torch.bfloat16)
    whole, _ = run(problem)
    for part_bytes in (1, 3 * 4 * 6 * 17):
        assert torch.equal(run(problem, part_bytes=part_bytes)[0], whole)
    problem.hidden, problem.targets = problem.hidden[20:23], problem.targets[20:23]
    assert torch.equal(run(problem)[0], whole[:, 20:23])


@pytest.mark.parametrize("shape", [dict(n=len(EDGES), v=THREE_TILES), dict(n=5, v=300, bias=True, temperature=0.7)])
@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("tiles", [KINDS["tma"], KINDS["pointers"]], ids=["tma", "pointers"])
def test_slices_of_the_weight_give_the_same_bits(shape, columns, tiles):
    problem = problem_of(shape, torch.bfloat16)
    (whole, kept), (by_slices, kept_by_slices) = (
        run(problem, kept=4, columns=one, tiles=tiles) for one in (None, columns)
    )
    assert torch.equal(by_slices, whole)
    v = shape["v"]
    assert torch.equal(kept_by_slices.values[..., :v], kept.values[..., :v])
    assert torch.equal(kept_by_slices.tops, kept.tops)


def test_sums_of_many_rows_lie_beyond_32_bits():
    """As those of a million rows and 256,000 columns do; only the pages that are touched take memory."""
    problem = make_problem(5, 300, dtype=torch.bfloat16)
    slot_stride, outputs = 2**30, output_mask(("entropy",))
    parts = torch.empty(2 * slot_stride + 15).as_strided((3, 3, 5), (slot_stride, 5, 1))
    state = new_state(5, CPU)
    strides, given = (slot_stride, 5, state, 5), (problem.hidden.detach(), problem.weight.detach(), problem.targets)
    linear_scores.score_slice(*given, None, (1.0, 0.0, 1.0), outputs, None, parts, strides, SMALL)
    linear_scores.merge_tiles_kernel[(1,)](
        parts, *strides, parts, 0, 5, 3, OUTPUTS=outputs, KEEP=False, ROWS=16, TILES=4
    )
    found = finish_scores(state, outputs, 300, torch.float32)
    assert torch.equal(found[[LOGPROB_ROW, ENTROPY_ROW]], run(problem, outputs)[0][[LOGPROB_ROW, ENTROPY_ROW]])


@pytest.mark.parametrize("largest", [(130, 300, 320), (300, 320), (320, 325)])
def test_top1(largest):
    """The first of several largest logits counts, in whichever tiles they are."""
    problem = make_problem(6, THREE_TILES, h=16, dtype=torch.bfloat16)
    with torch.no_grad():
        problem.weight[:] = torch.linspace(-0.1, 0.1, THREE_TILES)[:, None]
        problem.weight[list(largest)] = 1.0
        problem.hidden[:] = 1.0
    problem.targets = torch.tensor([130, 300, 320, 325, 129, 0])
    statistics, _ = run(problem)
    assert torch.equal(statistics[IS_TOP1_ROW].bool(), problem.targets == largest[0])


def test_minus_infinity():
    """-inf logits: some of them, a whole tile of them, and all."""
    problem = make_problem(4, THREE_TILES, bias=True, dtype=torch.bfloat16)
    with torch.no_grad():
        problem.bias[:150] = float("-inf")
        problem.bias[310:] = float("-inf")
    problem.targets = torch.tensor([150, 200, 309, 17])
    statistics, keep = run(problem, kept=4)
    logp = problem.logits(torch.float64).log_softmax(-1)
    exact = logp.gather(1, problem.targets[:, None])[:, 0]
    torch.testing.assert_close(statistics[LOGPROB_ROW].double(), exact, rtol=1e-5, atol=1e-5)
    assert statistics[LOGPROB_ROW, 3] == float("-inf")
    entropy = torch.special.entr(logp.exp()).sum(-1)
    torch.testing.assert_close(statistics[ENTROPY_ROW].double(), entropy, rtol=1e-5, atol=1e-5)
    assert (statistics[MEAN_LOGITS_ROW] == float("-inf")).all()
    assert (unpack(keep.values[0, :, :THREE_TILES], keep.tops[0], 128)[:, :150] == float("-inf")).all()
    with torch.no_grad():
        problem.bias[:] = float("-inf")
    assert (run(problem)[0][LSE_ROW] == float("-inf")).all()


@pytest.mark.parametrize("tiles", [KINDS["tma"], KINDS["pointers"]], ids=["tma", "pointers"])
def test_a_target_outside_the_vocabulary_is_nan(tiles):
    problem = make_problem(3, 200, dtype=torch.bfloat16)
    problem.targets = torch.tensor([5, 200, -1])
    statistics, _ = run(problem, tiles=tiles)
    assert statistics[LOGPROB_ROW].isnan().tolist() == [False, True, True]
    # The mean does not ask for the target.
    mean = problem.logits(torch.float64).detach().mean(1).float()
    torch.testing.assert_close(statistics[MEAN_LOGITS_ROW], mean, rtol=1e-5, atol=1e-5)


def test_layouts():
    """Rows, columns and targets that are not adjacent in memory, and rows that begin anywhere."""
    problem = make_problem(10, 300, h=48, bias=True, dtype=torch.bfloat16)
    wanted, _ = run(problem)
    with torch.no_grad():
        problem.hidden = problem.hidden.t().contiguous().t()
        problem.weight = torch.cat([problem.weight[:, :3], problem.weight], 1)[:, 3:]
        problem.targets, problem.bias = (torch.stack([x, x], 1)[:, 0] for x in (problem.targets, problem.bias))
    assert torch.equal(run(problem)[0], wanted)


def test_which_heads_it_serves():
    def tiles(backend="triton", hidden_size=64, dtype=torch.bfloat16):
        return fused_tiles(backend, hidden_size, dtype, CPU)

    assert tiles() is INTERPRETED_TILES and tiles("cuda") is INTERPRETED_TILES
    assert tiles("torch") is tiles("cpp") is tiles(hidden_size=60) is tiles(dtype=torch.float32) is None


@pytest.fixture
def fused_calls(monkeypatch):
    """Row counts of the launches, and whether logits are kept. The head is cut, and computes, as on a GPU."""
    calls = []
    launch = linear_scores.linear_scores

    def counted(*given, **sizes):
        calls.append((len(given[0]), given[-3] is not None))
        return launch(*given, **sizes)

    monkeypatch.setattr(linear_scores, "linear_scores", counted)
    monkeypatch.setitem(device.simulated.facts, "cpu", device.DeviceFacts("cuda", multiplies_bf16=True))

    def float32_product(out, left, right):
        return out.copy_(left.float() @ right.float())

    for module in (sweep, gradients):
        monkeypatch.setattr(module, "mm_into", float32_product)
        monkeypatch.setattr(module, "add_mm", lambda total, left, right: total.add_(left.float() @ right.float()))
    return calls


@pytest.mark.parametrize("transform", [{}, {"softcap": 2.0, "temperature": 0.7}], ids=["plain", "capped"])
def test_the_op_scores_by_it_with_and_without_a_gradient(fused_calls, transform):
    problem = make_problem(40, THREE_TILES, dtype=torch.bfloat16, bias=True, **transform)
    given = (problem.hidden, problem.weight, problem.targets)
    options = {"bias": problem.bias, "outputs": ("logprobs", *ALL_OUTPUTS), "backend": "triton", **transform}
    with torch.no_grad():
        alone = linear_logprob(*given, **options)
    assert fused_calls == [(40, False)]
    trained = linear_logprob(*given, **options)
    assert fused_calls[1:] == [(40, True)]
    frozen = linear_logprob(problem.hidden, problem.weight.detach(), problem.targets, **options)
    by_token = linear_token_loss(*given, lambda scores, rows: scores.logprobs.sum(), **options).scores
    exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
    baseline = scores_from_logits(problem.logits(None), problem.targets)
    for name in ROW_OF:
        assert_as_good(getattr(alone, name), baseline[name], exact[name], name, FLOOR[torch.bfloat16])
        for scores in (trained, by_token) if name != "logprobs" else (trained, frozen, by_token):
            assert torch.equal(getattr(scores, name), getattr(alone, name)), name
    # What was kept on the way is what the gradient needs.
    trained.logprobs.sum().backward()
    inputs = (problem.hidden, problem.weight)
    in_float64, in_bfloat16 = (
        torch.autograd.grad(gathered(problem, dtype).sum(), inputs) for dtype in (torch.float64, None)
    )
    for own, exact, baseline in zip(inputs, in_float64, in_bfloat16, strict=True):
        assert_as_good(own.grad, baseline, exact, "gradient", FLOOR[torch.bfloat16])


def gathered(problem, dtype):
    """The targets' log-probs by plain PyTorch."""
    return problem.logits(dtype).log_softmax(-1).gather(1, problem.targets[:, None])


def test_the_op_scores_by_it_where_that_serves_only(fused_calls):
    problem = make_problem(5, 300, dtype=torch.bfloat16)
    given = (problem.hidden, problem.weight, problem.targets)
    with torch.no_grad():
        linear_logprob(*given, backend="torch")
        linear_logprob(problem.hidden.float(), problem.weight.float(), problem.targets, backend="triton")
    assert fused_calls == []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        linear_logprob(problem.hidden, problem.weight.float(), problem.targets, backend="triton")
    assert fused_calls == [(5, False)]


# It takes long to compile: all but what every run with a gradient takes are slow tests.
FUSED = [
    pytest.param(case, target, marks=[] if case.label.endswith("bf16 log-probs, kept") else pytest.mark.slow)
    for case in HEAD_KERNELS
    for target in case.targets
    if case.label.startswith("linear_scores")
]


@pytest.mark.parametrize(("case", "target"), FUSED, ids=lambda x: getattr(x, "label", x))
def test_compiles_to_tensor_cores(case, target):
    found = resources(compile_kernel(case, target), case.num_warps, target)
    assert found.tensor_core_instructions > 0
    assert found.shared_bytes <= SHARED_BYTES[target] - SHARED_RESERVED
    assert found.spill_bytes == 0


@pytest.mark.slow
def test_it_is_tried_out(monkeypatch):
    """As on a new GPU: right numbers pass, and each kind of wrong one is found."""

    def tried():
        return try_out(INTERPRETED_TILES, torch.bfloat16, CPU)

    assert tried() == ""
    launch = linear_scores.linear_scores

    def with_wrong(which):
        def wrong(*given, **sizes):
            launch(*given, **sizes)
            state, words = given[6], given[7]
            if which == "state":
                state[1] *= 1.01
            elif words is not None:
                words[5, 300] += 9

        monkeypatch.setattr(linear_scores, "linear_scores", wrong)

    with_wrong("state")
    assert tried() == "log-probs differ from PyTorch's"
    with_wrong("words")
    assert tried() == "kept logits differ from PyTorch's"


def test_where_it_does_not_work_two_steps_are_taken_and_it_is_said_once(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr(fused_kernel, "try_out", broken)
    fused_kernel._works.cache_clear()
    for _ in range(2):
        assert not fused_kernel._works(INTERPRETED_TILES, torch.bfloat16, CPU)
    fused_kernel._works.cache_clear()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "does not work on cpu (RuntimeError: PassManager::run failed); its scores take two steps" in message


@pytest.mark.slow
def test_it_is_tried_out_on_data_also_where_tensors_have_none():
    fused_kernel._works.cache_clear()
    with FakeTensorMode():
        assert fused_kernel._works(INTERPRETED_TILES, torch.bfloat16, CPU)
    fused_kernel._works.cache_clear()
