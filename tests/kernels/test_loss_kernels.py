"""Tests the Triton loss kernels against the PyTorch reference in float64, and their machine code."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernel_report import LOSS_KERNELS, compile_kernel, resources
from support.heads import FLOOR, assert_as_good
from support.losses import interpreted_losses, pair_problem, policy_problem
from support.targets import QUICK_TARGETS
from support.triton_interpreter import interpreted
from trl_fast.kernels import loss_kernels as kernels
from trl_fast.ops import pair_loss, policy_loss
from trl_fast.ops.pair_formulas import PAIR_FORMULAS
from trl_fast.ops.pair_loss import _pair_loss, _pair_loss_backward
from trl_fast.ops.policy_loss import LOSS_TYPES, _policy_loss

pytestmark = pytest.mark.gpu_code

NUMBERS = {"beta": 0.3, "label_smoothing": 0.15, "discopop_tau": 0.4}
FLOAT32 = FLOOR[torch.float32]


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Every test but the one that compiles runs the kernels in the interpreter."""
    with contextlib.nullcontext() if "target" in request.fixturenames else interpreted_losses():
        yield


def run_pair(problem, dtype, backend, upstream, **keywords):
    """losses, sequence_logprobs and the gradient of the logprobs, for `upstream` of both outputs."""
    arguments = problem.arguments(dtype)
    outputs = pair_loss(*arguments, **keywords, backend=backend)
    upstream[1](upstream[0](outputs)).backward()
    return *(output.detach() for output in outputs), arguments[0].grad


def of_losses(outputs):
    return (outputs.losses,)


def of_sequences(outputs):
    return (outputs.sequence_logprobs,)


def of_both(outputs):
    return outputs


def weighted(outputs):
    return sum((torch.arange(len(output), 0, -1) * output).sum() for output in outputs)


def mean(outputs):
    return sum(output.mean() for output in outputs)


def assert_pair_as_good(problem, upstream, **keywords):
    results = [
        run_pair(problem, dtype, backend, upstream, **keywords)
        for dtype, backend in ((torch.float32, "triton"), (torch.float32, "torch"), (torch.float64, "torch"))
    ]
    for name, *values in zip(("losses", "sequence_logprobs", "gradient"), *results, strict=True):
        assert values[0].dtype == torch.float32
        assert_as_good(*values, name, FLOAT32)


@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_pair_loss_and_gradient(loss_type):
    assert_pair_as_good(pair_problem(), (of_both, weighted), loss_type=loss_type, **NUMBERS)


@pytest.mark.parametrize("reduce", [weighted, mean])
@pytest.mark.parametrize("outputs", [of_losses, of_sequences, of_both])
def test_pair_upstream_gradients(outputs, reduce):
    """Those of a mean have stride 0, those of an output that nobody used are None."""
    assert_pair_as_good(pair_problem(), (outputs, reduce), **NUMBERS)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "nca_pair"])
@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (1, 1), (5000, 0), (0, 1, 2, 0)], ids=str)
def test_pair_sizes(lengths, loss_type):
    problem = pair_problem(lengths)
    problem.lengths = torch.tensor(lengths)
    assert_pair_as_good(problem, (of_both, weighted), loss_type=loss_type)


def test_pair_inputs_need_not_be_contiguous():
    problem = pair_problem((3, 4, 0, 1))
    for name, vector in vars(problem).items():
        setattr(problem, name, torch.stack([vector, vector], dim=1)[:, 0])
    logprobs, *rest = vars(problem).values()
    got, expected = (pair_loss(logprobs, *rest, loss_type="ipo", backend=name) for name in ("triton", "torch"))
    torch.testing.assert_close(got, expected)


def test_sequences_have_no_more_programs_than_cuda_has(monkeypatch):
    grids = []
    stub = type(
        "Kernel", (), {"__getitem__": lambda self, grid: grids.append(grid) or (lambda *args, **options: None)}
    )
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "pair_loss_backward_kernel", stub())
        given = torch.empty(2, device="meta"), torch.empty(3, device="meta"), None, None
        kernels.pair_loss_backward(*given, torch.empty(2**28, device="meta"))
    assert grids == [(2, 65535)]
    # A program loops then.
    monkeypatch.setattr(kernels, "MOST_PARTS", 2)
    out, cu_seqlens = torch.empty(5 * kernels.BLOCK + 3), torch.tensor([0, 5 * kernels.BLOCK, 5 * kernels.BLOCK + 3])
    kernels.pair_loss_backward(torch.tensor([2.0, 3.0]), cu_seqlens, torch.ones(1), None, out)
    assert torch.equal(out, torch.tensor([2.0, 3.0]).repeat_interleave(cu_seqlens.diff()))


def test_no_pairs():
    arguments = pair_problem(()).arguments()
    losses, sequence_logprobs = pair_loss(*arguments, backend="triton")
    assert losses.shape == sequence_logprobs.shape == (0,)
    losses.sum().backward()
    assert arguments[0].grad.shape == (0,)


