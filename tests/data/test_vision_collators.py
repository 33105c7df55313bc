"""The drop-in collators of rows with images, against TRL 1.16.0's on the same rows: every tensor."""

import copy

import pytest
import torch
from trl.trainer import dpo_trainer, kto_trainer, sft_trainer

from support.picture_rows import PICTURE_ROWS
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.vision_collators import (
    DataCollatorForVisionLanguageModeling,
    DataCollatorForVisionPreference,
    DataCollatorForVisionUnpairedPreference,
)

FAMILIES = ("qwen2_5_vl", "gemma3", "llava")


def preference(i):
    return {
        "images": pictures(i % 3, seed=i),
        "prompt": [{"role": "user", "content": f"What color is {i}?"}],
        "chosen": [{"role": "assistant", "content": f"It is blue {i * 7}"}],
        "rejected": [{"role": "assistant", "content": f"green {i}"}],
    }


def unpaired(i):
    row = preference(i)
    return {"images": row["images"], "prompt": row["prompt"], "completion": row["chosen"], "label": bool(i % 2)}


def assert_same(ours, theirs, family, rows, **settings):
    processor = tiny_processor(family)
    got = ours(processor, **settings)(copy.deepcopy(rows))
    expected = theirs(processor, **settings)(copy.deepcopy(rows))
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name].to(value.dtype), value), name
    return got["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PICTURE_ROWS)
def test_language_modeling(kind, family):
    rows = [PICTURE_ROWS[kind](i) for i in range(5)]
    mine, trls = DataCollatorForVisionLanguageModeling, sft_trainer.DataCollatorForVisionLanguageModeling
    settings = {"completion_only_loss": True} if "completion" in rows[0] else {"pad_to_multiple_of": 8}
    width = assert_same(mine, trls, family, rows, **settings)
    assert_same(mine, trls, family, rows, max_length=width - 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_preferences(family):
    rows = [preference(i) for i in range(5)]
    mine, trls = DataCollatorForVisionPreference, dpo_trainer.DataCollatorForVisionPreference
    width = assert_same(mine, trls, family, rows)
    assert_same(mine, trls, family, rows, max_length=width - 3)
    rows = [unpaired(i) for i in range(5)]
    mine, trls = DataCollatorForVisionUnpairedPreference, kto_trainer.DataCollatorForVisionUnpairedPreference
    assert_same(mine, trls, family, rows)
    assert_same(mine, trls, family, rows, calculate_kl=False)


def test_what_does_not_fit_is_named():
    rows = [PICTURE_ROWS["messages"](i) for i in range(5)]
    processor = tiny_processor("llava")
    with pytest.raises(ValueError, match="max_length=10 cuts an image"):
        DataCollatorForVisionLanguageModeling(processor, max_length=10)(rows)
    with pytest.raises(ValueError, match="completion_only_loss=True needs prompts and completions"):
        DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(rows)
    with pytest.raises(ValueError, match="assistant_only_loss=True needs rows of messages"):
        DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([unpaired(1)])
