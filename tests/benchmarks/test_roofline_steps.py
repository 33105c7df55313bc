"""Steps on fake models: their FLOPs against formulas, what the batch's values decide, and where the host waits."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from benchmarks.roofline.fake_devices import CUDA
from benchmarks.roofline.fake_gpu import fake_gpu
from benchmarks.roofline.operator_counter import Counter
from benchmarks.roofline.steps import Step, count_library, count_step, quiet
from benchmarks.step_workloads import SHAPES as STEP_SHAPES
from benchmarks.step_workloads import Shape
from trl_fast.modeling.fused_layers.rotary_functions import restore_function
from trl_fast.ops.backends import load_extension
from trl_fast.planning.fake_models import shortened
from trl_fast.planning.gpu_facts import GPUS
from trl_fast.planning.model_shapes import SHAPES, model_config
from trl_fast.planning.roofline.known_values import values_of

pytestmark = [
    pytest.mark.plans,
    pytest.mark.skipif(not load_extension().ok, reason="the compiled extension is not there"),
]

H100 = GPUS["h100-80"]
MODEL, LAYERS = "smollm2-135m", 2
HIDDEN, MLP, VOCAB = (SHAPES[MODEL][name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
HEADS, GROUPS = SHAPES[MODEL]["num_attention_heads"], SHAPES[MODEL]["num_key_value_heads"]
# Numbers of a layer's linear maps.
WEIGHTS = HIDDEN * HIDDEN * 2 + 2 * HIDDEN * HIDDEN * GROUPS // HEADS + 3 * HIDDEN * MLP
DPO = Shape(batch=2, prompt=48, completion=15)
# Either trainer ends a completion with one more token.
ANSWER = DPO.completion + 1


def count(step, shape):
    with quiet():
        return count_step(step, H100, shape, layers_of=LAYERS)


@pytest.fixture(scope="module")
def dpo():
    # Llamas of other tests may have left their fused function to all.
    restore_function(modeling_llama.__name__, "apply_rotary_pos_emb")
    return count(Step("dpo", MODEL), DPO)


def test_trls_dpo_step_takes_the_flops_of_its_passes(dpo):
    sequences, length = 2 * DPO.batch, DPO.prompt + ANSWER
    # Policy, what checkpointing computes again, twice that backward, and the reference. A layer's last product is not
    # computed again: nothing in its backward pass needs the result.
    linear = 2 * (WEIGHTS * (1 + 1 + 2 + 1) - HIDDEN * MLP) * sequences * length * LAYERS
    causal = 4 * HIDDEN * sequences * length * length / 2 * LAYERS * (1 + 1 + 2.5 + 1)
    # The completions alone: scored, scored again, two gradients, and the reference.
    head = 2 * sequences * ANSWER * VOCAB * HIDDEN * (4 + 1)
    assert dpo.trl.flops == pytest.approx(linear + causal + head, rel=1e-6)


def test_our_dpo_step_computes_a_prompt_once(dpo):
    tree = DPO.prompt**2 / 2 + 2 * ANSWER**2 / 2 + 2 * ANSWER * DPO.prompt
    forward = dpo.ours.by_operator["aten::_flash_attention_forward"]
    # Two calls a layer, of the policy and of the reference; what checkpointing keeps is not computed again.
    assert forward.calls == 2 * LAYERS * 2
    assert forward.flops == pytest.approx(4 * HIDDEN * DPO.batch * tree * LAYERS * 2)
    assert dpo.ours.flops < dpo.trl.flops


def test_merging_reads_two_outputs_and_writes_one(dpo):
    merged = dpo.ours.by_operator["trl_fast::merge_attention"]
    answers, every = 2 * ANSWER * DPO.batch, (DPO.prompt + 2 * ANSWER) * DPO.batch
    assert merged.calls == 2 * LAYERS
    # Outputs in bfloat16, log-sum-exps in float32, and a token's place.
    assert merged.read == merged.calls * ((2 * HIDDEN + 4 * HEADS) * (every + answers) + 4 * every)
    assert merged.written == merged.calls * (2 * HIDDEN + 4 * HEADS) * every


def test_fused_layers_are_counted_with_what_they_read_and_write(dpo):
    rows = (DPO.prompt + 2 * ANSWER) * DPO.batch
    gate = dpo.ours.by_operator["trl_fast::layer_gated_activation_backward"]
    assert gate.calls == LAYERS and gate.moved == LAYERS * rows * MLP * 2 * 5
    assert dpo.ours.flops == dpo.plain.flops and not any("layer_" in name for name in dpo.plain.by_operator)
    assert dpo.ours.elementwise < dpo.plain.elementwise - LAYERS * rows * MLP * 2 * 5


def test_fused_layers_take_a_third_of_the_elementwise_bytes():
    """Of a step of docs/benchmarks.md, as it stands there."""
    step = Step("dpo", "qwen2.5-0.5b")
    with quiet():
        fused, plain = (
            count_library("trl_fast", step, STEP_SHAPES["dpo"], model_config(step.model), H100, fused_layers=layers)
            for layers in ("auto", False)
        )
    assert plain.elementwise >= 3.24 * fused.elementwise


def test_layers_with_adapters_sum_within_their_products():
    """A layer has one sum of hidden states left, of the residuals' gradients, where there were four."""
    step, shape = Step("sft", MODEL, lora_r=4), Shape(batch=2, prompt=0, completion=32)
    with quiet():
        fused, plain = (
            count_library("trl_fast", step, shape, shortened(model_config(MODEL), LAYERS), H100, fused_layers=layers)
            for layers in ("auto", False)
        )
    one_sum = 3 * 2 * shape.batch * (shape.completion + 1) * HIDDEN
    assert LAYERS * one_sum <= fused.by_operator["aten::add.Tensor"].moved < 1.02 * LAYERS * one_sum
    assert plain.elementwise >= 8.25 * fused.elementwise


