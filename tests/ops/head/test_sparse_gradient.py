"""head_grad="sparse": unbiased, bounded in size, exact in the limit, and one pass over the head."""

from __future__ import annotations

import math

import pytest
import torch

from support.heads import DTYPES, HeadProblem, error, make_problem, scores_from_logits
from support.instruction_sets import CPU_FLAGS, check_instruction_set
from trl_fast.ops import linear_cross_entropy, linear_logprob
from trl_fast.ops.backends import load_extension
from trl_fast.ops.head.autograd import linear_scores_sparse
from trl_fast.ops.head.sparse_gradient import SPARSE_KERNELS

N, V = 13, 333
UPSTREAM = torch.linspace(-1.0, 1.0, N)
# Keeps every entry: the sample is then the whole distribution.
EVERYTHING = 1e-30
ROW_BLOCKS = 12_000


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    return request.param


def make(dtype: torch.dtype = torch.float32, **changes) -> HeadProblem:
    options = dict(bias=True, softcap=9.0, logit_scale=0.5, temperature=1.3) | changes
    return make_problem(N, V, dtype=dtype, **options)


def gradients(problem: HeadProblem, backend: str, *, with_entropy: bool = False, **options) -> list[torch.Tensor]:
    options = {"outputs": ("entropy",), "bias": problem.bias, "backend": backend} | options
    scores = linear_logprob(problem.hidden, problem.weight, problem.targets, **problem.transform, **options)
    loss = (scores.logprobs * UPSTREAM).sum()
    if with_entropy:
        loss = loss + (scores.entropy * UPSTREAM.flip(0)).sum()
    return torch.autograd.grad(loss, problem.leaves)


def exact_gradients(problem: HeadProblem, *, with_entropy: bool = False) -> list[torch.Tensor]:
    scores = scores_from_logits(problem.logits(torch.float64), problem.targets)
    loss = (scores["logprobs"] * UPSTREAM).sum()
    if with_entropy:
        loss = loss + (scores["entropy"] * UPSTREAM.flip(0)).sum()
    return torch.autograd.grad(loss, problem.leaves)


