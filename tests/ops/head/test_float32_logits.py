"""The head as on a GPU: its tiles, float32 logits from 16-bit factors, packed ones; products stand in for a GPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import measure_peak
from support.heads import error, make_problem
from support.triton_interpreter import interpreted_kernels
from trl_fast.ops import HeadOptions, device, linear_cross_entropy, linear_logprob, linear_token_loss
from trl_fast.ops.device import DeviceFacts
from trl_fast.ops.head import gradients, plan, sweep
from trl_fast.ops.head.autograd import linear_scores
from trl_fast.ops.head.kept_logits import CHUNK, unpack
from trl_fast.ops.head.row_kernels import (
    ROW_KERNELS,
    RowKernels,
    row_grad_packed_reference,
    row_scores_packed_reference,
)
from trl_fast.ops.head.tiled_head import TiledHead
from trl_fast.ops.matmul import add_mm, mm_into

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch):
    """16-bit products whose sums are handed over in float32."""

    def float32_mm(left, right):
        assert left.dtype == right.dtype != torch.float32
        return left.float() @ right.float()

    def float32_mm_into(out, left, right):
        return out.copy_(float32_mm(left, right))

    def float32_add_mm(total, left, right):
        total.add_(float32_mm(left, right))

    monkeypatch.setitem(device.simulated.facts, "cpu", DeviceFacts("cuda", multiplies_bf16=True))
    monkeypatch.setattr(plan, "GPU_TILES", plan.GPU_TILES._replace(row_step=8))
    packed = {"scores_packed": row_scores_packed_reference, "grad_packed": row_grad_packed_reference}
    monkeypatch.setitem(ROW_KERNELS, "torch", ROW_KERNELS["torch"]._replace(**packed))
    for module in (sweep, gradients):
        monkeypatch.setattr(module, "mm_into", float32_mm_into)
        monkeypatch.setattr(module, "add_mm", float32_add_mm)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "torch":
        yield "torch"
    else:
        with interpreted_kernels():
            yield "triton"


def confident_problem(n=24, v=700, h=64):
    """Rows that give their target 99% of the probability or more: its logit is near 14."""
    problem = make_problem(n, v, h, dtype=torch.bfloat16, spread=0.1)
    with torch.no_grad():
        rows = problem.weight[problem.targets].float()
        problem.hidden += 14 * rows / rows.square().sum(1, keepdim=True)
    return problem


def of_logprob(problem, **options):
    given = (problem.hidden, problem.weight, problem.targets)
    return -linear_logprob(*given, **options).logprobs.sum()


def of_cross_entropy(problem, **options):
    return linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="sum", **options)


def of_token_loss(problem, **options):
    given = (problem.hidden, problem.weight, problem.targets)
    return linear_token_loss(*given, lambda scores, _: -scores.logprobs.sum(), **options).loss


WORKSPACES = {"all kept": None, "some kept": 50_000}


@pytest.mark.parametrize("workspace_bytes", WORKSPACES.values(), ids=WORKSPACES.keys())
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("op", [of_logprob, of_cross_entropy, of_token_loss])
def test_gradients_are_those_of_float32_logits(op, frozen, workspace_bytes, backend):
    """bfloat16 logits near 14 are off by up to 0.03, and with them the gradients of plain PyTorch."""
    problem = confident_problem()
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    leaves = [leaf for leaf in problem.leaves if leaf.requires_grad]
    loss = op(problem, workspace_bytes=workspace_bytes, backend=backend)
    exact, baseline = (
        F.cross_entropy(problem.logits(dtype), problem.targets, reduction="sum") for dtype in (torch.float64, None)
    )
    assert error(loss, exact) < 1e-4 < error(baseline, exact)
    grads = [torch.autograd.grad(x, leaves) for x in (loss, baseline, exact)]
    for ours, theirs, true in zip(*grads, strict=True):
        assert ours.dtype == torch.bfloat16
        assert error(ours, true) < 5e-3 < error(theirs, true) / 3


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("op", [of_logprob, of_cross_entropy, of_token_loss])
def test_a_float32_weight_is_cast_slice_by_slice_where_the_workspace_is_small(op, frozen, monkeypatch):
    """Loss and gradients are those of a weight that is cast at once; no copy is larger than its share."""
    problem = confident_problem(v=5000)
    problem.weight = problem.weight.detach().float().requires_grad_("weight" not in frozen)
    leaves = [problem.hidden, problem.weight][: 2 - len(frozen)]
    copied = []
    tile_of = TiledHead.cast_tile

    def recorded(head, columns):
        copied.append(len(tile_of(head, columns)))
        return tile_of(head, columns)

    monkeypatch.setattr(TiledHead, "cast_tile", recorded)
    found = []
    for workspace_bytes, most in ((None, 5000), (600_000, 2048)):
        copied.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = op(problem, workspace_bytes=workspace_bytes, backend="torch")
        found.append((loss, *torch.autograd.grad(loss, leaves)))
        assert max(copied) <= most and (most == 5000 or {2048, 5000 - 2 * 2048} <= set(copied))
    for whole, by_slices in zip(*found, strict=True):
        assert error(by_slices, whole) < 1e-3


LOSS_SCALE, NUM_ITEMS = 2.0**16, 2_000_000


def scaled_cross_entropy(problem, **options):
    loss = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, num_items=NUM_ITEMS, **options)
    return LOSS_SCALE * loss


def scaled_token_loss(problem, **options):
    given = (problem.hidden, problem.weight, problem.targets)
    return LOSS_SCALE * linear_token_loss(*given, lambda s, _: -s.logprobs.sum() / NUM_ITEMS, **options).loss


@pytest.mark.parametrize("workspace_bytes", WORKSPACES.values(), ids=WORKSPACES.keys())
@pytest.mark.parametrize("op", [scaled_cross_entropy, scaled_token_loss])
def test_float16_gradients_do_not_vanish_before_the_loss_scale(op, workspace_bytes, backend):
    """A probability of 1/700 over two million tokens is 7e-10, less than float16 has; times the scale it is not."""
    problem = make_problem(24, 700, 64, dtype=torch.float16, spread=0.1)
    loss = op(problem, workspace_bytes=workspace_bytes, backend=backend)
    exact = F.cross_entropy(problem.logits(torch.float64), problem.targets, reduction="sum") * LOSS_SCALE / NUM_ITEMS
    for ours, true in zip(*(torch.autograd.grad(x, problem.leaves) for x in (loss, exact)), strict=True):
        assert ours.dtype == torch.float16
        assert error(ours, true) < 1e-3


def test_float16_gradients_of_rows_that_weigh_more_and_more(backend):
    """A factor that the first rows allow is too much for the last, and a step without a loss scale stays finite."""
    problem = make_problem(24, 700, 64, dtype=torch.float16, spread=0.1)
    weights = torch.logspace(-7, 2, 24, dtype=torch.float64)

    def weighted(scores, rows):
        return -(scores.logprobs * weights[rows].to(scores.logprobs.dtype)).sum()

    given = (problem.hidden, problem.weight, problem.targets)
    loss = linear_token_loss(*given, weighted, workspace_bytes=50_000, backend=backend).loss
    exact = (F.cross_entropy(problem.logits(torch.float64), problem.targets, reduction="none") * weights).sum()
    for ours, true in zip(*(torch.autograd.grad(x, problem.leaves) for x in (loss, exact)), strict=True):
        assert error(ours, true) < 1e-3


def test_kept_logits_are_fine_enough_and_left_as_they_are(backend):
    problem = confident_problem()
    with torch.no_grad():
        given = (problem.hidden, problem.weight, problem.targets, None, 1.0, 0.0, 1.0, 0, 1, 1 << 20, backend)
        *_, words, tops = linear_scores(*given)
    # Chunks of packed rows, or of the fused kernel's tiles in the interpreter.
    logits = unpack(words[0, :, :700], tops[0], CHUNK if backend == "torch" else 128)
    targets = problem.targets[:, None]
    assert logits.shape == (24, 700) and (logits.gather(1, targets) == float("-inf")).all()
    assert (logits - problem.logits(torch.float64)).scatter(1, targets, 0.0).abs().max() < 2**-10
    loss = of_logprob(problem, backend=backend)
    first, second = (torch.autograd.grad(loss, problem.leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden", "weight")], ids=["trained", "frozen", "scoring"])
@pytest.mark.parametrize("op", [of_logprob, of_cross_entropy, of_token_loss])
def test_a_step_stays_inside_its_workspace(op, frozen, monkeypatch):
    n, v, h = 512, 8192, 16
    # Memory alone: what takes the place of a GPU's kernels and products would have temporaries of its own.
    monkeypatch.setitem(ROW_KERNELS, "torch", RowKernels(*[lambda *_: None] * 2, 0, *[lambda *_: None] * 3))
    for module in (sweep, gradients):
        monkeypatch.setattr(module, "mm_into", lambda out, *_: out)
        monkeypatch.setattr(module, "add_mm", lambda *_: None)
    problem = make_problem(n, v, h, dtype=torch.bfloat16)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    workspace = 4 * n * v // 2

    def step():
        loss = op(problem, workspace_bytes=workspace, backend="torch")
        if loss.requires_grad:
            loss.backward()

    # Beside the workspace: the weight's gradient in float32 and in 16 bits, and [N, H] vectors.
    results = 6 * v * h if not frozen else 0
    peak = measure_peak(step).peak_bytes
    assert peak < workspace + results + 20 * n * h + 200 * n
    # It is used: by a tile when scoring, else by kept logits too.
    assert peak > workspace * (0.15 if "hidden" in frozen else 0.6)


def test_products_of_the_cpu(monkeypatch):
    """By ATen's library: the factors' product, rounded to their dtype, then cast."""
    monkeypatch.setitem(device.simulated.facts, "cpu", replace(device.real_facts(CPU), own_products=False))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 7), (7, 3)))
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.full((5, 3), float("nan"), dtype=dtype)
        assert mm_into(out, left, right) is out
        assert torch.equal(out, torch.mm(left, right).to(dtype))
        add_mm(out, left, right)
        torch.testing.assert_close(out, 2 * torch.mm(left, right).to(dtype), rtol=1e-2, atol=1e-2)


def test_products_of_a_gpu_are_calls_that_this_torch_takes():
    """Shapes and dtypes only: nothing runs."""
    with FakeTensorMode():
        left, right = (torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((5, 7), (3, 7)))
        out = torch.empty(5, 3, device="cuda")
        assert mm_into(out, left, right.t()).dtype == torch.float32
        with pytest.raises(RuntimeError):
            mm_into(out.double(), left, right.t())
        # torch.addmm with both out and out_dtype has no fake on a CPU build; its signature is looked at instead.
        names = [argument.name for argument in torch.ops.aten.addmm.dtype_out._schema.arguments]
        assert names == ["self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"]


def test_the_workspace_of_a_gpu():
    """A power of two times 1 GiB: up to a sixteenth of the memory, 8 GiB, and a quarter of what is free."""
    gib = 1 << 30
    for free, total, expected in ((79, 80, 4), (140, 141, 8), (20, 80, 4), (15, 80, 2), (3, 80, 1), (24, 24, 1)):
        assert plan.default_workspace(free * gib, total * gib) == expected * gib
    memory = device.DeviceMemory(79 * gib, 80 * gib, gib, gib)
    gpu = DeviceFacts("cuda", multiplies_bf16=True, read_memory=lambda: memory)
    for facts, expected in ((DeviceFacts("cpu", multiplies_bf16=False), gib), (gpu, 4 * gib)):
        assert plan.workspace_of(None, CPU, facts) == expected and plan.workspace_of(5, CPU, facts) == 5


def test_a_workspace_larger_than_the_gpu_is_refused_by_name():
    memory = device.DeviceMemory(1 << 30, 2 << 30, 1 << 30, 1 << 30)
    facts = DeviceFacts("cuda", multiplies_bf16=True, read_memory=lambda: memory)
    with pytest.raises(ValueError, match="workspace_bytes: 2147483649 bytes are more than the 2147483648 of cuda"):
        plan.workspace_of((2 << 30) + 1, torch.device("cuda"), facts)


def test_the_sparse_gradient_is_for_cpus():
    with pytest.raises(ValueError, match="head_grad='sparse' is for a CPU only, not for cuda"):
        HeadOptions(head_grad="sparse").check(torch.device("cuda"))


def test_row_blocks_of_a_gpu_are_whole_steps(monkeypatch):
    """As many rows as fit, in equal blocks whose rows a product covers without a rest."""
    monkeypatch.setattr(plan, "GPU_TILES", plan.GPU_TILES._replace(row_step=256))

    def rows(workspace_gib, num_rows):
        options = {"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "capped": False}
        options |= {"kernels": ROW_KERNELS["cuda"], "workspace_bytes": workspace_gib << 30}
        options["facts"] = DeviceFacts("cuda", multiplies_bf16=True)
        whole, blocks = (
            plan.plan_head(num_rows, (151936, 8), keep=keep, **options) for keep in (plan.LOGITS, plan.BLOCKS)
        )
        assert whole.block_rows == num_rows and blocks.kept_rows == blocks.block_rows
        return whole.kept_rows, blocks.block_rows

    assert rows(4, 8192) == (8192, 8192) and rows(4, 100) == (100, 100)
    kept, block = rows(1, 8192)
    assert kept % 256 == block % 256 == 0 and block <= kept < 8192 and -(-8192 // block) == -(-8192 // kept)
