"""GRPOConfig and RLOOConfig: TRL's fields and defaults, values that are refused or warned of."""

import dataclasses

import pytest
import trl

import trl_fast
import trl_fast.trainers.online.completions_log as completions
from support.rollouts import brevity, color_prompts
from support.training import make_trainer
from trl_fast.trainers.base.config import OTHER_DEFAULTS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
METHODS = ["GRPO", "RLOO"]


def config(method, folder, module=trl_fast, **settings):
    return getattr(module, f"{method}Config")(str(folder), **CPU, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_trl_is_there_with_its_default(method, tmp_path):
    theirs, ours = config(method, tmp_path, trl), config(method, tmp_path)
    older = {"use_transformers_paged"}  # None with us, so that False says something too
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in older | OTHER_DEFAULTS:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


PRESENT = {
    "log_multimodal": False,
    "transformers_continuous_batching_config": {"max_memory_percent": 0.5},
    "max_tool_calling_iterations": 3,
}


@pytest.mark.parametrize("name", PRESENT)
def test_a_present_name_is_no_older_one(name, tmp_path, recwarn):
    assert getattr(config("GRPO", tmp_path, **{name: PRESENT[name]}), name) == PRESENT[name]
    assert not [warning for warning in recwarn if "older TRL" in str(warning.message)]


OLDER = {
    "max_new_tokens": ("max_completion_length", 7),
    "wandb_log_unique_prompts": ("log_unique_prompts", True),
    "vllm_guided_decoding_regex": ("vllm_structured_outputs_regex", "a+"),
    "use_transformers_paged": ("use_transformers_continuous_batching", False),
    "max_prompt_length": ("max_prompt_length", 8),
    "use_liger_loss": ("use_liger_loss", True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OLDER)
def test_an_older_name_gives_one_line_and_no_error(name, method, tmp_path):
    now, value = OLDER[name]
    with pytest.warns(FutureWarning, match=f"{method}Config: `{name}`") as record:
        made = config(method, tmp_path, **{name: value})
    assert sum("older TRL" in str(warning.message) for warning in record) == 1 and getattr(made, now) == value


REFUSED = [
    ({"sync_ref_model": True, "beta": 0.0}, "sync_ref_model=True with beta=0.0"),
]


@pytest.mark.parametrize("method", METHODS)
def test_continuous_batching_is_named_as_without_effect(method, tmp_path, caplog):
    config(method, tmp_path, use_transformers_continuous_batching=True)
    assert "use_transformers_continuous_batching=True has no effect" in caplog.text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_values_that_are_refused(settings, message, method, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(method, tmp_path, **settings)


def test_an_upload_of_completions_that_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match="log_completions_hub_repo='me/table' uploads what log_completions writes"):
        config("GRPO", tmp_path, log_completions_hub_repo="me/table")


def test_trls_own_config_is_accepted(tmp_path):
    theirs = config("GRPO", tmp_path, trl, max_tool_calling_iterations=2, log_multimodal=False, beta=0.3)
    ours = trl_fast.GRPOConfig.from_any(theirs)
    assert (ours.max_tool_calling_iterations, ours.log_multimodal, ours.beta) == (2, False, 0.3)


WARNED = {
    ("luspo", "token"): "LUSPO",
    ("luspo", "sequence"): None,
    ("vespo", "sequence"): "VESPO",
    ("vespo", "token"): None,
    ("grpo", "sequence"): None,
    **{(name, "sequence"): "counts by its length" for name in ("bnpo", "dr_grpo", "dapo", "cispo")},
    ("dapo", "token"): None,
}


@pytest.mark.parametrize(("loss_type", "level"), WARNED)
def test_a_level_that_the_loss_is_not_meant_for_is_a_warning(loss_type, level, tmp_path, caplog):
    config("GRPO", tmp_path, loss_type=loss_type, importance_sampling_level=level)
    wanted = WARNED[loss_type, level]
    lines = [record.message for record in caplog.records]
    assert len(lines) == (wanted is not None)
    assert wanted is None or (wanted in lines[0] and f"loss_type={loss_type!r}" in lines[0])


def test_completions_go_to_the_hub(model_path, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(completions, "CommitScheduler", lambda **given: started.append(given))
    make_trainer(
        trl_fast,
        tmp_path,
        method="GRPO",
        arguments={"model": model_path, "reward_funcs": brevity, "train_dataset": color_prompts()},
        num_generations=4,
        max_completion_length=6,
        log_completions=True,
        log_completions_hub_repo="me/table",
        hub_private_repo=True,
        hub_token="secret",
    )
    expected = {"repo_id": "me/table", "repo_type": "dataset", "private": True, "token": "secret"}
    (given,) = started
    assert expected.items() <= given.items() and given["folder_path"] == tmp_path / "completions"