@pytest.mark.parametrize("workspace_bytes", [None, ROW_BLOCKS], ids=["one block", "row blocks"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprobs", "with entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_of_everything_is_exact(dtype, with_entropy, workspace_bytes, backend):
    problem = make(dtype)
    options = {"head_grad": "sparse", "sparse_threshold": EVERYTHING, "workspace_bytes": workspace_bytes}
    got = gradients(problem, backend, with_entropy=with_entropy, **options)
    for leaf, grad, exact in zip(
        ("hidden", "weight", "bias"), got, exact_gradients(problem, with_entropy=with_entropy), strict=True
    ):
        assert grad.dtype == dtype
        assert error(grad, exact) < {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype], leaf


def test_values_are_those_of_the_exact_op(backend):
    problem = make()
    options = {"outputs": ("entropy", "is_top1", "mean_logits"), "bias": problem.bias, "backend": backend}
    given = (problem.hidden, problem.weight, problem.targets)
    exact = linear_logprob(*given, **problem.transform, **options)
    sparse = linear_logprob(*given, **problem.transform, **options, head_grad="sparse")
    for name in ("logprobs", "entropy", "is_top1", "mean_logits"):
        assert torch.equal(getattr(exact, name), getattr(sparse, name))


def test_the_gradient_is_unbiased(backend):
    problem = make()
    draws = 300
    samples = [
        gradients(problem, backend, with_entropy=True, head_grad="sparse", sparse_threshold=0.05) for _ in range(draws)
    ]
    for index, exact in enumerate(exact_gradients(problem, with_entropy=True)):
        stack = torch.stack([sample[index].double() for sample in samples])
        deviation = (stack.mean(0) - exact) / (stack.std(0) / math.sqrt(draws) + 1e-6)
        # Standard normal if unbiased: its mean square is 1; a bias would grow it with the number of draws.
        assert deviation.square().mean() < 1.5
        assert stack.std(0).max() > 1e-3  # it was a sample, not the whole


@pytest.mark.parametrize("threshold", [0.3, 2.0**-4, 2.0**-8])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0], ids=["flat", "usual", "peaked"])
def test_how_many_entries_are_kept(threshold, spread, backend):
    torch.manual_seed(0)
    logits = spread * torch.randn(3, 40, 128)
    vocab_size = V
    whole = logits.transpose(0, 1).flatten(1)[:, :vocab_size]
    lse = whole.logsumexp(1)
    offsets = torch.rand(40, dtype=torch.float64)
    counts, columns, logprobs = SPARSE_KERNELS[backend].samples(
        logits, vocab_size, None, 1.0, 0.0, 1.0, lse, offsets, threshold
    )
    assert counts.sum() == len(columns) == len(logprobs)
    assert counts.max() <= 1 / threshold + 1
    rows = torch.arange(40).repeat_interleave(counts)
    torch.testing.assert_close(logprobs, (whole - lse[:, None])[rows, columns], rtol=1e-5, atol=1e-5)
    large = (whole - lse[:, None]).exp() >= threshold
    kept = torch.zeros_like(large)
    kept[rows, columns] = True
    assert (kept | ~large).all()
    # What is kept stands for the whole row, but for one threshold at most.
    mass = torch.zeros(40).index_add(0, rows, logprobs.exp().clamp(min=threshold))
    assert ((mass - 1).abs() <= threshold * 1.001).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_kernels_keep_the_same(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 30, 256)).to(dtype)
    bias = torch.randn(V)
    transform = (0.5, 9.0, 0.8)
    whole = logits.transpose(0, 1).flatten(1)[:, :V].float() + bias
    u = 9.0 * torch.tanh(whole * 0.5 / 9.0) * 0.8
    offsets = torch.rand(30, dtype=torch.float64)
    given = (logits, V, bias, *transform, u.logsumexp(1), offsets, 2.0**-7)
    (counts, columns, logprobs), (counts_cpp, columns_cpp, logprobs_cpp) = (
        SPARSE_KERNELS[name].samples(*given) for name in ("torch", "cpp")
    )
    assert torch.equal(counts, counts_cpp) and torch.equal(columns, columns_cpp)
    torch.testing.assert_close(logprobs, logprobs_cpp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dense_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_sparse_product(width, dense_dtype, backend):
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 0, 17, 1, 0])
    row_offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    indices = torch.randint(0, 9, (21,))
    values = torch.randn(21)
    dense = torch.randn(9, width).to(dense_dtype)
    matrix = torch.zeros(6, 9, dtype=torch.float64).index_put(
        (torch.arange(6).repeat_interleave(counts), indices), values.double(), accumulate=True
    )
    exact = matrix @ dense.double()
    got = SPARSE_KERNELS[backend].product(row_offsets, indices, values, dense, torch.float32)
    assert error(got, exact) < 1e-6
    narrow = SPARSE_KERNELS[backend].product(row_offsets, indices, values, dense, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and error(narrow, exact) < 4e-3


def check_all_kernels():
    for dtype in DTYPES:
        test_both_kernels_keep_the_same(dtype)
        for width in (1, 7, 64, 100):
            test_sparse_product(width, dtype, "cpp")


@pytest.mark.parametrize("isa", CPU_FLAGS)
def test_every_instruction_set(isa):
    check_instruction_set(isa, check_all_kernels, tested_here=True)


def test_minus_infinity_and_a_certain_row(backend):
    problem = make_problem(4, 50, bias=True)
    with torch.no_grad():
        problem.bias[10:] = float("-inf")
        problem.bias[3] = 60.0
    problem.targets.fill_(3)
    scores = linear_logprob(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, backend=backend, head_grad="sparse"
    )
    scores.logprobs.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in problem.leaves)
    assert problem.hidden.grad.abs().max() < 1e-5


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("bias",)], ids=str)
def test_frozen_parts_and_retained_graph(frozen, backend):
    problem = make()
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    leaves = [x for x in problem.leaves if x.requires_grad]
    given = (problem.hidden, problem.weight, problem.targets)
    options = {"bias": problem.bias, "head_grad": "sparse", "sparse_threshold": EVERYTHING, "backend": backend}
    loss = (linear_logprob(*given, **problem.transform, **options).logprobs * UPSTREAM).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    scores = scores_from_logits(problem.logits(torch.float64), problem.targets)
    true = torch.autograd.grad((scores["logprobs"] * UPSTREAM).sum(), leaves)
    for a, b, c in zip(first, second, true, strict=True):
        assert torch.equal(a, b) and error(a, c) < 3e-6


