"""Tests what a plan runs for each method, and the memory of generation."""

import pytest

from support.families import FAMILIES
from support.models import tiny_config
from trl_fast.planning.fake_models import meta_model
from trl_fast.planning.memory_timeline import (
    FORWARD_STAGE,
    GENERATION_STAGE,
    KINDS,
    KV_CACHE,
    OLD_STAGE,
    OPTIMIZER,
    OPTIMIZER_STAGE,
    PROMPTS_STAGE,
    REFERENCE,
    REFERENCE_STAGE,
    TEACHER_STAGE,
    VALUE_BACKWARD_STAGE,
    VALUES_STAGE,
    WEIGHTS,
)
from trl_fast.planning.peak_estimates import stage_peaks
from trl_fast.planning.planned_methods import PLANNED
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.step_times import planned_wire, step_work
from trl_fast.planning.training_setup import TRL, PlannedTeacher, TrainingSetup
from trl_fast.trainers.methods import METHODS

pytestmark = pytest.mark.plans

LENGTH = 48
KINDS_OF_LAYERS = ("sliding_attention", "full_attention")
CONFIG = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}


def setup_of(method, **changes):
    return TrainingSetup(tiny_config("llama", **CONFIG), method=method, per_device_train_batch_size=4, **changes)


def weights_of(setup, **options):
    return sum(weight.nbytes for weight in meta_model(setup, **options).parameters())


def test_every_method_can_be_planned():
    assert set(PLANNED) == set(METHODS)


@pytest.mark.parametrize(
    "method, changes, before",
    [
        ("sft", {}, []),
        ("reward", {}, []),
        ("kto", {}, [REFERENCE_STAGE]),
        ("bco", {}, [REFERENCE_STAGE]),
        ("orpo", {}, []),
        ("cpo", {}, []),
        ("tpo", {}, []),
        ("grpo", {}, [PROMPTS_STAGE, GENERATION_STAGE]),
        ("grpo", {"beta": 0.1, "lora_r": 4}, [PROMPTS_STAGE, GENERATION_STAGE, REFERENCE_STAGE]),
        ("grpo", {"num_iterations": 2}, [PROMPTS_STAGE, GENERATION_STAGE, OLD_STAGE]),
        ("grpo", {"steps_per_generation": 2, "gradient_accumulation_steps": 2}, [PROMPTS_STAGE, GENERATION_STAGE]),
        ("grpo", {"generates": False, "beta": 0.1}, [REFERENCE_STAGE]),
        ("gmpo", {"beta": 0.1}, [PROMPTS_STAGE, GENERATION_STAGE, REFERENCE_STAGE]),
        ("a2po", {}, [PROMPTS_STAGE, GENERATION_STAGE, REFERENCE_STAGE]),
        ("online_dpo", {}, [PROMPTS_STAGE, GENERATION_STAGE, REFERENCE_STAGE]),
        ("rloo", {}, [PROMPTS_STAGE, GENERATION_STAGE, OLD_STAGE, REFERENCE_STAGE]),
        ("rloo", {"beta": 0.0}, [PROMPTS_STAGE, GENERATION_STAGE, OLD_STAGE]),
        ("distillation", {}, [PROMPTS_STAGE, GENERATION_STAGE, TEACHER_STAGE]),
        ("gkd", {"generates": False, "lora_r": 4}, [TEACHER_STAGE]),
        ("gold", {}, [PROMPTS_STAGE, GENERATION_STAGE, TEACHER_STAGE]),
        ("gold", {"use_uld_loss": True, "generates": False}, [TEACHER_STAGE]),
        ("iw_opd", {}, [PROMPTS_STAGE, GENERATION_STAGE, TEACHER_STAGE]),
        ("iw_opd", {"use_teacher_server": True}, [PROMPTS_STAGE, GENERATION_STAGE]),
        ("server_distillation", {}, [PROMPTS_STAGE, GENERATION_STAGE]),
        ("server_distillation", {"generates": False, "loss_top_k": 7}, []),
        ("sdft", {}, [PROMPTS_STAGE, GENERATION_STAGE, TEACHER_STAGE]),
        ("sdft", {"lora_r": 4, "distillation_mode": "full_logits"}, [PROMPTS_STAGE, GENERATION_STAGE, TEACHER_STAGE]),
        ("sdft", {"teacher_model_kind": "live", "num_iterations": 2, "generates": False}, [OLD_STAGE, TEACHER_STAGE]),
        ("sdpo", {"distillation_mode": "sampled_token"}, [PROMPTS_STAGE, GENERATION_STAGE, TEACHER_STAGE]),
        ("ppo", {}, [PROMPTS_STAGE, GENERATION_STAGE, OLD_STAGE, REFERENCE_STAGE, VALUES_STAGE]),
    ],
    ids=str,
)
def test_passes_before_the_update(method, changes, before):
    lengths = {name: end - start for name, start, end in simulate(setup_of(method, **changes), LENGTH).stages}
    stages = [name for name, length in lengths.items() if length >= 0]
    assert stages[: len(before) + 1] == [*before, FORWARD_STAGE] and stages[-1] == OPTIMIZER_STAGE
    # Each of them runs a whole model.
    assert all(lengths[name] > lengths[FORWARD_STAGE] / 2 for name in before)
    assert (VALUE_BACKWARD_STAGE in stages) == (method == "ppo")


