"""DPOConfig: TRL's fields and defaults, older names, and values that are refused."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import trl
from transformers import TrainingArguments

import trl_fast
from support.training import color_pairs, make_trainer
from trl_fast.losses.dpo import PAIR_LOSSES
from trl_fast.settings.field_docs import read_fields
from trl_fast.trainers.base.config import OTHER_DEFAULTS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_other_words_for_a_default_are_no_change():
    config = trl_fast.DPOConfig(
        "out", use_cpu=True, include_num_input_tokens_seen=False, debug=None, bf16=False, beta=0.1
    )
    assert config.changed_settings() == {"output_dir": "out", "use_cpu": True, "bf16": False}


def test_every_field_of_trl_is_there_with_its_default(tmp_path):
    theirs = trl.DPOConfig(str(tmp_path), **CPU)
    ours = trl_fast.DPOConfig(str(tmp_path), **CPU)
    # "auto" there means a multiple that tensor cores like; here no padding at all.
    different = OTHER_DEFAULTS | {"pad_to_multiple_of"}
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in different:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_the_text_of_loss_type_lists_every_loss():
    _, _, names = read_fields("trl_fast.trainers.dpo_config:DPOConfig")["loss_type"].text.partition("\n\n")
    assert " ".join(names.removesuffix(".").split()).split(", ") == list(PAIR_LOSSES)


def test_bf16_is_on_where_the_machine_has_it_and_off_with_one_line_elsewhere(tmp_path, monkeypatch, caplog):
    module = "trl_fast.trainers.base.config.machine_has_bf16"
    monkeypatch.setattr(module, lambda: True)
    assert trl_fast.DPOConfig(str(tmp_path), use_cpu=True).bf16 is True
    assert trl_fast.DPOConfig(str(tmp_path), use_cpu=True, bf16=False).bf16 is False
    assert not caplog.records
    monkeypatch.setattr(module, lambda: False)
    assert trl_fast.DPOConfig(str(tmp_path), use_cpu=True).bf16 is False
    assert [r.message for r in caplog.records] == [
        "This machine has no bfloat16 hardware: training in float32 (bf16=False)."
    ]


def test_a_cpu_with_bf16_trains_without_being_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_fast.trainers.base.config.machine_has_bf16", lambda: True)
    monkeypatch.setattr("trl_fast.trainers.base.config.is_torch_bf16_gpu_available", lambda: False)
    args = trl_fast.DPOConfig(str(tmp_path))
    assert args.bf16 is True and args.use_cpu is True and args.device.type == "cpu"


OLDER = {
    "label_pad_token_id": -100,
    "padding_value": 0,
    "use_logits_to_keep": True,
    "base_model_attribute_name": "model",
    "use_liger_loss": True,
    "force_use_ref_model": True,
    "generate_during_eval": False,
    "max_prompt_length": 8,
    "max_completion_length": 8,
    "max_target_length": 8,
    "reference_free": True,
    "ref_model_init_kwargs": {"dtype": "float32"},
    "model_adapter_name": "default",
    "ref_adapter_name": "default",
    "rpo_alpha": 0.5,
    "truncation_mode": "keep_end",
}


@pytest.mark.parametrize("name", OLDER)
def test_an_older_name_gives_one_line_and_no_error(name, tmp_path):
    with pytest.warns(FutureWarning, match=name) as record:
        trl_fast.DPOConfig(str(tmp_path), **CPU, **{name: OLDER[name]})
    assert sum("older TRL" in str(warning.message) for warning in record) == 1


@pytest.mark.parametrize(
    "older, now, value",
    [
        ("evaluation_strategy", "eval_strategy", "steps"),
        ("no_cuda", "use_cpu", True),
        ("warmup_ratio", "warmup_steps", 0.1),
    ],
)
def test_a_renamed_field_moves_unless_the_present_one_is_set(older, now, value, tmp_path):
    arguments = {"output_dir": str(tmp_path), "bf16": False, "report_to": "none"}
    with pytest.warns(FutureWarning, match=f"`{now}`"):
        config = trl_fast.DPOConfig(**arguments, **{older: value})
    assert getattr(config, now) == value and getattr(config, older) is None
    with pytest.warns(FutureWarning):
        both = trl_fast.DPOConfig(**arguments, **{older: 0, now: value})
    assert getattr(both, now) == value


def test_the_warning_points_at_the_line_that_uses_the_name(tmp_path):
    with pytest.warns(FutureWarning) as record:
        trl_fast.DPOConfig(str(tmp_path), **CPU, rpo_alpha=0.5)
    assert [warning.filename for warning in record if "rpo_alpha" in str(warning.message)] == [__file__]


@pytest.mark.parametrize(
    "name, message",
    [
        ("lerning_rate", "DPOConfig has no field 'lerning_rate'; did you mean 'learning_rate'?"),
        ("max_lenght", "DPOConfig has no field 'max_lenght'; did you mean 'max_length'?"),
        ("group_by_length", "DPOConfig has no field 'group_by_length'; set train_sampling_strategy='group_by_length'"),
        ("zzz", "DPOConfig has no field 'zzz'"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_known_one(name, message, tmp_path):
    with pytest.raises(TypeError) as error:
        trl_fast.DPOConfig(str(tmp_path), **{name: 1})
    assert str(error.value) == message


def test_a_subclass_may_add_fields_and_a_config_can_be_copied_and_pickled(tmp_path):
    @dataclasses.dataclass
    class WithMore(trl_fast.DPOConfig):
        more: int = 0

    assert WithMore(str(tmp_path), **CPU, more=3).more == 3
    config = trl_fast.DPOConfig(str(tmp_path), **CPU, beta=0.3)
    assert copy.deepcopy(config).beta == pickle.loads(pickle.dumps(config)).beta == 0.3


def test_rpo_alpha_became_a_loss(tmp_path):
    with pytest.warns(FutureWarning):
        config = trl_fast.DPOConfig(str(tmp_path), **CPU, loss_type="ipo", rpo_alpha=0.5)
    assert config.loss_type == ["ipo", "sft"] and config.loss_weights == [1.0, 0.5]


def test_padding_free_is_the_packed_layout(tmp_path):
    assert trl_fast.DPOConfig(str(tmp_path), **CPU, padding_free=True).batch_layout == "packed"
    with pytest.raises(ValueError, match="padding_free=True contradicts batch_layout='padded'"):
        trl_fast.DPOConfig(str(tmp_path), **CPU, padding_free=True, batch_layout="padded")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss_type": ["sigmoyd"]}, "loss_type.*sigmoyd"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"label_smoothing": 1.7}, "label_smoothing.*1.7"),
        ({"ld_alpha": 1.5}, "ld_alpha.*1.5"),
        ({"beta": -0.1}, "beta.*-0.1"),
        ({"f_divergence_type": "backward_kl"}, "f_divergence_type.*backward_kl"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode.*keep_middle"),
        ({"batch_layout": "tight"}, "batch_layout.*tight"),
        ({"max_length": 0}, "max_length.*0"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model.*precompute_ref_log_probs"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"tools": ["search"]}, "tools.*column"),
    ],
)
def test_values_that_are_refused(settings, message, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with pytest.raises(ValueError, match=message):
            trl_fast.DPOConfig(str(tmp_path), **CPU, **settings)


@pytest.mark.parametrize(
    "value, tokens", [(None, None), (False, None), ("none", None), (True, 4096), ("true", 4096), (7, 7), ("7", 7)]
)
def test_tiled_mlp(value, tokens, tmp_path):
    assert trl_fast.DPOConfig(str(tmp_path), **CPU, tiled_mlp=value).tiled_mlp == tokens


@pytest.mark.parametrize("value", [0, -3, "many", 2.5])
def test_tiles_of_no_size(value, tmp_path):
    with pytest.raises(ValueError, match=f"tiled_mlp: expected an integer >= 1 or None, got '?{value}"):
        trl_fast.DPOConfig(str(tmp_path), **CPU, tiled_mlp=value)


@pytest.mark.parametrize("value", ["auto", True, False])
def test_fused_layers(value, tmp_path):
    for given in (value, str(value), str(value).lower()):
        assert trl_fast.DPOConfig(str(tmp_path), **CPU, fused_layers=given).fused_layers is value


@pytest.mark.parametrize("value", ["maybe", None, 2])
def test_fused_layers_of_another_kind(value, tmp_path):
    with pytest.raises(ValueError, match=f"fused_layers='?{value}'? is unknown; expected one of auto, True, False"):
        trl_fast.DPOConfig(str(tmp_path), **CPU, fused_layers=value)


def test_trls_own_config_is_accepted(tmp_path, model_path):
    config = trl.DPOConfig(str(tmp_path), **CPU, beta=0.3, loss_type=["ipo"], max_length=77)
    trainer = trl_fast.DPOTrainer(model_path, args=config, train_dataset=color_pairs(4))
    assert isinstance(trainer.args, trl_fast.DPOConfig)
    assert (trainer.args.beta, trainer.args.loss_type, trainer.args.max_length) == (0.3, ["ipo"], 77)
    with pytest.raises(TypeError, match="expected a DPOConfig, got dict"):
        trl_fast.DPOTrainer(model_path, args={"beta": 0.3}, train_dataset=color_pairs(4))
    other = trl.SFTConfig(str(tmp_path), **CPU, packing=True, max_length=77)
    with pytest.raises(ValueError, match="DPOConfig does not have what this SFTConfig sets: packing=True"):
        trl_fast.DPOTrainer(model_path, args=other, train_dataset=color_pairs(4))
    plain = TrainingArguments(str(tmp_path), **CPU)
    assert trl_fast.DPOTrainer(model_path, args=plain, train_dataset=color_pairs(4)).args.beta == 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator_config": {"split_batches": True}, "report_to": "all", "hub_token": "secret"},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 0.1},
        {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_steps": 3},
        {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "bfloat16"}, "pad_to_multiple_of": 8},
        {"loss_type": ["sft", "ipo"], "loss_weights": [0.5, 1], "truncation_mode": "keep_end"},
    ],
)
def test_every_value_of_trls_config_is_taken_over(settings, tmp_path):
    theirs = trl.DPOConfig(str(tmp_path), **CPU | settings)
    ours = trl_fast.DPOConfig.from_any(theirs)
    expected = theirs.to_dict() | {"pad_to_multiple_of": settings.get("pad_to_multiple_of")}
    # Beside the hub's token, TRL's takes a tokenizer's for a secret.
    expected |= {"logging_nan_inf_filter": False, "pad_token": theirs.pad_token}
    assert {name: ours.to_dict()[name] for name in expected} == expected and ours.hub_token == theirs.hub_token


def test_older_ways_of_writing_a_script(model_path, tokenizer, tmp_path):
    with pytest.warns(FutureWarning, match="`tokenizer`"):
        trainer = make_trainer(
            trl_fast,
            tmp_path,
            arguments={
                "model": model_path,
                "ref_model": model_path,
                "tokenizer": tokenizer,
                "train_dataset": color_pairs(8),
            },
            max_prompt_length=4,
            max_completion_length=5,
            max_steps=1,
        )
    assert trainer.processing_class is tokenizer
    assert max(len(row["prompt_ids"]) for row in trainer.train_dataset) == 4
    assert max(len(row["chosen_ids"]) for row in trainer.train_dataset) == 5
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_settings_may_stand_in_the_trainers_arguments(model_path, tokenizer, tmp_path):
    config = trl_fast.DPOConfig(str(tmp_path), **CPU, beta=0.3)
    older = {"beta": 0.2, "loss_type": "ipo", "max_target_length": 5, "max_prompt_length": 4}
    with pytest.warns(FutureWarning) as record:
        trainer = trl_fast.DPOTrainer(
            model_path, args=config, train_dataset=color_pairs(8), tokenizer=tokenizer, **older
        )
    assert (trainer.args.beta, trainer.args.loss_type, config.beta) == (0.2, ["ipo"], 0.3)
    assert max(len(row["chosen_ids"]) for row in trainer.train_dataset) == 5
    lines = [str(warning.message) for warning in record if "older TRL" in str(warning.message)]
    lines = [line for line in lines if "tokenizer" not in line]
    assert len(lines) == 4 and "DPOTrainer: `beta`" in lines[0] and "DPOConfig(beta=...)" in lines[0]
    with pytest.raises(TypeError, match="DPOTrainer has no argument 'train_datset'; did you mean 'train_dataset'?"):
        trl_fast.DPOTrainer(model_path, args=config, train_datset=color_pairs(4))


def test_reference_free_compares_with_nothing(model_path, tmp_path):
    with pytest.warns(FutureWarning, match="reference_free"):
        trainer = make_trainer(
            trl_fast,
            tmp_path,
            arguments={"model": model_path, "train_dataset": color_pairs(8)},
            reference_free=True,
            max_steps=1,
        )
    assert trainer.ref_model is None
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/chosen"] == pytest.approx(0.1 * log["logps/chosen"], rel=1e-5)


def test_no_arguments_at_all(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trl_fast.DPOTrainer(model_path, train_dataset=color_pairs(4))
    assert trainer.args.output_dir.endswith("-DPO") and (tmp_path / trainer.args.output_dir).is_dir()