def test_waits_are_named_by_the_place_in_the_source(dpo):
    assert any(place.startswith("trl/trainer/dpo_trainer.py:") for place in dpo.trl.waits)
    assert all(not place.startswith(("torch/", "benchmarks/")) for place in (*dpo.trl.waits, *dpo.ours.waits))


def test_capped_scores_are_counted_as_flex_attention():
    length = 512
    shape = Shape(batch=1, prompt=0, completion=length - 1)
    with quiet():
        config = shortened(model_config("gemma-2-2b"), 1)
        ours = count_library("trl_fast", Step("sft", "gemma-2-2b"), shape, config, H100)
    kernels, width = ours.by_operator["flex_attention"], config.num_attention_heads * config.head_dim
    # Forward once more for checkpointing, which keeps its results: once, and backward.
    pairs = length * (length + 1) / 2
    assert kernels.calls == 2 and kernels.flops == (1 + 3.5) * 4 * width * pairs
    assert kernels.written >= 2 * width * length


@pytest.mark.slow
def test_adapters_leave_the_weights_alone():
    case = count(Step("sft", MODEL, lora_r=4), Shape(batch=2, prompt=0, completion=32))
    for counts in (case.ours, case.trl):
        # Of the head alone: no gradient of its weight is ever there.
        assert counts.peak_bytes < 2 * VOCAB * HIDDEN
    assert case.ours.by_operator["aten::_fused_adamw_"].read < 4 * WEIGHTS


@pytest.mark.slow
def test_a_grpo_step_is_counted():
    case = count(Step("grpo", MODEL), Shape(batch=8, prompt=24, completion=8))
    assert case.ours.flops < case.trl.flops
    assert case.trl.by_operator["trl::_backward_kernel"].calls


def test_what_comes_from_the_batch_is_known():
    with fake_gpu(H100, Counter()):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=CUDA) > 0
        hidden = torch.empty(2, 3, 4, device=CUDA)
        assert hidden[mask].shape == (3, 4)
        assert mask.sum().item() == 3 and mask.nonzero().shape == (3, 2)
        assert mask.sum(dim=1).tolist() == [2, 1]
        ends = mask.sum(dim=1).cumsum(0)
        assert values_of(ends).tolist() == [2, 3]
        ends[0] = 5
        assert values_of(ends).tolist() == [5, 3]
        assert values_of((hidden > 0).sum()) is None and values_of(torch.empty(3, dtype=torch.int64)) is None


def test_lists_of_what_is_computed_are_refused():
    with fake_gpu(H100, Counter()), pytest.raises(ValueError, match="its values depend on what the model computes"):
        torch.empty(3, device=CUDA).argsort().tolist()


def test_a_list_is_one_wait():
    counter = Counter()
    with fake_gpu(H100, counter):
        numbers = torch.arange(5, device=CUDA)
        counter.start()
        assert numbers.tolist() == [0, 1, 2, 3, 4]
    assert counter.counts.waits.total() == 1
