"""KTOConfig: TRL's fields and defaults, older names, and values that are refused; bad input to KTOTrainer by name."""

import dataclasses

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig

import trl_fast
from support.training import color_labels, make_trainer
from trl_fast.trainers.base.config import OTHER_DEFAULTS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_every_field_of_trl_is_there_with_its_default(tmp_path):
    theirs = trl.KTOConfig(str(tmp_path), **CPU)
    ours = trl_fast.KTOConfig(str(tmp_path), **CPU)
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in OTHER_DEFAULTS:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "bco"}, "loss_type='bco' is unknown; expected one of kto, apo_zero_unpaired"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random'.*set 'sequential'"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1.*set at least 2"),
        ({"beta": -0.1}, "beta: expected .*got -0.1"),
        ({"desirable_weight": -1.0}, "desirable_weight: .*got -1.0"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle'"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model.*precompute_ref_log_probs"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_values_that_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl_fast.KTOConfig(str(tmp_path), **CPU, **settings)


def test_without_mismatched_completions_rows_may_come_in_any_order(tmp_path):
    settings = {"train_sampling_strategy": "random", "per_device_train_batch_size": 1}
    config = trl_fast.KTOConfig(str(tmp_path), **CPU, loss_type="apo_zero_unpaired", **settings)
    assert not config.loss_config().needs_kl


@pytest.mark.parametrize("name", ["truncation_mode", "max_prompt_length", "ref_model_init_kwargs", "use_liger_loss"])
def test_an_older_name_gives_one_line_and_no_error(name, tmp_path):
    values = {"truncation_mode": "keep_end", "max_prompt_length": 8, "ref_model_init_kwargs": {"dtype": "float32"}}
    with pytest.warns(FutureWarning, match=name) as record:
        trl_fast.KTOConfig(str(tmp_path), **CPU, **{name: values.get(name, True)})
    assert sum("older TRL" in str(warning.message) for warning in record) == 1


def test_trls_own_config_is_accepted(tmp_path, model_path):
    config = trl.KTOConfig(str(tmp_path), **CPU, beta=0.3, undesirable_weight=1.5, max_length=77)
    args = trl_fast.KTOTrainer(model_path, args=config, train_dataset=color_labels(4)).args
    assert isinstance(args, trl_fast.KTOConfig)
    assert (args.beta, args.undesirable_weight, args.max_length) == (0.3, 1.5, 77)


@pytest.fixture
def build(model_path, tmp_path):
    def build(arguments=None, **settings):
        given = {"model": model_path, "train_dataset": color_labels(4), **(arguments or {})}
        return make_trainer(trl_fast, tmp_path, method="KTO", arguments=given, **settings)

    return build


def test_bad_input(build):
    row = {"prompt": "a", "completion": " b"}
    with pytest.raises(ValueError, match="The train dataset has the columns.*but no 'label'"):
        build({"train_dataset": Dataset.from_list([row])})
    with pytest.raises(ValueError, match="The eval dataset, row 0, column 'label': 'bad' is no truth value"):
        build({"eval_dataset": Dataset.from_list([{**row, "label": "bad"}])})
    with pytest.raises(ValueError, match="train_dataset is required"):
        build({"train_dataset": None})
    with pytest.raises(TypeError, match="KTOTrainer has no argument 'train_datset'; did you mean 'train_dataset'"):
        build({"train_datset": 1})
    with pytest.raises(NotImplementedError, match="sync_ref_model=True"):
        build({"peft_config": LoraConfig(target_modules=["q_proj"])}, sync_ref_model=True)
    with pytest.raises(ValueError, match="train_dataset is a stream.*precompute_ref_log_probs=True"):
        build({"train_dataset": color_labels(4).to_iterable_dataset()}, precompute_ref_log_probs=True)
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7], "label": True}] * 2
    rows[1] = {**rows[1], "completion_ids": [9999]}
    with pytest.raises(ValueError, match="(?s)completion_ids.*9999"):
        build({"train_dataset": Dataset.from_list(rows)})


def test_labels_that_are_all_the_same_are_a_warning_and_it_trains(build, caplog):
    rows = [{**row, "label": True} for row in color_labels(8)]
    trainer = build({"train_dataset": Dataset.from_list(rows)}, max_steps=1)
    assert "all 8 labels are True" in caplog.text
    trainer.train()
    log = trainer.state.log_history[0]
    assert "rewards/chosen" in log and "rewards/rejected" not in log and "rewards/margins" not in log
