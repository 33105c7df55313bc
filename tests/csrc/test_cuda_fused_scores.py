"""Tests what the kernel made with CUTLASS does to logits, compiled as host C++, and what it compiles to."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from benchmarks.compiled_cuda_kernels import compile_cuda_kernels, find_nvcc
from build_backend import find_cutlass
from support.heads import FLOOR, assert_as_good, make_problem, scores_from_logits
from support.host_fused_scores import HostFusedScores, MergeArgs, TileScoreArgs
from support.host_kernels import run_sanitized
from support.packed_rows import same_bits
from support.triton_interpreter import interpreted_kernels
from trl_fast.kernels import linear_scores
from trl_fast.ops import device, linear_logprob
from trl_fast.ops.head import cutlass_scores, fused_kernel, gradients, sweep
from trl_fast.ops.head.cutlass_scores import CutlassTiles
from trl_fast.ops.head.fused_kernel import SlicedWeight, empty_packed, score_rows_fused, try_out
from trl_fast.ops.head.kept_logits import pack, unpack
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.plan import slices
from trl_fast.ops.head.row_statistics import (
    ENTROPY,
    ENTROPY_ROW,
    IS_TOP1_ROW,
    LOG_SUM_SQ_ROW,
    LOGPROB_ROW,
    LSE_ROW,
    MEAN_LOGITS,
    MEAN_LOGITS_ROW,
    TARGET,
    TOP,
    output_mask,
)
from trl_fast.ops.head.sweep import finish_scores, new_state

pytestmark = pytest.mark.gpu_code

CPU, TILES = torch.device("cpu"), CutlassTiles()
PART = TILES.columns
EVERYTHING = output_mask(("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
ROW_OF = {
    "logprobs": LOGPROB_ROW,
    "entropy": ENTROPY_ROW,
    "log_sum_sq_probs": LOG_SUM_SQ_ROW,
    "mean_logits": MEAN_LOGITS_ROW,
}
# Around a warp's rows, an instruction's and a tile's; around sixteen bytes of words, a part and a tile.
SHAPES = {
    "plain": dict(n=13, v=257),
    "one row": dict(n=1, v=1000),
    "zero rows": dict(n=0, v=130),
    "one word": dict(n=3, v=1),
    "less than a part": dict(n=9, v=PART - 1),
    "a part": dict(n=17, v=PART),
    "a tile": dict(n=128, v=192),
    "more than a tile": dict(n=129, v=193),
    "many parts": dict(n=3, v=40 * PART + 5),
    "offset 1e4": dict(n=9, v=300, offset=1e4),
    "temperature": dict(n=9, v=300, temperature=0.6),
    "softcap": dict(n=9, v=300, bias=True, softcap=3.0, temperature=0.7),
    "all": dict(n=9, v=300, bias=True, logit_scale=0.5, temperature=1.7),
    "peaked": dict(n=9, v=300, spread=20.0),
}


@pytest.fixture(scope="session")
def ops(compile_host) -> HostFusedScores:
    return HostFusedScores(compile_host("fused_scores_simt.cpp", "-shared", "-fPIC"))


@pytest.fixture(autouse=True)
def _simulated(request, monkeypatch):
    """The ops of the extension's CUDA part are those of the simulation."""
    if "ops" in request.fixturenames:
        ops = request.getfixturevalue("ops")
        for name in ("fused_scores", "merge_parts"):
            monkeypatch.setattr(torch.ops.trl_fast, name, getattr(ops, name), raising=False)


def run(problem, outputs=EVERYTHING, kept=0, part_bytes=1 << 30, columns=None):
    """Statistics (7, N), and what was kept of the first rows; memory is poisoned before.

    columns: of a slice of the weight.
    """
    n, v = len(problem.targets), len(problem.weight)
    keep = empty_packed(kept, v, CPU, PART) if kept else None
    if kept:
        keep.values.fill_(12345)
        keep.tops.fill_(float("nan"))
    transform = LogitTransform.of(**problem.transform)
    bias = None if problem.bias is None else problem.bias.detach()
    weight = problem.weight.detach()
    weight = SlicedWeight(slices(0, v, columns or v), weight.__getitem__)
    state = new_state(n, CPU)
    given = (problem.hidden.detach(), weight, problem.targets, bias, transform, outputs, state, keep)
    score_rows_fused(*given, TILES, part_bytes)
    return finish_scores(state, outputs, v, torch.float32), keep


