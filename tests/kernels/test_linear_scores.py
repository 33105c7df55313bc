"""The fused product and row statistics in Triton: against float64, its layouts, and what it compiles to."""

import pytest
import torch

from benchmarks.kernel_report import HEAD_KERNELS, compile_kernel, resources
from support.heads import DTYPES, FLOOR, assert_as_good, make_problem, scores_from_logits
from support.triton_interpreter import interpreted_kernels
from trl_fast.kernels import linear_scores
from trl_fast.kernels.linear_scores import TILES, Tiles, num_splits, partial_states
from trl_fast.ops import fused_scores, linear_logprob, products
from trl_fast.ops.fused_scores import GPUS, fused_is_faster, merge_states
from trl_fast.ops.rows import LOGPROB_ROW, LSE_ROW, finish_scores
from trl_fast.ops.scores import ENTROPY_ROW, IS_TOP1_ROW, LOG_SUM_SQ_ROW, MEAN_LOGITS_ROW, output_mask
from trl_fast.ops.transform import LogitTransform

ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
EVERYTHING = output_mask(ALL_OUTPUTS)
ROW_OF = {
    "logprobs": LOGPROB_ROW,
    "entropy": ENTROPY_ROW,
    "log_sum_sq_probs": LOG_SUM_SQ_ROW,
    "mean_logits": MEAN_LOGITS_ROW,
}
# The interpreter is slow: fewer columns a split, and smaller tiles where the configuration does not matter.
SPLIT, THREE_SPLITS = 256, 2 * 256 + 77
SMALL = Tiles(16, 128, 32, 2)
# First and last columns of splits and of tiles.
EDGES = (0, 127, 128, 255, 256, 511, 512, THREE_SPLITS - 1)

SHAPES = {
    "plain": dict(n=13, v=257),
    "one row": dict(n=1, v=1000),
    "zero rows": dict(n=0, v=130),
    "one word": dict(n=3, v=1),
    "several blocks of rows": dict(n=37, v=130),
    "targets in each of three splits": dict(n=len(EDGES), v=THREE_SPLITS),
    "hidden size beyond one step": dict(n=5, v=200, h=100, spread=0.2),
    "offset 1e4": dict(n=9, v=300, offset=1e4),
    "temperature": dict(n=9, v=300, temperature=0.6),
    "softcap": dict(n=9, v=300, softcap=5.0),
    "all": dict(n=9, v=300, bias=True, softcap=8.0, logit_scale=0.5, temperature=1.7),
    "peaked": dict(n=9, v=300, spread=20.0),
}


@pytest.fixture(autouse=True)
def _interpreted(request, monkeypatch):
    """Every test but those that compile runs the kernels in the interpreter."""
    if "target" in request.fixturenames:
        yield
    else:
        monkeypatch.setattr(linear_scores, "COLUMNS_PER_SPLIT", SPLIT)
        with interpreted_kernels():
            yield