def test_transposed_inputs(backend):
    problem = make()
    hidden, weight = (x.detach().t().contiguous().t().requires_grad_() for x in (problem.hidden, problem.weight))
    targets, bias = (torch.stack([x, x], 1)[:, 0] for x in (problem.targets, problem.bias.detach()))
    strided = HeadProblem(hidden, weight, bias.requires_grad_(), targets, **problem.transform)
    assert not any(x.is_contiguous() for x in (hidden, weight, bias, targets))
    got, wanted = (gradients(p, backend, head_grad="sparse", sparse_threshold=EVERYTHING) for p in (strided, problem))
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < 3e-6


def test_the_seed_decides(backend):
    problem = make()

    def draw(seed):
        torch.manual_seed(seed)
        return gradients(problem, backend, head_grad="sparse", sparse_threshold=0.05)

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_it_takes_one_product(backend, monkeypatch):
    problem = make_problem(N, V)
    products = []
    assert load_extension().ok
    for place, name in ((torch, "mm"), (torch.ops.trl_fast, "product")):
        multiply = getattr(place, name)

        def counted(a, b, *args, multiply=multiply, **kwargs):
            products.append(a.shape[0] * b.shape[1])
            return multiply(a, b, *args, **kwargs)

        monkeypatch.setattr(place, name, counted)
    gradients(problem, backend, head_grad="sparse")
    assert sum(products) == N * V


def test_no_rows(backend):
    problem = make_problem(0, 20)
    given = (problem.hidden, problem.weight, problem.targets)
    linear_logprob(*given, backend=backend, head_grad="sparse").logprobs.sum().backward()
    assert problem.weight.grad.abs().sum() == 0 and problem.hidden.grad.shape == (0, 24)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, backend):
    problem = make_problem(N, V, temperature=1.3)
    problem.targets[[2, 5]] = -100
    given = (problem.hidden, problem.weight, problem.targets)
    losses = [
        linear_cross_entropy(*given, reduction=reduction, backend=backend, **problem.transform, **options)
        for options in ({}, {"head_grad": "sparse", "sparse_threshold": EVERYTHING})
    ]
    torch.testing.assert_close(*losses)
    exact, sparse = (torch.autograd.grad(loss.sum(), problem.leaves) for loss in losses)
    for a, b in zip(exact, sparse, strict=True):
        assert error(b, a) < 3e-6


def test_opcheck(backend):
    problem = make_problem(5, 33, bias=True)
    offsets = torch.rand(5, dtype=torch.float64)
    given = (problem.hidden, problem.weight, problem.targets, problem.bias, offsets, 1.0, 0.0, 1.0, 1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_scores_sparse, (*given, 0.01, 1 << 20, backend), test_utils=tests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_grad="dense"), "head_grad: unknown value 'dense'"),
        (dict(head_grad="sparse", sparse_threshold=0.0), "sparse_threshold must lie between 0 and 1, got 0.0"),
        (dict(head_grad="sparse", sparse_threshold=1.5), "sparse_threshold must lie between 0 and 1, got 1.5"),
    ],
)
def test_refused(options, message):
    problem = make_problem(4, 30)
    for op in (linear_logprob, linear_cross_entropy):
        with pytest.raises(ValueError, match=message):
            op(problem.hidden, problem.weight, problem.targets, **options)
    with pytest.raises(ValueError, match="head_grad='sparse' has no gradient of label_smoothing=0.1"):
        linear_cross_entropy(problem.hidden, problem.weight, problem.targets, head_grad="sparse", label_smoothing=0.1)


@pytest.mark.parametrize(
    "row_offsets, indices, message",
    [
        ([0, 2, 3], [0, 5, 1], r"indices: expected rows of dense, in \[0, 5\)"),
        ([0, 2, 3], [0, -1, 1], r"indices: expected rows of dense, in \[0, 5\)"),
        ([0, 2, 4], [0, 1, 2], "row_offsets: expected rising numbers from 0 to 3"),
        ([0, 3, 2], [0, 1, 2], "row_offsets: expected rising numbers from 0 to 3"),
        ([-1, 2, 3], [0, 1, 2], "row_offsets: expected rising numbers from 0 to 3"),
        ([], [0, 1, 2], "row_offsets: expected at least one number"),
    ],
)
def test_a_sparse_product_reads_nothing_out_of_bounds(row_offsets, indices, message, extension):
    given = (torch.tensor(row_offsets, dtype=torch.int64), torch.tensor(indices), torch.ones(3), torch.ones(5, 4))
    with pytest.raises(ValueError, match=message):
        torch.ops.trl_fast.sparse_product(*given, torch.float32)
