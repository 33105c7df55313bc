"""BEMACallback that updates the reference, against TRL 1.16.0's: every logged metric, and runs that go on."""

import pytest
import trl.experimental.bema_for_ref_model as trl_bema
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig

import trl_fast
from support.resuming import assert_resumes
from support.training import SETTINGS, assert_same_logs, color_pairs, make_trainer
from trl_fast import BEMACallback

BEMA = {"update_freq": 1, "update_ref_model": True, "ref_model_update_freq": 2, "ref_model_update_after": 1, "lag": 1}


def logs_of(trainer):
    trainer.train()
    return trainer.state.log_history


def test_the_reference_follows_as_trls_does(model_path, tokenizer, tmp_path):
    theirs = trl_bema.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=DPOConfig(str(tmp_path / "trl"), **{**SETTINGS, "max_steps": 5}),
        train_dataset=color_pairs(),
        processing_class=tokenizer,
        callbacks=[trl_bema.BEMACallback(**BEMA)],
    )
    arguments = {"model": model_path, "train_dataset": color_pairs(), "callbacks": [BEMACallback(**BEMA)]}
    ours = make_trainer(trl_fast, tmp_path / "ours", arguments=arguments, max_steps=5)
    logs = logs_of(ours)
    assert_same_logs(logs, logs_of(theirs))
    still = make_trainer(trl_fast, tmp_path / "still", arguments={**arguments, "callbacks": []}, max_steps=5)
    assert logs_of(still)[-2]["rewards/chosen"] != pytest.approx(logs[-2]["rewards/chosen"], rel=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_the_reference_that_it_had(model_path, tmp_path):
    def make(folder, **settings):
        arguments = {"model": model_path, "train_dataset": color_pairs(), "callbacks": [BEMACallback(**BEMA)]}
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **settings}
        return make_trainer(trl_fast, folder, arguments=arguments, **settings)

    assert_resumes(make, tmp_path, steps=(2, 3))


def test_without_a_reference_of_its_own(model_path, tmp_path):
    arguments = {
        "model": model_path,
        "train_dataset": color_pairs(),
        "peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    with pytest.raises(ValueError, match="update_ref_model=True.* needs a reference model of its own"):
        make_trainer(trl_fast, tmp_path, arguments={**arguments, "callbacks": [BEMACallback(**BEMA)]})
    trainer = make_trainer(trl_fast, tmp_path, arguments=arguments)
    with pytest.raises(ValueError, match="update_ref_model=True.* needs a reference model of its own"):
        trainer.add_callback(BEMACallback(**BEMA))
