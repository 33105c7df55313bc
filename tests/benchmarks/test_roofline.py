"""Counts of operators against counts by hand, and the head's figures: bytes cannot creep back."""

import json
import sys

import pytest
import torch

from benchmarks.head_size import Size, parse_size
from benchmarks.roofline import __main__ as command
from benchmarks.roofline.divergence import count_divergence
from benchmarks.roofline.fake_devices import CPU, CUDA, is_on_gpu
from benchmarks.roofline.fake_gpu import fake_gpu
from benchmarks.roofline.head import BOUNDS, MODES, REFERENCE, SIZES, count_head, misses
from benchmarks.roofline.operator_counter import Counter
from benchmarks.roofline.overlapped_scoring import overlapped_milliseconds
from trl_fast.ops.backends import load_extension
from trl_fast.planning.gpu_facts import GPUS

pytestmark = pytest.mark.plans

H100 = GPUS["h100-80"]
R, H, V = 8, 4, 6
needs_extension = pytest.mark.skipif(not load_extension().ok, reason="the compiled extension is not there")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scoring_by_the_kernel_made_with_cutlass_is_near_the_floor(size):
    """By count, not by time: logits kept or not, all but 5% is the product."""
    floor = 1e3 * size.pass_flops / H100.products
    for keep in (False, True):
        assert floor < overlapped_milliseconds(size, H100, keep=keep) <= 1.05 * floor
    # Where a tile's product is shorter than its scoring, it is not hidden.
    narrow = size._replace(hidden=64)
    assert overlapped_milliseconds(narrow, H100) > 2e3 * narrow.pass_flops / H100.products


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=CUDA)


def fp32(*shape):
    return empty(*shape, dtype=torch.float32)


def counted(run, *given):
    """Counts a call of `run`; given: functions that make its arguments, which are there before."""
    counter = Counter()
    with fake_gpu(H100, counter):
        arguments = [make() for make in given]
        counter.start()
        result = run(*arguments)
        counts = counter.counts
        del result
    return counts


def row_grad(logits, out):
    targets, lse, coefficients = empty(R, dtype=torch.int64), fp32(R), fp32(4, R)
    torch.ops.trl_fast.row_grad(logits, targets, None, 1.0, 0.0, 1.0, lse, coefficients, 0, out)


def row_scores(logits, state):
    torch.ops.trl_fast.row_scores(logits, empty(R, dtype=torch.int64), None, 1.0, 0.0, 1.0, 0, 0, state)


def row_scores_packed(logits, state):
    words, tops = empty(R, V, dtype=torch.int16), fp32(R, 1)
    given = (logits, empty(R, dtype=torch.int64), None, 1.0, 1.0, 0, 0, state, words, tops)
    torch.ops.trl_fast.row_scores_packed(*given)


def row_grad_packed_over_its_words():
    words = empty(R, V, dtype=torch.int16)
    targets, lse, coefficients = empty(R, dtype=torch.int64), fp32(R), fp32(4, R)
    given = (words, None, targets, 1.0, 1.0, lse, coefficients, 0, words.view(torch.bfloat16), fp32(R, 1))
    torch.ops.trl_fast.row_grad_packed(*given)


