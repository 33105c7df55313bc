"""A checkpoint names its run: another method, model or data are errors, other settings a line."""

import json

import pytest
from peft import LoraConfig

import trl_fast
from support.supervised import sft_rows
from support.training import color_pairs, make_trainer
from trl_fast.trainers.checkpoints.files import RECORD_FILE

SETTINGS = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def make(folder, model, method="SFT", *, arguments=None, **settings):
    rows = sft_rows("text", 16) if method == "SFT" else color_pairs(16)
    given = {"model": model, "train_dataset": rows, **(arguments or {})}
    return make_trainer(trl_fast, folder, method=method, arguments=given, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def saved(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make(folder, model_path).train()
    return folder


def lora(**changes):
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    return {"peft_config": LoraConfig(**options)}


CONFLICTS = {
    "method": ({"method": "DPO"}, "it is one of 'sft', this run is 'dpo'"),
    "data": (
        {"arguments": {"train_dataset": sft_rows("text", 12)}},
        r"its data were others \(16 rows, this run's 12 rows\), so its place in them means nothing here; "
        "ignore_data_skip=True goes on",
    ),
    "same number of rows": (
        {"arguments": {"train_dataset": sft_rows("text", 17).select(range(1, 17))}},
        r"its data were others \(16 rows, this run's 16 rows\)",
    ),
    "optimizer": ({"optim": "sgd"}, r"its optimizer is 'adamw_torch\w*', and this run's, 'sgd', cannot"),
    "adapter": ({"arguments": lora()}, r"its adapters are none, this run's default \{"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_another_run_is_refused(case, saved, model_path, tmp_path):
    options, said = CONFLICTS[case]
    trainer = make(tmp_path, model_path, **options)
    with pytest.raises(ValueError, match=f"checkpoint-2' is no checkpoint of this run: {said}"):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert trainer.state.global_step == 0


def test_another_model_and_another_adapter_are_refused(saved, reward_model_path, model_path, tmp_path):
    record = saved / "checkpoint-1" / RECORD_FILE
    found = json.loads(record.read_text())
    for name, value, said in (
        ("class", "GemmaForCausalLM", "its model is a GemmaForCausalLM, this run's a LlamaForCausalLM"),
        ("tensors", "0", "its LlamaForCausalLM has other weights"),
    ):
        record.write_text(json.dumps({**found, "model": {**found["model"], name: value}}))
        with pytest.raises(ValueError, match=said):
            make(tmp_path, model_path).train(resume_from_checkpoint=str(saved / "checkpoint-1"))
    record.write_text(json.dumps(found))
    make(tmp_path / "lora", model_path, arguments=lora(), max_steps=1).train()
    with pytest.raises(ValueError, match=r"its adapters are default .*\"lora_alpha\": 8.* this run's .* 16"):
        make(tmp_path / "lora", model_path, arguments=lora(lora_alpha=16)).train(resume_from_checkpoint=True)


def test_other_settings_are_one_line(saved, model_path, tmp_path, caplog):
    trainer = make(tmp_path, model_path, max_steps=3, learning_rate=1e-4, seed=7, logging_steps=3, save_steps=3)
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    [line] = [record.getMessage() for record in caplog.records if "was written with" in record.getMessage()]
    assert line == (
        f"resume_from_checkpoint: {saved}/checkpoint-2 was written with max_steps=2 (now 3), "
        "learning_rate=0.001 (now 0.0001, which does not count: the optimizer's state holds the first), "
        "seed=42 (now 7): the run is not the unbroken one."
    )
    assert trainer.state.global_step == 3
    # As in transformers: what the line says is what the optimizer does.
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 1e-3


def test_the_same_run_has_no_line(saved, model_path, tmp_path, caplog):
    make(tmp_path, model_path).train(resume_from_checkpoint=str(saved / "checkpoint-1"))
    assert "resume_from_checkpoint" not in caplog.text


def test_other_data_from_their_beginning(saved, model_path, tmp_path):
    trainer = make(
        tmp_path,
        model_path,
        arguments={"train_dataset": sft_rows("text", 12)},
        ignore_data_skip=True,
        max_steps=3,
    )
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_a_foreign_checkpoint_is_taken_with_a_line(model_path, tmp_path, caplog):
    make(tmp_path, model_path, max_steps=1).train()
    (tmp_path / "checkpoint-1" / RECORD_FILE).unlink()
    trainer = make(tmp_path, model_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert f"{tmp_path}/checkpoint-1 does not say what run it is of: trl_fast has not written it." in caplog.text


def test_weights_only(model_path, tmp_path, caplog):
    make(tmp_path, model_path, max_steps=1, save_only_model=True).train()
    trainer = make(tmp_path, model_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert "was written with save_only_model=True: the optimizer, the schedule and the random" in caplog.text