@pytest.mark.parametrize("spread", [1e-3, 1e2, 1e4])
@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_pair_extreme_log_ratios(loss_type, spread):
    """Each value for itself: a sum would hide the small ones."""
    problem = pair_problem((1,) * 16)
    # Powers of two, so that the log-ratios themselves are exact.
    signs = torch.tensor([(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]).flatten()
    problem.ref_logprobs = torch.zeros(16)
    problem.logprobs = torch.cat([signs, signs / 2]) * 2 ** round(torch.tensor(spread).log2().item())
    results = [
        run_pair(problem, dtype, backend, (of_losses, weighted), loss_type=loss_type, label_smoothing=0.15)
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch"))
    ]
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact.float(), rtol=2e-5, atol=1e-6)


def test_pair_graph_is_kept_and_differentiated_once():
    arguments = pair_problem((3, 4)).arguments()
    losses, _ = pair_loss(*arguments, backend="triton")
    gradients = [torch.autograd.grad(losses.sum(), arguments[0], retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    with pytest.raises(RuntimeError, match="pair_loss has no second derivative"):
        torch.autograd.grad(losses.sum(), arguments[0], create_graph=True)
    with torch.no_grad():
        assert not pair_loss(*arguments, backend="triton").losses.requires_grad


def test_pair_opcheck():
    vectors = pair_problem((3, 4, 0, 1)).arguments()
    torch.library.opcheck(_pair_loss, (*vectors, "exo_pair", *NUMBERS.values(), "triton"))
    gradients, cu_seqlens = torch.randn(4), vectors[1]
    for upstream in ((torch.randn(2), None), (None, torch.randn(4)), (torch.randn(()).expand(2), torch.randn(4))):
        torch.library.opcheck(_pair_loss_backward, (gradients, cu_seqlens, 8, *upstream, "triton"))


def run_policy(problem, dtype, backend, **keywords):
    """loss, kl, clipped and the gradient of the logprobs for an upstream gradient of 3."""
    positional, reference = problem.arguments(dtype)
    result = policy_loss(*positional, **reference, **keywords, backend=backend)
    (3 * result.loss).backward()
    return result.loss.detach(), result.kl, result.clipped, positional[0].grad


@pytest.mark.parametrize("bias_correct_kl", [True, False])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(
    "loss_type, delta", [("clip", None), ("clip", 1.1), ("clip", 1.5), ("cispo", None), ("sapo", None)]
)
def test_policy_loss_and_gradient(loss_type, delta, on_policy, reference, bias_correct_kl):
    problem = policy_problem(on_policy=on_policy, reference=reference)
    keywords = {"loss_type": loss_type, "delta": delta, "bias_correct_kl": bias_correct_kl}
    keywords["beta"] = 0.3 if reference else 0.0
    keywords["epsilon_high"] = 1.2 if loss_type == "cispo" else 0.28
    ours, baseline, exact = (
        run_policy(problem, dtype, backend, **keywords)
        for dtype, backend in ((torch.float32, "triton"), (torch.float32, "torch"), (torch.float64, "torch"))
    )
    for name, index in (("loss", 0), ("kl", 1), ("gradient", 3)):
        if exact[index] is None:
            assert ours[index] is None
            continue
        assert ours[index].dtype == torch.float32
        assert_as_good(ours[index], baseline[index], exact[index], name, FLOAT32)
    assert torch.equal(ours[2], baseline[2])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 3), (1,), (1023, 1), (1025,)], ids=str)