PRODUCT = 2 * R * H * V
LOGITS = R * V
# Operations, bytes read, bytes written, launches. Factors are made by what is counted, so that they count.
CASES = {
    "mm": (lambda: empty(R, H) @ empty(H, V), (PRODUCT, 2 * (R * H + H * V), 2 * LOGITS, 1)),
    "mm to float32": (
        lambda: torch.mm(empty(R, H), empty(H, V), out_dtype=torch.float32),
        (PRODUCT, 2 * (R * H + H * V), 4 * LOGITS, 1),
    ),
    "mm into a corner": (
        lambda: torch.mm(empty(R, H), empty(H, V), out_dtype=torch.float32, out=fp32(2 * R, 2 * V)[:R, :V]),
        (PRODUCT, 2 * (R * H + H * V), 4 * LOGITS, 1),
    ),
    "addmm reads and writes its total": (
        lambda: (lambda total: torch.addmm(total, empty(R, H), empty(H, V), out_dtype=torch.float32, out=total))(
            fp32(R, V)
        ),
        (PRODUCT, 2 * (R * H + H * V) + 4 * LOGITS, 4 * LOGITS, 1),
    ),
    "addmm_": (
        lambda: empty(R, V).addmm_(empty(R, H), empty(H, V)),
        (PRODUCT, 2 * (R * H + H * V) + 2 * LOGITS, 2 * LOGITS, 1),
    ),
    "addmm_ over what is there": (
        lambda: empty(R, V).addmm_(empty(R, H), empty(H, V), beta=0),
        (PRODUCT, 2 * (R * H + H * V), 2 * LOGITS, 1),
    ),
    "total.add_(mm)": (
        lambda: fp32(R, V).add_(torch.mm(empty(R, H), empty(H, V), out_dtype=torch.float32)),
        (PRODUCT, 2 * (R * H + H * V) + 8 * LOGITS, 8 * LOGITS, 2),
    ),
    "bmm": (lambda: empty(3, R, H) @ empty(3, H, V), (3 * PRODUCT, 6 * (R * H + H * V), 6 * LOGITS, 1)),
    "linear with a bias": (
        lambda: torch.nn.functional.linear(empty(R, H), empty(V, H), empty(V)),
        (PRODUCT, 2 * (R * H + H * V + V), 2 * LOGITS, 1),
    ),
    "copy_ from another dtype": (lambda: empty(R, V).copy_(fp32(R, V)), (0, 4 * LOGITS, 2 * LOGITS, 1)),
    "cast": (lambda: fp32(R, V).to(torch.bfloat16), (0, 4 * LOGITS, 2 * LOGITS, 1)),
    "cast to its own dtype": (lambda: fp32(R, V).to(torch.float32), (0, 0, 0, 0)),
    "to where it is": (lambda: fp32(R, V).to("cuda"), (0, 0, 0, 0)),
    "add in place": (lambda: fp32(R, V).add_(fp32(R, V)), (0, 8 * LOGITS, 4 * LOGITS, 1)),
    "add a broadcast row": (
        lambda: fp32(R, V).add_(fp32(1, V).expand(R, V)),
        (0, 4 * (LOGITS + V), 4 * LOGITS, 1),
    ),
    "a square": (lambda: (lambda x: x * x)(fp32(R, V)), (0, 4 * LOGITS, 4 * LOGITS, 1)),
    "mul into its operand": (
        lambda: (lambda x: torch.mul(x, 2.0, out=x))(fp32(R, V)),
        (0, 4 * LOGITS, 4 * LOGITS, 1),
    ),
    "views": (lambda: fp32(R, V)[1:].t().view(V, R - 1).detach().unsqueeze(0), (0, 0, 0, 0)),
    "zeros": (lambda: torch.zeros(R, V, device=CUDA), (0, 0, 4 * LOGITS, 1)),
    "cat": (lambda: torch.cat([empty(R, V), empty(R, V)]), (0, 4 * LOGITS, 4 * LOGITS, 1)),
    "sum of rows": (lambda: fp32(R, V).sum(dim=1), (0, 4 * LOGITS, 4 * R, 1)),
    "embedding": (
        lambda: torch.nn.functional.embedding(empty(R, dtype=torch.int64), empty(V, H)),
        (0, R * (8 + 2 * H), 2 * R * H, 1),
    ),
    "index_copy_": (
        lambda: fp32(V, H).index_copy_(0, empty(2, dtype=torch.int64), fp32(2, H)),
        (0, 2 * (8 + 4 * H), 2 * 4 * H, 1),
    ),
    "index_add_": (
        lambda: fp32(V, H).index_add_(0, empty(2, dtype=torch.int64), fp32(2, H)),
        (0, 2 * (8 + 8 * H), 2 * 4 * H, 1),
    ),
}
OWN_CASES = {
    "row_scores": (
        lambda: row_scores(fp32(R, V), empty(7, R, dtype=torch.float64)),
        (0, 4 * LOGITS + R * (8 + 56), 56 * R, 1),
    ),
    "row_scores_packed": (
        lambda: row_scores_packed(fp32(R, V), empty(7, R, dtype=torch.float64)),
        (0, 4 * LOGITS + R * (8 + 56), 2 * LOGITS + R * (4 + 56), 1),
    ),
    "row_grad_packed": (row_grad_packed_over_its_words, (0, 2 * LOGITS + R * (4 + 8 + 4 + 16), 2 * LOGITS, 1)),
    "row_grad": (
        lambda: row_grad(fp32(R, V), empty(R, V)),
        (0, 4 * LOGITS + R * (8 + 4 + 16), 2 * LOGITS, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_are_counted_as_by_hand(name):
    run, expected = CASES[name]
    counts = counted(run)
    assert (counts.flops, counts.read, counts.written, counts.launches) == expected


def test_what_goes_number_by_number_are_neither_products_nor_the_heads_kernels():
    products = [name for name in CASES if name.startswith(("mm", "addmm", "bmm"))]
    assert len(products) > 5 and not any(counted(CASES[name][0]).elementwise for name in products)
    assert counted(CASES["cast"][0]).elementwise == 6 * LOGITS
    counts = count_head(Size(64, 32, 4096), "frozen token", H100).ours
    kernels = {name for name in counts.by_operator if name.startswith("trl_fast::") and "scale" not in name}
    assert {"trl_fast::linear_scores_kernel", "trl_fast::merge_tiles_kernel"} < kernels
    assert counts.elementwise == sum(
        tally.moved for name, tally in counts.by_operator.items() if name not in kernels and "mm" not in name
    )


@needs_extension
@pytest.mark.parametrize("name", OWN_CASES)
def test_row_kernels_are_counted_as_by_hand(name):
    run, expected = OWN_CASES[name]
    counts = counted(run)
    assert (counts.flops, counts.read, counts.written, counts.launches) == expected


def test_factors_that_were_there_are_part_of_a_products_rate():
    counts = counted(lambda hidden, weight: hidden @ weight, lambda: empty(R, H), lambda: empty(H, V))
    assert (counts.read, counts.written, counts.factors) == (0, 2 * LOGITS, 2 * (R * H + H * V))
    assert counts.milliseconds(H100) == pytest.approx(1e3 * (PRODUCT / H100.products + 2 * LOGITS / H100.memory))
    assert (H100.products, H100.memory) == pytest.approx((700e12, 3.0e12), rel=1e-3)


def test_wide_products_have_a_rate_of_their_own():
    counts = counted(lambda: fp32(R, H) @ fp32(H, V))
    assert (counts.float32_flops, counts.narrow_flops) == (PRODUCT, 0)


def test_a_backward_pass_is_counted_and_stays_on_the_gpu():
    def step(hidden, weight):
        (hidden @ weight).float().sum().backward()
        assert is_on_gpu(weight.grad) and weight.grad.dtype == torch.bfloat16

    counts = counted(step, lambda: empty(R, H).requires_grad_(), lambda: empty(H, V).requires_grad_())
    assert counts.flops == 3 * PRODUCT
    assert not counts.waits


@pytest.mark.parametrize(
    "run, waits",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu", non_blocking=True), 0),
        (lambda x: torch.tensor([1.0, 2.0], device=CUDA), 1),
        (lambda x: torch.zeros(3).to(x.device), 1),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), 0),
        (lambda x: torch.full((3,), 2.0, device=x.device), 0),
        (lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)], 0),
        (lambda x: x.masked_fill_(x > 0, 1.0), 0),
        (lambda x: torch.zeros(3).sum().item(), 0),
    ],
)
def test_host_waits_are_seen_where_they_are(run, waits):
    counts = counted(run, lambda: fp32(R, V))
    assert counts.waits.total() == waits
    assert all(place.startswith("tests/benchmarks/test_roofline.py:") for place in counts.waits)