def test_structures_are_those_of_the_kernels(ops):
    sizes = (ctypes.c_int64 * 2)()
    ops.library.simt_fused_bytes(sizes)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in (TileScoreArgs, MergeArgs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(ops, shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    statistics, _ = run(problem)
    exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
    baseline = scores_from_logits(problem.logits(None), problem.targets)
    for name, row in ROW_OF.items():
        assert_as_good(statistics[row], baseline[name], exact[name], name, FLOOR[dtype])
    if not shape.get("offset"):
        assert torch.equal(statistics[IS_TOP1_ROW].bool(), exact["is_top1"])


@pytest.mark.parametrize("outputs", [0, ENTROPY, MEAN_LOGITS, EVERYTHING - ENTROPY])
def test_some_outputs_are_those_of_all(ops, outputs):
    problem = make_problem(20, 300, dtype=torch.bfloat16, bias=True)
    whole, some = new_state(20, CPU), new_state(20, CPU)
    untouched = some.clone()
    for state, asked in ((whole, EVERYTHING), (some, outputs)):
        given = (problem.hidden.detach(), SlicedWeight.whole(problem.weight.detach()), problem.targets)
        score_rows_fused(*given, problem.bias.detach(), LogitTransform(), asked, state, None, TILES, 1 << 30)
    rows = {ENTROPY: (2,), MEAN_LOGITS: (4,), 0: (), EVERYTHING - ENTROPY: (3, 4, 6)}[outputs]
    for row in range(7):
        assert same_bits(some[row], whole[row] if row in (0, 1, 5, *rows) else untouched[row]), row


@pytest.mark.parametrize("kept", [1, 37])
@pytest.mark.parametrize("shape", [dict(v=333), dict(v=300, bias=True, temperature=0.7), dict(v=PART), dict(v=5)])
def test_kept_logits_and_the_same_bits_with_and_without(ops, kept, shape):
    problem = make_problem(n=37, **shape, dtype=torch.bfloat16, spread=0.5)
    statistics, keep = run(problem, kept=kept)
    assert torch.equal(statistics, run(problem)[0])
    v = shape["v"]
    logits = unpack(keep.values[0, :, :v], keep.tops[0], PART)
    targets = problem.targets[:kept, None]
    assert (logits.gather(1, targets) == float("-inf")).all()
    away = (logits - problem.logits(torch.float64)[:kept]).scatter(1, targets, 0.0)
    assert away.abs().max() <= 2**-11 + 1e-5
    assert (keep.values[0, :, v:] == 12345).all()


def hard_products(v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (9, v) that break packing, and targets."""
    products = 4 * torch.randn(9, v, generator=torch.Generator().manual_seed(v))
    products[1] += 1e4
    products[2, 1::2] = float("-inf")
    products[3] = float("-inf")
    products[4, ::3] -= 1000
    products[5] = 1.5
    products[6, v // 2] = float("nan")
    products[7, v // 3] = float("inf")
    products[8, : v // 2 // PART * PART] = float("-inf")  # whole parts of it, before others
    return products, torch.tensor([v - 1, 0, v + 7, 1, -3, v // 2, 2, 3, v // 4]) % (v + 9)


@pytest.mark.parametrize("v", [1, 5, 64, 65, 200, 1001])
def test_words_are_those_of_the_format_bit_for_bit(ops, v):
    products, targets = hard_products(v)
    keep = empty_packed(9, v, CPU, PART).tile(slice(0, v))
    parts, state = torch.full((6, -(-v // PART), 9), float("nan")), new_state(9, CPU)
    ops.scores_of(products, targets, None, 1.0, 0.0, 1.0, EVERYTHING, parts, state, keep.values)
    ops.merge_parts(parts, EVERYTHING, state, keep.tops)
    inside = (targets >= 0) & (targets < v)
    others = products.clone()
    others[inside, targets[inside]] = float("-inf")
    for number, start in enumerate(range(0, v, PART)):
        part = others[:, start : start + PART]
        words, tops = torch.empty(part.shape, dtype=torch.int16), torch.empty(9, 1)
        pack(part, words, tops)
        assert same_bits(keep.tops[:, number], tops[:, 0]) and torch.equal(keep.values[:, start : start + PART], words)
    assert same_bits(state[TARGET][inside].float(), products[inside, targets[inside]])
    assert same_bits(state[TOP].float(), others.nan_to_num(float("-inf"), float("inf")).amax(1))
    statistics = finish_scores(state, EVERYTHING, v, torch.float32)
    assert statistics[LSE_ROW, 7 if v > 3 else 6].isnan() and (v == 1 or statistics[LSE_ROW, 3 if v > 1 else 0] < 0)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("v", [1, 2, 67, 200])
def test_capped_logits_and_raw_products(ops, v, softcap):
    """The kernel caps logits, and keeps products as they were before, where it is asked to."""
    problem = make_problem(9, v, dtype=torch.bfloat16, bias=True, temperature=0.7, softcap=softcap, logit_scale=0.5)
    products = problem.hidden.detach().float() @ problem.weight.detach().float().t()
    kept = torch.full((9, v + 7), float("nan"))[:, : (v + 3) // 4 * 4].contiguous()
    parts, state = torch.full((6, -(-v // PART), 9), float("nan")), new_state(9, CPU)
    numbers = (0.5, softcap, 1 / 0.7, EVERYTHING)
    ops.scores_of(products, problem.targets, problem.bias.detach(), *numbers, parts, state, kept[:, :v])
    ops.merge_parts(parts, EVERYTHING, state, None)
    assert torch.equal(kept[:, :v], products) and kept[:, v:].isnan().all()
    statistics = finish_scores(state, EVERYTHING, v, torch.float32)
    exact = scores_from_logits(problem.logits(torch.float64), problem.targets)
    baseline = scores_from_logits(problem.logits(torch.float32), problem.targets)
    for name, row in ROW_OF.items():
        assert_as_good(statistics[row], baseline[name], exact[name], name, FLOOR[torch.float32])


@pytest.mark.parametrize("v", [64, 130, 257])
def test_words_are_those_of_the_triton_kernel_bit_for_bit(ops, v):
    """Of small integers every product is exact, in whichever order it is summed."""
    generator = torch.Generator().manual_seed(v)
    problem = make_problem(19, v, 16, dtype=torch.bfloat16, bias=True, temperature=0.7)
    with torch.no_grad():
        for factor in (problem.hidden, problem.weight):
            factor.copy_(torch.randint(-3, 4, factor.shape, generator=generator))
    statistics, keep = run(problem, kept=19)
    theirs = empty_packed(19, v, CPU, PART)
    state = new_state(19, CPU)
    given = (problem.hidden.detach(), SlicedWeight.whole(problem.weight.detach()), problem.targets)
    with interpreted_kernels():
        tiles = linear_scores.Tiles(16, PART, 16, 1)
        transform = LogitTransform.of(temperature=0.7)
        score_rows_fused(*given, problem.bias.detach(), transform, EVERYTHING, state, theirs, tiles, 1 << 30)
    assert torch.equal(keep.values[..., :v], theirs.values[..., :v]) and torch.equal(keep.tops, theirs.tops)
    expected = finish_scores(state, EVERYTHING, v, torch.float32)
    torch.testing.assert_close(statistics, expected, rtol=2e-6, atol=2e-6)


def test_a_row_has_the_same_bits_whatever_the_others(ops):
    problem = make_problem(150, 333, dtype=torch.bfloat16)
    whole, _ = run(problem)
    assert torch.equal(run(problem, part_bytes=1)[0], whole)
    problem.hidden, problem.targets = problem.hidden[20:23], problem.targets[20:23]
    assert torch.equal(run(problem)[0], whole[:, 20:23])


@pytest.mark.parametrize("columns", [PART, 5 * PART])
def test_slices_of_the_weight_give_the_same_bits(ops, columns):
    problem = make_problem(5, 400, dtype=torch.bfloat16, bias=True, temperature=0.7)
    (whole, kept), (by_slices, kept_by_slices) = (run(problem, kept=4, columns=one) for one in (None, columns))
    assert torch.equal(by_slices, whole) and torch.equal(kept_by_slices.tops, kept.tops)
    assert torch.equal(kept_by_slices.values[..., :400], kept.values[..., :400])


@pytest.mark.parametrize("largest", [(130, 300, 320), (300, 320), (320, 325), (63, 64)])
def test_top1(ops, largest):
    """The first of several largest logits counts, in whichever parts they are."""
    problem = make_problem(7, 333, h=16, dtype=torch.bfloat16)
    with torch.no_grad():
        problem.weight[:] = torch.linspace(-0.1, 0.1, 333)[:, None]
        problem.weight[list(largest)] = 1.0
        problem.hidden[:] = 1.0
    problem.targets = torch.tensor([130, 300, 320, 325, 129, 0, 63])
    assert torch.equal(run(problem)[0][IS_TOP1_ROW].bool(), problem.targets == largest[0])


def test_a_target_outside_the_vocabulary_is_nan(ops):
    problem = make_problem(4, 200, dtype=torch.bfloat16)
    problem.targets = torch.tensor([5, 200, -1, 2**40])
    assert run(problem)[0][LOGPROB_ROW].isnan().tolist() == [False, True, True, True]


def test_it_is_tried_out_and_wrong_numbers_are_found(ops, monkeypatch):
    assert try_out(TILES, torch.bfloat16, CPU) == ""
    score = ops.fused_scores

    def wrong_state(*given):
        score(*given)
        given[8][1] *= 1.01

    def wrong_words(*given):
        score(*given)
        if given[10] is not None:
            given[10][5, 300] += 9

    for wrong, what in ((wrong_state, "log-probs"), (wrong_words, "kept logits")):
        monkeypatch.setattr(torch.ops.trl_fast, "fused_scores", wrong)
        assert try_out(TILES, torch.bfloat16, CPU) == f"{what} differ from PyTorch's"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Heads are cut, and compute, as on a GPU that this kernel serves; other kernels are Triton's, interpreted."""
    monkeypatch.setenv("TRL_FAST_FUSED_KERNEL", "cutlass")
    monkeypatch.setattr(cutlass_scores, "supports_cutlass", lambda device: cutlass_scores.Support(True, ""))
    monkeypatch.setitem(device.simulated.facts, "cpu", device.DeviceFacts("cuda", multiplies_bf16=True))
    for module in (sweep, gradients):
        product = lambda out, left, right: out.copy_(left.float() @ right.float())  # noqa: E731
        monkeypatch.setattr(module, "mm_into", product)
        monkeypatch.setattr(module, "add_mm", lambda total, left, right: total.add_(left.float() @ right.float()))
    with interpreted_kernels():
        yield


@pytest.mark.parametrize("shape", [dict(v=333, bias=True), dict(v=4500, h=16, temperature=0.7)], ids=str)
def test_the_op_scores_by_it_and_its_words_give_gradients(ops, on_a_gpu, shape):
    problem = make_problem(9, **shape, dtype=torch.bfloat16, spread=0.5)
    options = {"bias": problem.bias, "temperature": problem.temperature, "backend": "triton"}
    given = (problem.hidden, problem.weight, problem.targets)
    with torch.no_grad():
        alone = linear_logprob(*given, **options).logprobs
    before = ops.calls
    scores = linear_logprob(*given, **options).logprobs
    assert ops.calls == before + 2 and torch.equal(scores, alone)
    upstream = torch.linspace(-1, 1, 9)
    ours = torch.autograd.grad((scores * upstream).sum(), problem.leaves)
    results = []
    for dtype in (None, torch.float64):
        logp = problem.logits(dtype).log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
        results.append(torch.autograd.grad((logp * upstream).sum(), problem.leaves))
    for got, baseline, exact in zip(ours, *results, strict=True):
        assert_as_good(got, baseline, exact, str(tuple(got.shape)), FLOOR[torch.bfloat16])


def test_which_kernel_serves_is_said_and_can_be_asked_for(monkeypatch):
    def tiles():
        return fused_kernel.fused_tiles("triton", 64, torch.bfloat16, CPU)

    with interpreted_kernels():
        assert isinstance(tiles(), linear_scores.Tiles), "the kernel made with CUTLASS has not been run on a GPU"
        monkeypatch.setenv("TRL_FAST_FUSED_KERNEL", "cutlass")
        with pytest.raises(RuntimeError, match="TRL_FAST_FUSED_KERNEL=cutlass.*runs on a GPU, not on cpu"):
            tiles()
        yes = cutlass_scores.Support(True, "")
        monkeypatch.setattr(cutlass_scores, "supports_cutlass", lambda device: yes)
        assert tiles() == TILES
        monkeypatch.setenv("TRL_FAST_FUSED_KERNEL", "quack")
        with pytest.raises(ValueError, match="unknown name 'quack'"):
            tiles()


@pytest.mark.parametrize(("capability", "loaded", "reason"), [
    ((8, 0), True, "for sm_90a, and this GPU is sm_80"),
    ((9, 0), False, "built without CUDA"),
    ((9, 0), True, "built without CUTLASS: .*to build it run"),
])  # fmt: skip
def test_reasons(monkeypatch, capability, loaded, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    support = cutlass_scores.Support(loaded, "built without CUDA")
    monkeypatch.setattr(cutlass_scores, "load_cuda_kernels", lambda: support)
    found = cutlass_scores.supports_cutlass(torch.device("cuda"))
    assert not found.ok and re.search(reason, found.reason)
    monkeypatch.setattr(cutlass_scores, "cutlass_is_built", lambda: True)
    assert cutlass_scores.supports_cutlass(torch.device("cuda")).ok == (capability == (9, 0) and loaded)


def test_no_access_out_of_bounds_and_planted_ones_are_found(compile_host):
    program = compile_host("fused_scores_sanitized.cpp", "-fsanitize=address", "-fsanitize-sections=simt_shared")
    clean = run_sanitized(program, "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    for what, access in (
        ("words-behind-the-row", "WRITE"),
        ("raw-behind-the-row", "WRITE"),
        ("parts-behind-the-last", "WRITE"),
        ("reads-behind-the-bias", "READ"),
    ):
        broken = run_sanitized(program, what)
        assert broken.returncode != 0
        assert re.search(f"heap-buffer-overflow.*{access}", broken.stderr, re.DOTALL), broken.stderr[:4000]


@pytest.mark.slow
def test_no_races_and_a_missing_barrier_is_found(compile_host):
    clean = run_sanitized(compile_host("fused_scores_sanitized.cpp", "-fsanitize=thread"), "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    plant = "-DTRL_FAST_PLANT_MISSING_BARRIER"
    broken = run_sanitized(compile_host("fused_scores_sanitized.cpp", "-fsanitize=thread", plant), "clean")
    assert broken.returncode != 0 and "data race" in broken.stderr and "merge_parts_kernel" in broken.stderr


@pytest.mark.slow
def test_it_compiles_to_asynchronous_products_and_loads_without_spills():
    nvcc = find_nvcc()
    if nvcc is None or find_cutlass() is None:
        pytest.skip("needs nvcc and CUTLASS's headers")
    found = {kernel.label: kernel.resources for kernel in compile_cuda_kernels(nvcc, 90, "fused_scores_sm90.cu")}
    assert set(found) == {"fused_scores bf16", "fused_scores fp16"}
    for resources in found.values():
        assert resources.spill_bytes == 0 and resources.registers * 3 * 128 <= 65536
        # Both factors are loaded by TMA; registers are given back and taken. Words leave sixteen bytes at a time.
        assert resources.details["UTMALDG"] == 2 and resources.details["USETMAXREG"] == 2
        assert resources.details["HGMMA"] >= 8 and resources.vector_stores > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_merging_compiles_without_spills(target):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    (kernel,) = compile_cuda_kernels(nvcc, target, "merge_parts.cu")
    assert kernel.label == "merge_parts" and kernel.resources.spill_bytes == 0