def problem_of(shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    if shape["v"] == THREE_SPLITS:
        problem.targets = torch.tensor(EDGES)
    return problem


def run(problem, tiles=SMALL, outputs=EVERYTHING):
    """Statistics (7, N) by the kernel and the merge, and the parts, poisoned before."""
    parts = torch.full((num_splits(len(problem.weight)), 7, len(problem.targets)), float("nan"))
    given = tuple(None if x is None else x.detach() for x in (problem.hidden, problem.weight))
    bias = None if problem.bias is None else problem.bias.detach()
    transform = LogitTransform.of(**problem.transform)
    partial_states(*given, problem.targets, bias, *transform, outputs, parts, tiles)
    state = merge_states(parts, problem.targets // SPLIT, outputs)
    return finish_scores(state, outputs, len(problem.weight), torch.float32), parts


def assert_scores(problem, statistics, dtype):
    exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
    baseline = scores_from_logits(problem.logits(None), problem.targets)
    for name, row in ROW_OF.items():
        assert_as_good(statistics[row], baseline[name], exact[name], name, FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(shape, dtype):
    problem = problem_of(shape, dtype)
    statistics, _ = run(problem)
    assert_scores(problem, statistics, dtype)
    if not shape.get("offset"):
        # Products of 16-bit numbers are exact in float32, and so is, nearly, their sum: there are no ties.
        exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
        assert torch.equal(statistics[IS_TOP1_ROW].bool(), exact["is_top1"])


@pytest.mark.parametrize("tiles", TILES.values(), ids=str)
def test_every_configuration(tiles):
    problem = problem_of(SHAPES["targets in each of three splits"], torch.bfloat16)
    statistics, _ = run(problem, tiles)
    assert_scores(problem, statistics, torch.bfloat16)


@pytest.mark.parametrize("largest", [(130, 300, 520), (300, 520), (520, 525)])
def test_top1(largest):
    """The first of several largest logits counts, in whichever splits they are."""
    problem = make_problem(6, THREE_SPLITS, h=16)
    with torch.no_grad():
        problem.weight[:] = torch.linspace(-0.1, 0.1, THREE_SPLITS)[:, None]
        problem.weight[list(largest)] = 1.0
        problem.hidden[:] = 1.0
    problem.targets = torch.tensor([130, 300, 520, 525, 129, 0])
    statistics, _ = run(problem)
    assert torch.equal(statistics[IS_TOP1_ROW].bool(), problem.targets == largest[0])


def test_minus_infinity():
    """-inf logits: some of them, a whole split of them, and all."""
    problem = make_problem(4, THREE_SPLITS, bias=True)
    with torch.no_grad():
        problem.bias[:300] = float("-inf")
        problem.bias[500:] = float("-inf")
    problem.targets = torch.tensor([300, 400, 499, 17])
    statistics, _ = run(problem)
    logp = problem.logits(torch.float64).log_softmax(-1)
    exact = logp.gather(1, problem.targets[:, None])[:, 0]
    torch.testing.assert_close(statistics[LOGPROB_ROW].double(), exact, rtol=1e-5, atol=1e-5)
    assert statistics[LOGPROB_ROW, 3] == float("-inf")
    entropy = torch.special.entr(logp.exp()).sum(-1)
    torch.testing.assert_close(statistics[ENTROPY_ROW].double(), entropy, rtol=1e-5, atol=1e-5)
    assert (statistics[MEAN_LOGITS_ROW] == float("-inf")).all()
    with torch.no_grad():
        problem.bias[:] = float("-inf")
    assert (run(problem)[0][LSE_ROW] == float("-inf")).all()


def test_layouts():
    """Rows, columns and targets that are not adjacent in memory."""
    problem = make_problem(10, 300, h=48, bias=True)
    wanted, _ = run(problem)
    with torch.no_grad():
        problem.hidden = problem.hidden.t().contiguous().t()
        problem.weight = torch.cat([problem.weight, problem.weight], 1)[:, :48]
        problem.targets, problem.bias = (torch.stack([x, x], 1)[:, 0] for x in (problem.targets, problem.bias))
    assert torch.equal(run(problem)[0], wanted)
    problem.weight = problem.weight.t().contiguous().t()
    with pytest.raises(ValueError, match="weight: expected rows of adjacent elements, got strides"):
        run(problem)


def test_offsets_beyond_32_bits():
    """Three rows of either factor, 2³⁰ elements apart; only the pages that are touched take memory."""
    problem = make_problem(3, 3, h=20, dtype=torch.bfloat16)
    wanted, _ = run(problem)
    for name in ("hidden", "weight"):
        near = getattr(problem, name).detach()
        far = torch.empty(2 * 2**30 + 20, dtype=torch.bfloat16).as_strided((3, 20), (2**30, 1))
        setattr(problem, name, far.copy_(near))
    assert torch.equal(run(problem)[0], wanted)


def test_sums_that_nobody_asked_for_are_not_written():
    _, parts = run(make_problem(3, 40), outputs=0)
    assert parts.isnan().all(dim=(0, 2)).tolist() == [False, False, True, True, True, False, True]


def test_same_bits_in_any_order_of_programs():
    """The interpreter shuffles the programs anew at every launch."""
    problem = make_problem(60, THREE_SPLITS, dtype=torch.bfloat16)
    first, _ = run(problem)
    assert torch.equal(run(problem)[0], first)


@pytest.fixture
def fused_calls(monkeypatch):
    """Row counts of the launches. The head computes with bfloat16, as on a GPU, whatever this CPU would do."""
    counts = []

    def counted(*given):
        counts.append(len(given[0]))
        return partial_states(*given)

    monkeypatch.setattr(linear_scores, "partial_states", counted)
    monkeypatch.setattr(products, "_cpu_multiplies_bf16", lambda: True)
    return counts


def test_the_op_scores_by_it_without_a_gradient(fused_calls):
    problem = make_problem(150, THREE_SPLITS, dtype=torch.bfloat16, bias=True)
    given = (problem.hidden, problem.weight, problem.targets)
    options = {"bias": problem.bias, "outputs": ("logprobs", *ALL_OUTPUTS), "backend": "triton"}
    with torch.no_grad():
        whole = linear_logprob(*given, **options)
        assert fused_calls == [150]
        in_blocks = linear_logprob(*given, **options, workspace_bytes=3 * 128 * 100)
        assert fused_calls == [150, 100, 50]
    exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
    baseline = scores_from_logits(problem.logits(None), problem.targets)
    for name in ROW_OF:
        for scores in (whole, in_blocks):
            assert_as_good(getattr(scores, name), baseline[name], exact[name], name, FLOOR[torch.bfloat16])


def test_the_op_scores_by_it_where_that_serves_only(fused_calls):
    problem = make_problem(5, 300, dtype=torch.bfloat16)
    given = (problem.hidden, problem.weight, problem.targets)
    linear_logprob(*given, backend="triton")
    linear_logprob(problem.hidden.detach(), *given[1:], backend="triton")
    linear_logprob(problem.hidden, problem.weight.detach(), problem.targets, backend="triton")
    with torch.no_grad():
        linear_logprob(*given, backend="torch")
        linear_logprob(problem.hidden.float(), problem.weight.float(), problem.targets, backend="triton")
        linear_logprob(problem.hidden, problem.weight.t().contiguous().t(), problem.targets, backend="triton")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear_logprob(problem.hidden, problem.weight.float(), problem.targets, backend="triton")
    assert fused_calls == []


@pytest.mark.parametrize("capability", GPUS)
def test_byte_arithmetic(capability):
    """Small heads only; the wider the logits, the larger a head may be; a faster memory shifts it back."""
    tiles, gpu = TILES[capability], GPUS[capability]
    tile = (tiles.rows, tiles.columns)
    served = [fused_is_faster(size, 4, *tile, gpu) for size in range(64, 8192, 64)]
    assert served == sorted(served, reverse=True) and served[0] and not served[-1]
    narrow = [fused_is_faster(size, 2, *tile, gpu) for size in range(64, 8192, 64)]
    assert sum(narrow) < sum(served)
    assert not fused_is_faster(64, 4, *tile, gpu._replace(memory=1e16))


def test_byte_arithmetic_in_numbers():
    gpu = fused_scores.Gpu(product=800e12, memory=3e12, cache=5e12, scalar=30e12)
    # 16 and 8 bytes at 3e12 against 17 instructions; H = 512: 1.28 ps of product against 3.2 ps from the cache.
    assert fused_is_faster(512, 8, 128, 128, gpu) and not fused_is_faster(512, 2, 128, 128, gpu)


FUSED = [(case, target) for case in HEAD_KERNELS for target in case.targets if case.label.startswith("linear_scores")]


@pytest.mark.parametrize(("case", "target"), FUSED, ids=lambda x: getattr(x, "label", x))
def test_compiles_to_tensor_cores(case, target):
    found = resources(compile_kernel(case, target), case.num_warps, target)
    assert found.tensor_core_instructions > 0
    assert found.shared_bytes <= 163 * 1024