@needs_extension
@pytest.mark.parametrize(
    ("mixture", "is_tvd", "sweeps"), [(0.0, False, 2), (1.0, False, 2), (0.3, False, 3), (0.0, True, 3)]
)
def test_a_divergence_is_counted_as_often_as_it_reads(mixture, is_tvd, sweeps):
    def run(student, teacher, weights, results, gradient):
        heads = (student, None, 1.0, 0.0, teacher, None, 1.0, 0.0)
        torch.ops.trl_fast.row_divergence(*heads, 1.0, 0.7, 0.3, mixture, is_tvd, weights, results, gradient)

    made = [lambda: fp32(R, V), lambda: fp32(R, V), lambda: fp32(R), lambda: fp32(3, R)]
    counts = counted(run, *made, lambda: empty(R, V))
    assert (counts.read, counts.written) == (sweeps * 2 * 4 * LOGITS + 4 * R, 2 * LOGITS + 3 * 4 * R)
    assert counted(run, *made, lambda: None).read == 2 * 2 * 4 * LOGITS + 4 * R


def test_the_peak_is_of_what_lives_at_once():
    def freed_between(_):
        for _ in range(3):
            fp32(1024, 1024)

    assert counted(freed_between, lambda: fp32(2048, 2048)).peak_bytes == 4 << 20
    assert counted(lambda: [fp32(1024, 1024) for _ in range(3)]).peak_bytes == 12 << 20