def test_policy_sizes(lengths, loss_type):
    problem = policy_problem(lengths)
    results = [run_policy(problem, torch.float32, backend, loss_type=loss_type) for backend in ("triton", "torch")]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_extreme_log_ratios(loss_type):
    values = [a * b for a in (-1.0, 1.0) for b in (1e-3, 15.0, 41.0, 1e4)]
    tokens = torch.cartesian_prod(torch.tensor(values), torch.tensor(values), torch.arange(3.0))
    problem = policy_problem((len(tokens) // 3,) * 3)
    problem.logprobs, problem.old_logprobs, problem.ref_logprobs = torch.zeros(len(tokens)), *tokens.T[:2]
    problem.branch, problem.advantages = tokens.T[2].long(), torch.tensor([-1.0, 0.0, 1.0])
    ours, exact = (
        run_policy(problem, dtype, backend, loss_type=loss_type, beta=0.1)
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch"))
    )
    for got, expected in zip(ours, exact, strict=True):
        # e^40 in float32 is off by the rounding of 40·log2(e) alone.
        torch.testing.assert_close(got.double(), expected.double(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_a_nan_reaches_its_pair_and_no_other(loss_type, backend):
    problem = pair_problem((3, 2, 4, 1))
    problem.logprobs[1] = float("nan")
    losses, sequence_logprobs, gradient = run_pair(
        problem, torch.float32, backend, (of_losses, weighted), loss_type=loss_type, label_smoothing=0.15
    )
    assert losses.isnan().tolist() == [True, False]
    assert sequence_logprobs.isnan().tolist() == [True, False, False, False]
    # The hinge's gradient is a constant.
    assert gradient[:3].isnan().all() or loss_type == "hinge"
    assert gradient[5:].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("field", ["logprobs", "old_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_nan_reaches_the_loss_and_no_other_token(loss_type, field, backend):
    problem = policy_problem((3, 2, 4, 1))
    getattr(problem, field)[4] = float("nan")
    loss, _, _, gradient = run_policy(problem, torch.float32, backend, loss_type=loss_type, beta=0.1)
    assert loss.isnan() and gradient[torch.arange(10) != 4].isfinite().all()


@triton.jit
def evaluate_kernel(x, log_sigmoid, exp_beyond_linear, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    values = tl.load(x + lanes)
    tl.store(log_sigmoid + lanes, kernels._log_sigmoid(values))
    tl.store(exp_beyond_linear + lanes, kernels._exp_beyond_linear(values))


def test_series_are_as_long_as_float32_needs():
    x = torch.linspace(-1, 1, 4096)
    log_sigmoid, exp_beyond_linear = torch.empty(2, 4096)
    interpreted(evaluate_kernel)[(1,)](x, log_sigmoid, exp_beyond_linear, BLOCK=4096)
    exact = x.double()
    torch.testing.assert_close(log_sigmoid.double(), torch.nn.functional.logsigmoid(exact), rtol=3e-7, atol=0)
    near = x.abs() < 0.5  # beyond, the difference itself is taken
    expected = torch.special.expm1(exact) - exact
    torch.testing.assert_close(exp_beyond_linear.double()[near], expected[near], rtol=2.5e-7, atol=0)


def test_policy_sum_does_not_depend_on_the_order_of_programs():
    """The interpreter shuffles them anew in every launch."""
    problem = policy_problem()
    losses = [run_policy(problem, torch.float32, "triton")[0] for _ in range(3)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_policy_graph_is_kept_and_differentiated_once():
    positional, reference = policy_problem((3, 4)).arguments()
    result = policy_loss(*positional, **reference, beta=0.1, backend="triton")
    gradients = [torch.autograd.grad(result.loss, positional[0], retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    assert not result.kl.requires_grad
    with pytest.raises(RuntimeError, match="policy_loss has no second derivative"):
        torch.autograd.grad(result.loss, positional[0], create_graph=True)
    with torch.no_grad():
        assert not policy_loss(*positional, **reference, backend="triton").loss.requires_grad


@pytest.mark.parametrize("on_policy, reference", [(False, True), (True, False)])
def test_policy_opcheck(on_policy, reference):
    problem = policy_problem((3, 4, 0, 1), on_policy=on_policy, reference=reference)
    (logprobs, old, *rest), keywords = problem.arguments()
    numbers = ("clip", 0.1 if reference else 0.0, 0.8, 1.2, 1.5, 1.0, 1.05, True)
    torch.library.opcheck(_policy_loss, (logprobs, old, keywords["ref_logprobs"], *rest, *numbers, "triton"))


@pytest.mark.parametrize("target", QUICK_TARGETS)
@pytest.mark.parametrize("kernel", LOSS_KERNELS, ids=lambda kernel: kernel.label)
def test_kernels_compile_without_spills_and_move_little(kernel, target):
    found = resources(compile_kernel(kernel, target), kernel.num_warps, target, kernel.scalar_loads)
    assert found.spill_bytes == 0
    assert found.registers * 32 * kernel.num_warps <= 65536
    # The sequence's advantage and weight come on top of a token's own 29 bytes, and one partial sum.
    most = (29 + 8) / 29 * kernel.least_bytes + 4 if kernel.label.startswith("policy_loss") else kernel.least_bytes
    assert kernel.least_bytes <= found.streamed_bytes <= most


@pytest.mark.parametrize("rows", ["all", "a group"])
@pytest.mark.parametrize("names", [("sigmoid",), ("ipo", "apo_zero")])
def test_the_dpo_loss_runs_on_the_kernels_where_they_serve(names, rows, monkeypatch):
    from trl_fast.losses import dpo, loss_inputs

    problem = pair_problem()
    logprobs, cu_seqlens, references, lengths = problem.arguments(torch.float32)
    branch = torch.arange(len(lengths)).repeat_interleave(cu_seqlens.diff())
    table = loss_inputs.PreferenceLossInputs(branch, torch.zeros_like(branch), lengths)
    config = dpo.DPOLossConfig(list(names), beta=0.3)
    # From the third sequence on to the end.
    chosen = torch.arange(int(cu_seqlens[2]), len(logprobs)) if rows == "a group" else None
    scores = SimpleNamespace(logprobs=logprobs if chosen is None else logprobs[chosen])
    results = []
    for serves in (True, False):
        monkeypatch.setattr(dpo, "kernels_serve", lambda _, serves=serves: serves)
        calls = []
        monkeypatch.setattr(dpo, "pair_loss", lambda *a, calls=calls, **k: calls.append(k) or pair_loss(*a, **k))
        loss = dpo.dpo_loss(scores, table, references, config, chosen)
        assert len(calls) == (len(names) if serves else 0)
        results.append((loss.detach(), torch.autograd.grad(loss, logprobs, retain_graph=True)[0]))
    # Sums of up to hundreds of float32 log-probs, in two orders.
    torch.testing.assert_close(results[0], results[1], rtol=3e-4, atol=1e-6)
