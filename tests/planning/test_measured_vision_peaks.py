"""Simulated peaks of steps on images against measured ones of the trainers' real steps on this CPU."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import trl_fast
from support.step_peaks import peak_of_a_step, simulated_peak
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.images import ImageReader
from trl_fast.planning.training_setup import TrainingSetup

pytestmark = pytest.mark.plans

SLOW = pytest.mark.slow
LORA = {"lora_r": 4, "lora_target_modules": "all-linear"}
PICTURE = (84, 56)
ROW = {
    "images": pictures(1, PICTURE),
    "prompt": [{"role": "user", "content": "What color is it? " * 20}],
    "chosen": [{"role": "assistant", "content": "It is blue and red. " * 20}],
    "rejected": [{"role": "assistant", "content": "It is red and blue. " * 20}],
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llava", {}),
        pytest.param("qwen2_5_vl", {}, marks=SLOW),
        pytest.param("qwen2_5_vl", {**LORA, "batch_layout": "padded"}, marks=SLOW),
        pytest.param("gemma3", {"gradient_checkpointing": False}, marks=SLOW),
    ],
    ids=str,
)
def test_simulated_peaks_are_those_of_real_steps(family, changes, tmp_path):
    model, processor = tiny_vision_model(family), tiny_processor(family)
    image = ImageReader(processor).image_input(ROW["images"][0])
    setup = TrainingSetup(
        model.config,
        device="cpu",
        dtype="float32",
        bf16=False,
        images=(image,),
        per_device_train_batch_size=2,
        **changes,
    )
    trainer = trl_fast.DPOTrainer(
        model,
        args=trl_fast.DPOConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_length=None,
            gradient_checkpointing=setup.gradient_checkpointing,
            batch_layout=setup.batch_layout,
            bf16=False,
            use_cpu=True,
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([ROW] * 2),
        processing_class=processor,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if setup.lora_r else None,
    )
    row = trainer.train_dataset[0]
    prompt, length = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["chosen_ids"])
    measured = peak_of_a_step(trainer, next(iter(trainer.get_train_dataloader())), setup)
    assert image.num_tokens > 3 and prompt > 2 * image.num_tokens
    assert simulated_peak(setup.but(prompt_share=prompt / length), length) == pytest.approx(measured, rel=0.05)
