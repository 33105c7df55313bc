"""SFTTrainer on images: against TRL 1.16.0's on the same model and data, in all layouts, saved and resumed."""

import pytest
import trl

import trl_fast
from support.picture_rows import PICTURE_ROWS, picture_rows
from support.training import assert_same_logs, make_trainer
from support.vision_models import tiny_vision_model
from support.vision_processors import tiny_processor

# A rate at which the model learns something to predict, so that the accuracy is not always zero.
STEPS = {"max_steps": 2, "learning_rate": 2e-2}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FAMILIES = ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "gemma3", "llava"))]


def trainer_of(module, output_dir, family, kind, arguments=None, **settings):
    given = {
        "model": tiny_vision_model(family),
        "processing_class": tiny_processor(family),
        "train_dataset": picture_rows(kind),
        "eval_dataset": picture_rows(kind, 6),
        **{name: value() for name, value in (arguments or {}).items()},
    }
    return make_trainer(module, output_dir, method="SFT", arguments=given, **{**STEPS, **settings})


def logs_of(module, output_dir, *data, **settings):
    trainer = trainer_of(module, output_dir, *data, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(tmp_path, *data, layouts=("packed",), **settings):
    expected = logs_of(trl, tmp_path / "trl", *data, **settings)
    for layout in layouts:
        assert_same_logs(logs_of(trl_fast, tmp_path / layout, *data, **settings, batch_layout=layout), expected)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PICTURE_ROWS)
def test_every_kind_of_data(kind, family, tmp_path):
    logs = compare(tmp_path, family, kind, layouts=("packed", "padded"))
    assert logs[-1]["eval_mean_token_accuracy"] > 0
