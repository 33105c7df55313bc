"""Tests the CUDA loss kernels, compiled as host C++: against float64, and under ThreadSanitizer and AddressSanitizer.

The simulated kernels take the place of the Triton launchers, so that the ops' own autograd is what is tested.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.compiled_cuda_kernels import compile_cuda_kernels, find_nvcc
from support import extreme_losses
from support.extreme_losses import PAIR_FLOORS, TINY, assert_exact, pair_inputs, policy_inputs
from support.heads import FLOOR, assert_as_good
from support.losses import pair_problem, policy_problem
from support.targets import QUICK_TARGETS
from trl_fast.kernels import loss_kernels as launchers
from trl_fast.ops import pair_loss, policy_loss
from trl_fast.ops.pair_formulas import PAIR_FORMULAS
from trl_fast.ops.pair_loss import _pair_loss
from trl_fast.ops.policy_loss import LOSS_TYPES, _policy_loss

pytestmark = pytest.mark.gpu_code

NUMBERS = {"beta": 0.3, "label_smoothing": 0.15, "discopop_tau": 0.4}


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of csrc/cuda/loss_kernels.h, its fields in order: *pointer, integer, ~float."""
    kinds = {"*": ctypes.c_void_p, "~": ctypes.c_float}
    named = [(field.strip("*~"), kinds.get(field[0], ctypes.c_int64)) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": named})


PairLossArgs = structure(
    "PairLossArgs",
    "*logprobs *cu_seqlens *ref_logprobs *lengths loss ~beta ~label_smoothing ~discopop_tau "
    "*losses *sequence_logprobs *gradients",
)
PairLossBackwardArgs = structure(
    "PairLossBackwardArgs",
    "*gradients *cu_seqlens *grad_losses grad_losses_stride *grad_sequence_logprobs grad_sequence_logprobs_stride "
    "*out",
)
PolicyLossArgs = structure(
    "PolicyLossArgs",
    "*logprobs *old_logprobs *ref_logprobs *advantages *branch *weights num_tokens loss bias_correct_kl "
    "~beta ~lower ~upper ~delta ~temperature_pos ~temperature_neg ~max_log_ratio *partial_sums *kl *clipped "
    "*gradients",
)


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class HostKernels:
    """The kernels' simulation, with the signatures of the Triton launchers; each call shuffles the threads anew."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for function in ("policy_loss_blocks", "pair_formula", "policy_formula"):
            getattr(self.library, function).restype = ctypes.c_int64
        self.calls = 0

    def _run(self, name: str, args: ctypes.Structure, *sizes: int) -> None:
        self.calls += 1
        getattr(self.library, name)(ctypes.byref(args), *map(ctypes.c_int64, sizes), ctypes.c_uint(self.calls))

    def pair_loss_forward(self, logprobs, cu_seqlens, ref_logprobs, lengths, loss_type, *rest) -> None:
        *numbers, losses, sequence_logprobs, gradients = rest
        inputs = map(address, (logprobs, cu_seqlens, ref_logprobs, lengths))
        outputs = map(address, (losses, sequence_logprobs, gradients))
        args = PairLossArgs(*inputs, self.library.pair_formula(loss_type.encode()), *numbers, *outputs)
        self._run("simt_pair_loss", args, len(losses))

    def pair_loss_backward(self, gradients, cu_seqlens, grad_losses, grad_sequence_logprobs, out) -> None:
        upstream = [
            value
            for grad in (grad_losses, grad_sequence_logprobs)
            for value in (address(grad), 0 if grad is None else grad.stride(0))
        ]
        args = PairLossBackwardArgs(address(gradients), address(cu_seqlens), *upstream, address(out))
        self._run("simt_pair_loss_backward", args, len(gradients) // 2, len(out))

    def policy_loss_forward(self, *arguments) -> torch.Tensor:
        vectors, (loss_type, *numbers, bias_correct_kl, cap), outputs = arguments[:6], arguments[6:15], arguments[15:]
        num_tokens = len(vectors[0])
        partial_sums = torch.full((self.library.policy_loss_blocks(ctypes.c_int64(num_tokens)),), float("nan"))
        integers = (num_tokens, self.library.policy_formula(loss_type.encode()), bias_correct_kl)
        outputs = map(address, (partial_sums, *outputs))
        self._run("simt_policy_loss", PolicyLossArgs(*map(address, vectors), *integers, *numbers, cap, *outputs))
        return partial_sums


@pytest.fixture(scope="module")
def host_kernels(compile_host) -> HostKernels:
    return HostKernels(compile_host("loss_kernels_simt.cpp", "-shared", "-fPIC"))


@pytest.fixture
def kernels(host_kernels, monkeypatch):
    """Within a test the ops launch the simulation, and fresh memory is NaN."""
    for name in ("pair_loss_forward", "pair_loss_backward", "policy_loss_forward"):
        monkeypatch.setattr(launchers, name, getattr(host_kernels, name))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def upstream_of_both(losses, sequence_logprobs):
    return losses.mean() + (torch.arange(len(sequence_logprobs)) * sequence_logprobs).sum()


def upstream_of_losses(losses, sequence_logprobs):
    return (torch.arange(1, len(losses) + 1) * losses).sum()


def upstream_of_sequences(losses, sequence_logprobs):
    return sequence_logprobs.mean()


def run_pair(problem, dtype, upstream, loss_type, *, reference):
    arguments = problem.arguments(dtype)
    if reference:
        outputs = pair_loss(*arguments, loss_type=loss_type, **NUMBERS, backend="torch")
    else:
        outputs = _pair_loss(*arguments, loss_type, *NUMBERS.values(), "triton")[:2]
    upstream(*outputs).backward()
    return *(output.detach() for output in outputs), arguments[0].grad


def assert_pair_as_good(problem, upstream, loss_type):
    results = [
        run_pair(problem, dtype, upstream, loss_type, reference=reference)
        for dtype, reference in ((torch.float32, False), (torch.float32, True), (torch.float64, True))
    ]
    for name, *values in zip(("losses", "sequence_logprobs", "gradient"), *results, strict=True):
        assert_as_good(*values, name, FLOOR[torch.float32])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_pair_loss_and_gradient(loss_type):
    assert_pair_as_good(pair_problem(), upstream_of_both, loss_type)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("upstream", [upstream_of_losses, upstream_of_sequences])
@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (1, 1), (600, 0), (3, 1, 0, 2)], ids=str)
def test_pair_sizes(lengths, upstream):
    problem = pair_problem(lengths)
    problem.lengths = torch.tensor(lengths)
    assert_pair_as_good(problem, upstream, "sigmoid_norm")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("spread", [2.0**-10, 2.0**7, 2.0**14])
@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_pair_extreme_log_ratios(loss_type, spread):
    problem = pair_problem((1,) * 8)
    problem.ref_logprobs = torch.zeros(8)
    problem.logprobs = spread * torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    ours = run_pair(problem, torch.float32, upstream_of_losses, loss_type, reference=False)
    exact = run_pair(problem, torch.float64, upstream_of_losses, loss_type, reference=True)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_a_nan_reaches_its_pair_and_no_other(loss_type):
    problem = pair_problem((3, 2, 4, 1))
    problem.logprobs[1] = float("nan")
    losses, _, gradient = run_pair(problem, torch.float32, upstream_of_losses, loss_type, reference=False)
    assert losses.isnan().tolist() == [True, False] and gradient[5:].isfinite().all()


def run_policy(problem, dtype, *, reference, loss_type="clip", beta=0.0, delta=None, bias_correct_kl=True):
    (logprobs, old, *rest), keywords = problem.arguments(dtype)
    if reference:
        numbers = {"loss_type": loss_type, "beta": beta, "delta": delta, "bias_correct_kl": bias_correct_kl}
        numbers["epsilon_high"] = 1.2 if loss_type == "cispo" else 0.2
        loss, kl, clipped = policy_loss(logprobs, old, *rest, **keywords, **numbers, backend="torch")
    else:
        bounds = (float("-inf") if loss_type == "cispo" else 0.8, 1.2)
        numbers = (loss_type, beta, *bounds, delta or float("inf"), 1.0, 1.05, bias_correct_kl, "triton")
        loss, kl, clipped, _ = _policy_loss(logprobs, old, keywords["ref_logprobs"], *rest, *numbers)
    (3 * loss).backward()
    return loss.detach(), kl, clipped, logprobs.grad


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bias_correct_kl", [True, False])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("loss_type, delta", [("clip", None), ("clip", 1.1), ("cispo", None), ("sapo", None)])
def test_policy_loss_and_gradient(loss_type, delta, on_policy, reference, bias_correct_kl):
    problem = policy_problem(on_policy=on_policy, reference=reference)
    numbers = {"loss_type": loss_type, "delta": delta, "bias_correct_kl": bias_correct_kl}
    numbers["beta"] = 0.3 if reference else 0.0
    ours, baseline, exact = (
        run_policy(problem, dtype, reference=with_torch, **numbers)
        for dtype, with_torch in ((torch.float32, False), (torch.float32, True), (torch.float64, True))
    )
    assert torch.equal(ours[2], baseline[2])
    for name, index in (("loss", 0), ("kl", 1), ("gradient", 3)):
        if exact[index] is not None:
            assert_as_good(ours[index], baseline[index], exact[index], name, FLOOR[torch.float32])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 3), (1,), (1023, 1), (1025,)], ids=str)
def test_policy_sizes(lengths):
    problem = policy_problem(lengths)
    results = [run_policy(problem, torch.float32, reference=with_torch, beta=0.1) for with_torch in (False, True)]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_extreme_log_ratios(loss_type):
    values = torch.tensor([sign * size for sign in (-1, 1) for size in (0.125, 15.0, 41.0, 1e4)])
    old_logprobs, ref_logprobs, branch = torch.cartesian_prod(values, values, torch.arange(3.0)).T.contiguous()
    problem = policy_problem((len(branch) // 3,) * 3)
    problem.logprobs, problem.old_logprobs, problem.ref_logprobs = torch.zeros_like(branch), old_logprobs, ref_logprobs
    problem.branch, problem.advantages = branch.long(), torch.tensor([-1.0, 0.0, 1.0])
    ours = run_policy(problem, torch.float32, reference=False, loss_type=loss_type, beta=0.1)
    exact = run_policy(problem, torch.float64, reference=True, loss_type=loss_type, beta=0.1)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("field", ["logprobs", "old_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_nan_reaches_the_loss_and_no_other_token(loss_type, field):
    problem = policy_problem((3, 2, 4, 1))
    getattr(problem, field)[4] = float("nan")
    loss, _, _, gradient = run_policy(problem, torch.float32, reference=False, loss_type=loss_type, beta=0.1)
    assert loss.isnan() and gradient[torch.arange(10) != 4].isfinite().all()


@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_compiled_kernels_do_not_spill_and_move_little(target):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    found = {kernel.label: kernel for kernel in compile_cuda_kernels(nvcc, target, "loss_*.cu")}
    # A token's own bytes; its sequence's advantage and weight come on top.
    most = {"pair_loss": 1, "pair_loss_backward": 1, "policy_loss": (29 + 8) / 29}
    assert found.keys() == most.keys()
    for label, kernel in found.items():
        assert kernel.resources.spill_bytes == 0 and kernel.resources.occupancy >= 0.75, label
        assert 0 < kernel.least_bytes <= kernel.resources.streamed_bytes <= most[label] * kernel.least_bytes, label


def run_sanitized(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unexpected memory mapping" in result.stderr:  # older sanitizers cannot live with much address randomisation
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=60)
    return result


@pytest.mark.slow
def test_no_races_and_a_missing_barrier_is_found(compile_host):
    clean = run_sanitized(compile_host("loss_kernels_sanitized.cpp", "-fsanitize=thread"))
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    plant = "-DTRL_FAST_PLANT_MISSING_BARRIER"
    broken = run_sanitized(compile_host("loss_kernels_sanitized.cpp", "-fsanitize=thread", plant))
    assert broken.returncode != 0
    assert "data race" in broken.stderr and "block_sum" in broken.stderr, broken.stderr[:4000]


@pytest.mark.parametrize("excess, kernel", [(("1", "0"), "sequence_sum"), (("0", "1"), "visit_token")])
def test_no_access_out_of_bounds_and_planted_ones_are_found(compile_host, excess, kernel):
    program = compile_host("loss_kernels_sanitized.cpp", "-fsanitize=address", "-fsanitize-sections=simt_shared")
    clean = run_sanitized(program)
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    broken = run_sanitized(program, *excess)
    assert broken.returncode != 0
    assert "heap-buffer-overflow" in broken.stderr and kernel in broken.stderr, broken.stderr[:4000]


def simulated(forward):
    """The op: float32 by the kernels, which `_pair_loss` and `_policy_loss` launch, float64 by PyTorch."""

    def call(logprobs, *others, **numbers):
        with pytest.MonkeyPatch.context() as patch:
            if logprobs.dtype == torch.float32:
                module = sys.modules[f"trl_fast.ops.{forward.__name__}"]
                patch.setattr(module, "choose_backend", lambda *given: "triton")
            return forward(logprobs, *others, **numbers)

    return call


@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_pair_losses_of_extreme_log_ratios(kernels, loss_type):
    run, inputs = extreme_losses.run_pair(loss_type, simulated(pair_loss)), pair_inputs(loss_type, 17)
    assert_exact(run, run(*inputs), inputs, loss_type, PAIR_FLOORS.get(loss_type, TINY))


@pytest.mark.parametrize("bias_correct_kl", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_losses_of_extreme_log_ratios(kernels, loss_type, bias_correct_kl):
    """The loss alone, and the KL estimates alone."""
    old, ref, advantages = policy_inputs()
    for beta, inputs in ((0.0, (old, ref, advantages)), (1.0, (old, ref, 0 * advantages))):
        run = extreme_losses.run_policy(loss_type, bias_correct_kl, beta, simulated(policy_loss))
        assert_exact(run, run(*inputs), inputs, loss_type)