def test_where_tensors_are():
    with fake_gpu(H100, Counter()):
        on_gpu = fp32(R)
        assert on_gpu.device == torch.device("cuda", 0) and torch.zeros(3).device == CPU
        assert on_gpu.cpu().device == CPU and torch.zeros(3).to("cuda").device == CUDA
        assert torch.zeros_like(on_gpu).device == on_gpu.new_ones(3).device == CUDA
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()


# ---- the head


@needs_extension
def test_the_head_is_counted_with_its_passes():
    size = Size(64, 32, 4096)
    for mode in MODES:
        case = count_head(size, mode, H100)
        trl_passes = case.passes + (case.passes > 1)
        assert case.trl.flops == trl_passes * 2.0 * 64 * 32 * 4096
        assert case.ours.flops == case.floor_flops


@needs_extension
def test_trls_head_moves_what_its_source_says():
    """14 bytes a logit (2 written and 2 read in forward; 2 + 2 + 2 and 2 by each product in backward), 16 a number of
    the weight's gradient (zeros 4, read and written for each 4096 rows 8, cast 6), 22 a number of the hidden states'.
    """
    rows, hidden, vocab = 4096, 64, 65536
    counts = count_head(Size(rows, hidden, vocab), "trained token", H100).trl
    gradients = 18 * vocab * hidden + (4 + 2 * 8 + 6) * rows * hidden
    assert counts.moved == pytest.approx(14 * rows * vocab + gradients, rel=0.01)


@pytest.fixture(scope="module")
def cases():
    return [count_head(size, mode, H100) for mode in MODES for size in SIZES]


@needs_extension
def test_the_head_stays_within_its_bounds(cases):
    assert misses(cases) == []


@needs_extension
@pytest.mark.parametrize(("mode", "trl_passes"), [("JSD, trained", 8), ("reverse KL, frozen", 5)])
def test_a_divergence_takes_its_passes_and_less_than_trls(mode, trl_passes):
    case = count_divergence(Size(512, 256, 65536), mode, H100)
    assert case.ours.flops == case.floor_flops
    assert case.trl.flops == trl_passes * 2.0 * 512 * 256 * 65536
    assert case.ours.moved < case.trl.moved and case.trl_over_ours > 1.5
    assert not case.ours.waits.total()


def test_bounds_are_there_for_every_mode():
    assert set(BOUNDS) == set(MODES)
    assert REFERENCE in SIZES


def test_a_miss_names_mode_size_and_figure(cases):
    slow = [case for case in cases if case.size == REFERENCE and case.mode == "trained token"]
    bound = BOUNDS["trained token"]
    found = misses(slow)
    assert len(found) == (slow[0].over_floor > bound.over_floor) + (slow[0].trl_over_ours < bound.trl_over_ours)
    assert all("trained token at 8192/4096/151936" in miss for miss in found)


@needs_extension
def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    out = tmp_path / "counted.json"
    given = ["roofline", "--sizes", "64/32/4096", "--modes", "frozen token", "--json", str(out), "--operators"]
    monkeypatch.setattr(sys, "argv", given)
    command.main()
    printed = capsys.readouterr().out
    assert "64/32/4096" in printed and "ESTIMATE" in printed and "row_grad" in printed
    (facts,) = json.loads(out.read_text())
    assert facts["mode"] == "frozen token" and facts["rows"] == 64
    assert facts["ours"]["flops"] == 2 * 2.0 * 64 * 32 * 4096 and facts["ours"]["estimated_ms"] > 0


@pytest.mark.parametrize("text", ["8192", "8192/4096", "a/b/c", "0/1/2"])
def test_a_size_that_is_none_is_named(text):
    with pytest.raises(ValueError, match=f"sizes: '{text}' is no size; expected rows/hidden/vocabulary"):
        parse_size(text)