@pytest.mark.parametrize("method, rows", [("grpo", 4 * 3), ("ppo", 4 * 3 * 2)])
def test_keys_and_values_of_all_completions_are_there_at_the_end_of_generation(method, rows):
    setup = setup_of(method, gradient_accumulation_steps=3, num_mini_batches=2, device="cpu")
    timeline = simulate(setup, LENGTH)
    found = timeline.stage_peaks()[GENERATION_STAGE].parts[KV_CACHE]
    text = setup.config.get_text_config()
    layer = 2 * rows * LENGTH * text.num_key_value_heads * text.head_dim * 2
    # While a layer's keys grow by a token, the shorter ones are there too.
    assert text.num_hidden_layers * layer <= timeline.levels[KINDS.index(KV_CACHE)].max() <= 3 * layer
    assert found <= 3 * layer


def kept_by_generation(family, **changes):
    setup = TrainingSetup(tiny_config(family, **FAMILIES[family] | changes), method="grpo", device="cpu")
    return simulate(setup, LENGTH).stage_peaks()[GENERATION_STAGE].parts[KV_CACHE]


@pytest.mark.parametrize("family", ["lfm2", "gemma4_text"])
def test_layers_of_a_cache_without_keys_do_not_grow(family):
    """A state, and layers that read the keys of earlier ones."""
    assert kept_by_generation(family) > 0


def test_a_window_bounds_the_keys_of_generation():
    windowed, full = (kept_by_generation("gemma3_text", layer_types=[kind] * 2) for kind in KINDS_OF_LAYERS)
    assert 0 < 2 * windowed < full


@pytest.mark.slow
def test_generation_grows_with_what_is_sampled_at_a_time():
    sizes = [
        simulate(setup_of("grpo", steps_per_generation=steps), LENGTH).stage_peaks()[GENERATION_STAGE].bytes
        for steps in (1, 2, 4)
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    chunked = [
        simulate(setup_of("ppo", num_mini_batches=4, local_rollout_forward_batch_size=size), LENGTH).stage_peaks()
        for size in (4, 16)
    ]
    assert chunked[0][GENERATION_STAGE].bytes < chunked[1][GENERATION_STAGE].bytes
    assert chunked[0][FORWARD_STAGE].bytes == pytest.approx(chunked[1][FORWARD_STAGE].bytes, rel=0.01)


def test_two_models_of_ppo_train():
    setup = setup_of("ppo", device="cpu")
    policy, value = weights_of(setup), weights_of(setup, classifier=True)
    levels = simulate(setup, LENGTH).levels.max(axis=1)
    assert levels[KINDS.index(WEIGHTS)] == pytest.approx(policy + value, rel=0.01)
    assert levels[KINDS.index(OPTIMIZER)] == pytest.approx(2 * (policy + value), rel=0.01)
    assert levels[KINDS.index(REFERENCE)] == pytest.approx(policy, rel=0.01)


def larger_teacher():
    return PlannedTeacher(tiny_config("llama", hidden_size=64, **{**CONFIG, "num_hidden_layers": 6}), "float32")


def test_a_teacher_has_its_own_shape_and_dtype():
    setup = setup_of("distillation", device="cpu", lora_r=4, teacher=larger_teacher())
    timeline = simulate(setup, LENGTH)
    held = timeline.levels[KINDS.index(REFERENCE)].max()
    assert held == pytest.approx(weights_of(setup.of_teacher), rel=0.001) and held > 4 * weights_of(setup)
    lengths = {name: end - start for name, start, end in timeline.stages}
    assert lengths[TEACHER_STAGE] > 1.5 * lengths[FORWARD_STAGE]
    # Two shallow students of a deep one each have the whole teacher.
    deep = setup.but(config=tiny_config("llama", **{**CONFIG, "num_hidden_layers": 8}))
    peak = stage_peaks(deep, LENGTH)[TEACHER_STAGE]
    assert peak.parts[REFERENCE] == held
    assert peak.bytes == pytest.approx(simulate(deep, LENGTH).stage_peaks()[TEACHER_STAGE].bytes, rel=0.01)


def test_a_teachers_work_and_wire_are_counted():
    setup = setup_of("gkd", generates=False, num_gpus=4)
    taught = setup.but(teacher=larger_teacher())
    assert step_work(taught, LENGTH).narrow_flops > 1.5 * step_work(setup, LENGTH).narrow_flops
    one, two = (planned_wire(each, LENGTH) for each in (setup, taught))
    # Weights of 16 bits are gathered once for the teacher's pass.
    more = sum(weight.numel() for weight in meta_model(taught.of_teacher).parameters())
    own = sum(weight.numel() for weight in meta_model(setup.of_teacher).parameters())
    assert two.all_gather - one.all_gather == pytest.approx(2 * (more - own) * 3 / 4)
    assert two.reduce_scatter == one.reduce_scatter


def test_the_share_that_a_student_samples():
    setup = setup_of("distillation", num_generations=2)
    half, all_by_teacher = setup.but(lmbda=0.5), setup.but(lmbda=0.5, seq_kd=True, teacher=larger_teacher())
    sampling = simulate(setup, LENGTH, counts_work=True).work[GENERATION_STAGE].launches * LENGTH / 2
    assert step_work(setup, LENGTH).launches - step_work(half, LENGTH).launches == pytest.approx(sampling / 2, rel=0.1)
    assert step_work(all_by_teacher, LENGTH).launches > 2 * step_work(setup, LENGTH).launches
    assert setup.group_size == 2 and setup_of("distillation").group_size == 1


def test_groups_have_the_methods_own_size():
    assert (setup_of("grpo").group_size, setup_of("rloo").group_size, setup_of("ppo").group_size) == (8, 2, 1)
    assert setup_of("rloo", num_generations=4).group_size == 4
    assert not setup_of("grpo").needs_reference_model and setup_of("rloo").needs_reference_model


def test_there_is_no_other_system_to_compare_every_step_with():
    with pytest.raises(ValueError, match="system='TRL' has no step of method='kto'"):
        setup_of("kto", system=TRL)
