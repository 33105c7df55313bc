"""Tests that plans for a GPU know fused layers and the head's fused kernel: by hand, and that both can be left out."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama

import trl_fast
from support.models import tiny_config
from trl_fast.modeling.loading import base_model
from trl_fast.ops.backends import Support, load_extension, supports
from trl_fast.ops.device import simulated_device
from trl_fast.ops.head.fused_kernel import fused_tiles
from trl_fast.ops.layers import embedding, rms_norm
from trl_fast.ops.linear_logprob import linear_logprob
from trl_fast.planning import device_facts
from trl_fast.planning.device_facts import DeviceMeter, planned_facts
from trl_fast.planning.fake_models import planned_models
from trl_fast.planning.memory_timeline import KINDS, LAST_LAYER, SAVED
from trl_fast.planning.memory_tracker import CUDA_GRANULARITY, MemoryTracker
from trl_fast.planning.planned_layers import fused_layers_line
from trl_fast.planning.roofline.launches import WRITES, stand_in
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import FULL_LOGITS, TRL, TrainingSetup, setup_from_training

pytestmark = pytest.mark.plans

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE, LAYERS, TOKENS = 64, 160, 3, 256
CONFIG = tiny_config(
    "llama", vocab_size=2048, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS
)
needs_extension = pytest.mark.skipif(not load_extension().ok, reason="the compiled extension is not there")


def setup_of(**changes):
    return TrainingSetup(CONFIG, **{"method": "sft", **changes})


def rounded(*sizes):
    return sum(-(-size // CUDA_GRANULARITY) * CUDA_GRANULARITY for size in sizes)


def tracked(run, *given, meter=None, capability=(9, 0)):
    """The peak of a call on a simulated GPU, in bytes beyond what it is given, and the launches that it makes."""
    launches = []
    meter = meter or DeviceMeter(saw_launch=launches.append)
    tracker = MemoryTracker(CUDA_GRANULARITY)
    with FakeTensorMode(), tracker, simulated_device(planned_facts("gpu", meter, capability=capability)):
        arguments = [make() for make in given]
        tracker.enter("run")
        kept = run(*arguments)
        del kept
    there = rounded(*(tensor.nbytes for tensor in arguments))
    return tracker.timeline().peak().bytes - there, launches


def test_what_layers_keep_by_hand():
    """Of a norm the plain code keeps a float32 copy of its input and what it rounds, 6 bytes a number; the op keeps
    its input, 2. Of a gated MLP the plain code keeps gate, activated gate and up; the op no activated gate. Angles
    are kept by both. Both keep a float32 number a row of a norm.
    """
    setup = setup_of(gradient_checkpointing=False)
    saved = [
        simulate(one, TOKENS).at_start(LAST_LAYER)[KINDS.index(SAVED)]
        for one in (setup.but(fused_layers=False), setup)
    ]
    assert saved[0] - saved[1] == TOKENS * LAYERS * (2 * 4 * HIDDEN + 2 * INTERMEDIATE)


def test_peaks_are_lower_with_fused_layers():
    for changes in ({}, {"lora_r": 4}, {"gradient_checkpointing": False, "dtype": "float32"}):
        fused, plain = (
            simulate(setup_of(fused_layers=layers, **changes), TOKENS).peak() for layers in ("auto", False)
        )
        assert fused.bytes < plain.bytes


@pytest.mark.parametrize("rows, width", [(300, 64), (5000, 64), (5000, 8192)])
def test_a_norms_backward_has_its_workers_sums(rows, width):
    """Each worker's sums of the weight's gradient, float32: as many workers as fill a GPU, but no more than rows."""

    def run(x, weight, grad):
        with torch.enable_grad():
            y = rms_norm(x, weight, 1e-6)
        y.backward(grad)

    made = [
        lambda: torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True),
        lambda: torch.empty(width, dtype=torch.bfloat16, requires_grad=True),
        lambda: torch.empty(rows, width, dtype=torch.bfloat16),
    ]
    workers = min(rows, max(256, 2**20 // width))
    # The result and the gradient by x; a number a row; the workers' sums, and what they add up to in float32 and in
    # the weight's dtype.
    of_rows, of_weight = (2 * rows * width, 2 * rows * width, 4 * rows), (4 * workers * width, 4 * width, 2 * width)
    assert tracked(run, *made)[0] == rounded(*of_rows, *of_weight)


def test_an_embeddings_gradient_has_its_sorted_tokens():
    def run(ids, weight, grad):
        with torch.enable_grad():
            rows = embedding(ids, weight)
        rows.backward(grad)

    made = [
        lambda: torch.empty(1000, dtype=torch.int64),
        lambda: torch.empty(2048, HIDDEN, dtype=torch.bfloat16, requires_grad=True),
        lambda: torch.empty(1000, HIDDEN, dtype=torch.bfloat16),
    ]
    peak, launches = tracked(run, *made)
    # The rows that were looked up, the gradient, sorted tokens and their places.
    assert peak == rounded(2 * 1000 * HIDDEN, 2 * 2048 * HIDDEN, 8 * 1000, 8 * 1000)
    assert [launch.name for launch in launches] == ["embedding_sums"]


def score(hidden, weight, targets):
    with torch.no_grad():
        return linear_logprob(hidden, weight, targets)


@pytest.mark.parametrize("capability, columns", [((9, 0), 256), ((8, 9), 128)])
def test_the_head_is_scored_by_its_fused_kernel(capability, columns):
    """Two numbers a row and tile of columns stand between its kernels, and no logits."""
    rows, vocab = 4096, 32768
    made = [
        lambda: torch.empty(rows, HIDDEN, dtype=torch.bfloat16),
        lambda: torch.empty(vocab, HIDDEN, dtype=torch.bfloat16),
        lambda: torch.empty(rows, dtype=torch.int64),
    ]
    peak, launches = tracked(score, *made, capability=capability)
    assert [launch.name for launch in launches] == ["linear_scores", "merge_tiles"]
    product, merged = launches
    assert product.flops == 2.0 * rows * vocab * HIDDEN
    assert merged.read[0].shape == (2, vocab // columns, rows)
    # With a state of seven float64 numbers a row; two steps would have a tile of float32 logits.
    assert 8 * rows * vocab // columns <= peak <= 8 * rows * vocab // columns + 40 * 8 * rows < 4 * 2048 * vocab


def test_what_a_gpus_kernels_are_is_told_by_the_table_of_backends():
    with simulated_device(planned_facts("gpu", capability=(10, 0))):
        served = {
            (op, backend): supports(op, backend, CPU, dtype).ok
            for op, dtype in (("rms_norm", torch.bfloat16), ("embedding", torch.float32), ("pair_loss", torch.float32))
            for backend in ("cuda", "triton", "cpp")
        }
        assert not supports("rms_norm", "triton", CPU, torch.float64).ok
        assert not supports("gradient_scale", "cuda", CPU, torch.bfloat16).ok
        tiles = [fused_tiles("cuda", size, dtype, CPU, capped=capped) for size, dtype, capped in FUSED]
    assert served["rms_norm", "cuda"] == load_extension().ok and served["rms_norm", "triton"]
    assert served["embedding", "triton"] and not served["embedding", "cuda"]
    assert not any(ok for (op, backend), ok in served.items() if backend == "cpp" or op == "pair_loss")
    assert [found is not None for found in tiles] == [True, False, False, False]


# Hidden size, dtype of products, whether logits are capped; all but the first take two steps on such a GPU.
FUSED = [
    (64, torch.bfloat16, False),
    (60, torch.bfloat16, False),
    (64, torch.float32, False),
    (64, torch.float16, True),
]


@needs_extension
@pytest.mark.parametrize("changes", [{}, {"method": "dpo", "lora_r": 4}], ids=str)
def test_tritons_kernels_take_what_cudas_take(changes, monkeypatch):
    setup = setup_of(**changes)
    compiled = simulate(setup, TOKENS, counts_work=True)
    monkeypatch.setattr(device_facts, "load_extension", lambda: Support(False, "not built"))
    triton = simulate(setup, TOKENS, counts_work=True)
    assert triton.peak().bytes == compiled.peak().bytes
    moved = [sum(work.moved for work in found.work.values()) for found in (triton, compiled)]
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)


def test_every_launcher_has_a_stand_in():
    kinds = ("attention_merge", "divergence_kernels", "embedding_kernels", "gradient_scale", "layer_kernels")
    launchers = set()
    for kind in (*kinds, "linear_scores", "rotary_kernels", "row_kernels"):
        module = importlib.import_module(f"trl_fast.kernels.{kind}")
        own = (value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__)
        launchers |= {value.__name__ for value in own if hasattr(value, "__wrapped__") and callable(value)}
    # The second is called by the first.
    assert launchers - {"linear_scores", "score_slice", "embedding_sums"} == set(WRITES)


def test_a_launch_reads_and_writes_what_its_kernel_does():
    seen = []
    run = stand_in(seen.append)
    rows_of = importlib.import_module("trl_fast.kernels.row_kernels")
    logits, targets, state = torch.empty(4, 6), torch.empty(4, dtype=torch.int64), torch.empty(7, 4)
    run(rows_of.row_scores, logits, targets, None, 1.0, 0.0, 1.0, 0, 0, state)
    run(rows_of.row_grad, logits, targets, None, 1.0, 0.0, 1.0, state[0], state[:4], 0, logits)
    assert [(len(launch.read), len(launch.written)) for launch in seen] == [(3, 1), (4, 1)]
    assert seen[0].read[2] is seen[0].written[0] is state


@pytest.mark.parametrize("system", [TRL, FULL_LOGITS])
def test_other_systems_layers_are_plain(system):
    assert setup_of(system=system).fused_layers is False
    with planned_models(setup_of(system=system), TOKENS) as models:
        assert "none, by fused_layers=False" in fused_layers_line(models.policy, False)


@pytest.mark.parametrize("changes", [{}, {"tiled_mlp": 64, "lora_r": 4}], ids=str)
def test_layers_are_fused_while_a_plan_needs_them(changes, monkeypatch):
    # A model that trained in this process may have left its own.
    plain = inspect.unwrap(modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain)
    with planned_models(setup_of(), TOKENS) as models:
        assert modeling_llama.apply_rotary_pos_emb is not plain
        line = fused_layers_line(models.policy, "auto")
    assert modeling_llama.apply_rotary_pos_emb is plain
    for part in (f"{2 * LAYERS + 1} LlamaRMSNorm", f"{LAYERS} LlamaMLP", f"{LAYERS} LlamaDecoderLayer", "1 Embedding"):
        assert part in line
    with planned_models(setup_of(lora_r=4, lora_target_modules="all-linear"), TOKENS) as models:
        assert f"{7 * LAYERS} LoRA Linear" in fused_layers_line(base_model(models.policy), "auto")
    with planned_models(setup_of(fused_layers=False), TOKENS) as models:
        assert modeling_llama.apply_rotary_pos_emb is plain
        assert fused_layers_line(models.policy, False) == "Fused layers: none, by fused_layers=False."
    simulate(setup_of(**changes), TOKENS)
    assert modeling_llama.apply_rotary_pos_emb is plain


@pytest.mark.parametrize("asked, planned", [({}, "auto"), ({"fused_layers": False}, False)])
def test_the_setting_is_training_s(asked, planned, tmp_path):
    args = trl_fast.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **asked)
    model = SimpleNamespace(
        **{"dtype": None, "use_peft": False, "lora_r": 16, "lora_target_modules": None, "lora_modules_to_save": None},
        **{"lora_exclude_modules": None, "use_dora": False, "load_in_4bit": False, "load_in_8bit": False},
        use_bnb_nested_quant=False,
    )
    assert setup_from_training("sft", args, model, CONFIG).fused_layers == planned
    args.use_liger_kernel = True
    assert setup_from_training("sft", args, model, CONFIG).fused_layers is False
