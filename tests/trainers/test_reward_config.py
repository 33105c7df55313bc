"""RewardConfig: TRL's fields and defaults, and values that are refused."""

import dataclasses

import pytest
import trl

import trl_fast
from support.training import color_pairs
from trl_fast.trainers.base.config import OTHER_DEFAULTS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_every_field_of_trl_is_there_with_its_default(tmp_path):
    theirs = trl.RewardConfig(str(tmp_path), **CPU)
    ours = trl_fast.RewardConfig(str(tmp_path), **CPU)
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in OTHER_DEFAULTS:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient: .* got -0.1; a negative one would drive"),
        ({"head_grad": "sparse"}, "head_grad='sparse' is for language models"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 is for language models"),
        ({"max_length": 0}, "max_length.*0"),
        ({"batch_layout": "tight"}, "batch_layout.*tight"),
    ],
)
def test_values_that_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl_fast.RewardConfig(str(tmp_path), **CPU, **settings)


def test_trls_own_config_is_accepted(tmp_path, model_path):
    config = trl.RewardConfig(str(tmp_path), **CPU, center_rewards_coefficient=0.3, max_length=77)
    trainer = trl_fast.RewardTrainer(model_path, args=config, train_dataset=color_pairs(4))
    assert isinstance(trainer.args, trl_fast.RewardConfig)
    assert (trainer.args.center_rewards_coefficient, trainer.args.max_length) == (0.3, 77)


def test_no_arguments_at_all(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trl_fast.RewardTrainer(model_path, train_dataset=color_pairs(4))
    assert trainer.args.output_dir.endswith("-Reward") and (tmp_path / trainer.args.output_dir).is_dir()
    assert trainer.data_collator.layout == "shared_prefix"
