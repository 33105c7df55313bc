"""Simulated peaks of steps on images against measured ones of the trainers' real steps on this CPU."""

import gc

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

import trl_fast
from benchmarks.memory import measure_peak
from support.step_peaks import peak_of_a_step, simulated_peak
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.images import ImageReader
from trl_fast.modeling.image_classifiers import register_image_classifier
from trl_fast.planning.memory_timeline import KINDS, REFERENCE, WEIGHTS
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TrainingSetup

pytestmark = pytest.mark.plans

SLOW = pytest.mark.slow
LORA = {"lora_r": 4, "lora_target_modules": "all-linear"}
PICTURE = (84, 56)
COMPLETION = 64
TRAINERS = {
    "dpo": (trl_fast.DPOTrainer, trl_fast.DPOConfig),
    "sft": (trl_fast.SFTTrainer, trl_fast.SFTConfig),
    "kto": (trl_fast.KTOTrainer, trl_fast.KTOConfig),
    "reward": (trl_fast.RewardTrainer, trl_fast.RewardConfig),
    "grpo": (trl_fast.GRPOTrainer, trl_fast.GRPOConfig),
    "rloo": (trl_fast.RLOOTrainer, trl_fast.RLOOConfig),
}


def message(role, text):
    return [{"role": role, "content": text * 20}]


QUESTION = message("user", "What color is it? ")
ANSWER, OTHER = message("assistant", "It is blue and red. "), message("assistant", "It is red and blue. ")
PAIR = {"prompt": QUESTION, "chosen": ANSWER, "rejected": OTHER}
COLUMNS = {
    "dpo": [PAIR] * 2,
    "reward": [PAIR] * 2,
    "sft": [{"messages": QUESTION + ANSWER}] * 2,
    "kto": [{"prompt": QUESTION, "completion": ANSWER, "label": label} for label in (True, False)],
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_for(method, family):
    model = tiny_vision_model(family)
    if method != "reward":
        return model
    model.config.num_labels = 1
    register_image_classifier(model.config)
    return AutoModelForSequenceClassification.from_config(model.config)


def trainer_for(setup, model, processor, rows, folder, **settings):
    trainer_class, config_class = TRAINERS[setup.method]
    args = config_class(
        str(folder),
        per_device_train_batch_size=setup.per_device_train_batch_size,
        gradient_checkpointing=setup.gradient_checkpointing,
        batch_layout=setup.batch_layout,
        bf16=False,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
        **settings,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if setup.lora_r else None
    given = {"reward_funcs": by_place} if setup.method in ("grpo", "rloo") else {}
    data = Dataset.from_list(rows)
    return trainer_class(model, args=args, train_dataset=data, processing_class=processor, peft_config=lora, **given)


def by_place(completion_ids, **_):
    """Rewards that differ within every group."""
    return [float(number) for number in range(len(completion_ids))]


def lengths_of(row):
    """Tokens of a tokenized row, and of the prompt in it."""
    if "input_ids" in row:
        return len(row["input_ids"]), 0
    if "prompt_ids" in row:
        prompt = len(row["prompt_ids"])
        return prompt + len(row["chosen_ids" if "chosen_ids" in row else "completion_ids"]), prompt
    pair = zip(row["chosen_ids"], row["rejected_ids"], strict=True)
    return len(row["chosen_ids"]), next(place for place, (one, other) in enumerate(pair) if one != other)


@pytest.mark.parametrize(
    "method, family, changes",
    [
        ("dpo", "llava", {}),
        ("reward", "qwen2_5_vl", {}),
        ("kto", "qwen2_5_vl", {}),
        # Tokens of images see each other there, so padded rows have masks.
        ("sft", "gemma3", {"batch_layout": "padded"}),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [
                ("dpo", "qwen2_5_vl", {}),
                ("dpo", "qwen2_5_vl", {**LORA, "batch_layout": "padded"}),
                ("dpo", "qwen3_vl", {"batch_layout": "padded"}),
                ("dpo", "gemma3", {"gradient_checkpointing": False}),
                ("dpo", "gemma3", {"batch_layout": "padded"}),
                ("reward", "gemma3", {"batch_layout": "padded"}),
                ("reward", "qwen3_vl", {"gradient_checkpointing": False}),
                ("kto", "gemma3", {}),
                ("kto", "qwen2_5_vl", {"gradient_checkpointing": False}),
                ("sft", "qwen2_5_vl", {}),
                ("sft", "llava", {"batch_layout": "packed"}),
            ]
        ),
    ],
    ids=str,
)
def test_simulated_peaks_are_those_of_real_steps(method, family, changes, tmp_path):
    model, processor = model_for(method, family), tiny_processor(family)
    (picture,) = pictures(1, PICTURE)
    image = ImageReader(processor).image_input(picture)
    setup = setup_of(method, model, image, 2, **changes)
    rows = [{"images": [picture], **row} for row in COLUMNS[method]]
    trainer = trainer_for(setup, model, processor, rows, tmp_path, max_length=None)
    length, prompt = lengths_of(trainer.train_dataset[0])
    measured = peak_of_a_step(trainer, next(iter(trainer.get_train_dataloader())), setup)
    assert image.num_tokens > 3 and (prompt > 2 * image.num_tokens or method == "sft")
    assert simulated_peak(setup.but(prompt_share=prompt / length), length) == pytest.approx(measured, rel=0.01)


def setup_of(method, model, image, count, **changes):
    how = {"device": "cpu", "dtype": "float32", "bf16": False, "per_device_train_batch_size": count}
    return TrainingSetup(model.config, method=method, images=(image,), **how, **changes)


@pytest.mark.parametrize(
    "method, family, changes",
    [
        ("grpo", "qwen2_5_vl", {}),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [
                ("grpo", "qwen2_5_vl", {"batch_layout": "padded", "beta": 0.1}),
                ("grpo", "gemma3", {"batch_layout": "padded"}),
                ("grpo", "llava", {"gradient_checkpointing": False}),
                ("rloo", "qwen3_vl", {}),
            ]
        ),
    ],
    ids=str,
)
def test_simulated_peaks_of_sampled_completions_are_those_of_real_training(method, family, changes, tmp_path):
    """Two steps with generation, rewards and scores; all completions are as long as they may be."""
    model, processor = model_for(method, family), tiny_processor(family)
    shown = pictures(8, PICTURE)
    image = ImageReader(processor).image_input(shown[0])
    setup = setup_of(method, model, image, 4, num_generations=4, head_workspace_bytes=1 << 20, **changes)
    trainer = trainer_for(
        *(setup, model, processor, [{"images": [each], "prompt": QUESTION} for each in shown], tmp_path),
        num_generations=4,
        beta=setup.beta,
        max_completion_length=COMPLETION,
        generation_kwargs={"min_new_tokens": COMPLETION},
        head_workspace_bytes=setup.head_workspace_bytes,
        max_steps=2,
        save_strategy="no",
    )
    parts = [{"type": "image", "image": shown[0]}, {"type": "text", "text": QUESTION[0]["content"]}]
    prompt = len(ImageReader(processor).prompt_ids([{"role": "user", "content": parts}]))
    gc.collect()
    measured = measure_peak(trainer.train).bytes_beside_products
    length = prompt + COMPLETION
    timeline = simulate(setup.but(prompt_share=prompt / length), length)
    models = sum(timeline.levels[KINDS.index(kind)].max() for kind in (WEIGHTS, REFERENCE))
    assert timeline.peak().bytes - models == pytest.approx(measured, rel=0.02)
