"""Images of a planned step: how often they are on the device, how often a tower reads them, where they stand."""

import pytest

from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.images import ImageReader
from trl_fast.planning.example_batches import policy_micro_batch
from trl_fast.planning.fake_models import planned_models
from trl_fast.planning.memory_timeline import (
    FORWARD_STAGE,
    GENERATION_STAGE,
    IMAGES,
    KINDS,
    KV_CACHE,
    LAST_LAYER,
    PROMPTS_STAGE,
    REFERENCE_STAGE,
)
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import OURS, TRL, TrainingSetup

pytestmark = pytest.mark.plans


def setup_on_images(method, family="llava", **changes):
    image = ImageReader(tiny_processor(family)).image_input(pictures(1, (84, 56))[0])
    values = {"per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 2, "beta": 0.1}
    return TrainingSetup(tiny_vision_model(family).config, method=method, images=(image,), **{**values, **changes})


def pixels_by_stage(setup):
    """How many images there are on the device, by stage."""
    # A CPU's memory is not rounded.
    peaks = simulate(setup.but(device="cpu", activation_budget_bytes=0), 64).stage_peaks()
    size = setup.images[0].tensors["pixel_values"].nbytes
    return {stage: peak.parts[IMAGES] / size for stage, peak in peaks.items()}


def test_images_are_there_once_a_prompt_and_with_trl_once_a_completion():
    """16 completions of four prompts are sampled at a time; half of them are a micro-batch."""
    found = pixels_by_stage(setup_on_images("grpo"))
    assert found[PROMPTS_STAGE] == 4
    assert found[REFERENCE_STAGE] == found[FORWARD_STAGE] == found[LAST_LAYER] == 2
    completions = simulate(setup_on_images("grpo"), 64).at_start(GENERATION_STAGE)
    assert completions[KINDS.index(IMAGES)] == 0 < completions[KINDS.index(KV_CACHE)]
    trl = pixels_by_stage(setup_on_images("grpo", system=TRL))
    # A copy in generation, and from then on one of all that was sampled.
    assert trl[PROMPTS_STAGE] == trl[REFERENCE_STAGE] == trl[FORWARD_STAGE] == trl[LAST_LAYER] == 16
    packed = pixels_by_stage(setup_on_images("grpo", batch_layout="packed"))
    assert (packed[PROMPTS_STAGE], packed[FORWARD_STAGE]) == (4, 8)


def test_both_completions_of_a_sampled_pair_share_the_images_of_their_prompt():
    found = pixels_by_stage(setup_on_images("online_dpo"))
    assert found[PROMPTS_STAGE] == found[REFERENCE_STAGE] == found[LAST_LAYER] == 8


@pytest.mark.parametrize("method, images", [("sft", 1), ("dpo", 1), ("reward", 1), ("kto", 3), ("cpo", 1)])
def test_images_of_all_micro_batches_of_a_step_are_there(method, images):
    """KTO's pass over mismatched completions reads them as well."""
    found = pixels_by_stage(setup_on_images(method, per_device_train_batch_size=1))
    assert found[FORWARD_STAGE] == found[LAST_LAYER] == 2 * images


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_tower_works_once_a_prompt_in_generation_too(family):
    one, trl = (
        simulate(setup_on_images("grpo", family, system=system), 64, counts_work=True).image_work[PROMPTS_STAGE]
        for system in (OURS, TRL)
    )
    assert trl.narrow_flops == pytest.approx(4 * one.narrow_flops, rel=0.01) and one.narrow_flops > 0


def test_prompts_whose_tokens_see_each_other_are_read_for_each_completion():
    assert pixels_by_stage(setup_on_images("grpo", "paligemma"))[PROMPTS_STAGE] == 16


def test_no_text_of_a_plan_is_an_image():
    """More prompts than ids below that of images, which comes early here."""
    setup = setup_on_images("grpo", per_device_train_batch_size=32, num_generations=2)
    setup.config.image_token_id = 9
    with planned_models(setup, 64) as models:
        inputs = policy_micro_batch(setup, 64, models.layout)
    prompts = inputs.generation.prompt_ids
    assert len({*map(tuple, prompts.tolist())}) == 32
    assert ((prompts == 9).sum(dim=1) == setup.image_tokens).all()


def test_trl_has_no_reward_step_on_images():
    with pytest.raises(ValueError, match="its reward trainer reads no images"):
        simulate(setup_on_images("reward", system=TRL), 64)


def test_places_of_images_are_known_when_they_come_back_from_the_host():
    """Qwen3-VL adds features of images to hidden states in its first layers, by a mask that backward saves."""
    # Fused layers save so little that of two layers, which are neighbours, as much is on the device either way.
    setup = setup_on_images("dpo", "qwen3_vl", per_device_train_batch_size=1, fused_layers=False)
    offloaded = simulate(setup.but(activation_offloading=True), 64)
    assert offloaded.host_bytes > 0
    assert offloaded.stage_peaks()[LAST_LAYER].bytes < simulate(setup, 64).stage_peaks()[LAST_LAYER].bytes
