"""Saving, resuming and evaluating: what an interrupted or repeated run gives."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl_fast
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.model_changes import changes_of
from trl_fast.trainers.checkpoints.folders import newest_checkpoint

LORA = {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", "init_lora_weights": False}


def trainer_in(folder, model_path, *, peft=False, arguments=None, **settings):
    given = {"model": model_path, "train_dataset": color_pairs(), **(arguments or {})}
    if peft:
        given["peft_config"] = LoraConfig(**LORA)
    return make_trainer(trl_fast, folder, arguments=given, **{"max_steps": 4, "save_steps": 2, **settings})


def losses(trainer):
    # A trainer state that was read from a file has its names sorted.
    return [dict(sorted(log.items())) for log in trainer.state.log_history if "loss" in log]


def test_an_interrupted_run_of_an_adapter_goes_on_as_if_it_had_not_been(model_path, tmp_path):
    """tests/trainers/test_resume.py has the whole model."""

    class PullThePlug(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    whole = trainer_in(tmp_path / "whole", model_path, peft=True, save_strategy="no")
    whole.train()

    broken = trainer_in(
        tmp_path / "run", model_path, peft=True, save_strategy="steps", arguments={"callbacks": [PullThePlug()]}
    )
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    # A checkpoint whose writing was cut off has no trainer state yet.
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "run/checkpoint-3")
    (tmp_path / "run/checkpoint-3/trainer_state.json").unlink()
    assert newest_checkpoint(str(tmp_path / "run")).endswith("checkpoint-2")

    resumed = trainer_in(tmp_path / "run", model_path, peft=True, save_strategy="steps")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_logs(losses(resumed), losses(whole), rel=1e-6, abs=1e-7)
    for (name, got), (_, wanted) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name


def test_resume_without_a_checkpoint_is_refused(model_path, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint in output_dir"):
        trainer_in(tmp_path, model_path).train(resume_from_checkpoint=True)


def test_what_is_saved_loads_as_any_model(model_path, tmp_path):
    trainer = trainer_in(tmp_path, model_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    # Fused layers round otherwise.
    changes_of(trainer.model).undo_all()
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert "trl_fast" not in (tmp_path / "config.json").read_text().replace("trl_fast_segments", "trl_fast")
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == trainer.processing_class.pad_token
    assert "DPO" in (tmp_path / "README.md").read_text()


def test_a_saved_adapter_loads(model_path, tmp_path):
    trainer = trainer_in(tmp_path, model_path, peft=True, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_the_same_seed_gives_the_same_run_bit_for_bit(model_path, tmp_path):
    runs = [trainer_in(tmp_path / name, model_path, max_steps=3) for name in "ab"]
    for trainer in runs:
        trainer.train()
    first, second = (losses(trainer) for trainer in runs)
    assert_same_logs(first, second, rel=0, abs=0)
    other = trainer_in(tmp_path / "c", model_path, seed=1, max_steps=1)
    other.train()
    assert losses(other)[0]["logps/chosen"] != first[0]["logps/chosen"]


def test_evaluate_takes_datasets_that_were_not_prepared(model_path, tmp_path):
    trainer = trainer_in(tmp_path, model_path, arguments={"eval_dataset": color_pairs(5)})
    expected = trainer.evaluate()
    assert_same_logs([trainer.evaluate(color_pairs(5))], [expected], rel=0, abs=0)
    again = trainer.evaluate({"few": color_pairs(5), "more": color_pairs(9)})
    assert again["eval_few_loss"] == expected["eval_loss"]
    assert again["eval_more_loss"] == trainer.evaluate(color_pairs(9))["eval_loss"]


def test_precomputed_references_are_computed_once(model_path, tmp_path, monkeypatch):
    calls = []
    original = trl_fast.DPOTrainer.reference_logprobs

    def counted(self, batch):
        calls.append("ref_chosen_logps" in batch.extras)
        return original(self, batch)

    monkeypatch.setattr(trl_fast.DPOTrainer, "reference_logprobs", counted)
    # A dataset with files of its own is cached beside them.
    dataset = color_pairs().add_column("run", [str(tmp_path)] * 24)
    dataset.save_to_disk(tmp_path / "data")
    dataset = type(dataset).load_from_disk(str(tmp_path / "data"))

    def run(name, *, arguments=None, **settings):
        calls.clear()
        options = {"precompute_ref_log_probs": True, "max_steps": 1, **settings}
        given = {"train_dataset": dataset, **(arguments or {})}
        trainer = trainer_in(tmp_path / name, model_path, arguments=given, **options)
        trainer.train()
        assert trainer.ref_model is None
        return calls.count(False), calls.count(True)

    assert run("first") == (6, 2)
    assert run("second") == (0, 2)
    assert run("other length", max_length=20) == (6, 2)
    assert run("other precision", bf16=True) == (6, 2)
    assert run("other layout", batch_layout="padded") == (0, 2)
    wordy = build_tokenizer()
    wordy.chat_template = wordy.chat_template.replace("<|im_start|>", "<|im_start|>the ")
    assert run("other template", arguments={"processing_class": wordy}) == (6, 2)
    # A new adapter is no part of the reference.
    assert run("adapter", peft=True) == (6, 2)
    assert run("another adapter", peft=True, seed=1) == (0, 2)
    assert run("other dtype", model_init_kwargs={"dtype": "bfloat16"}) == (6, 2)
    with pytest.raises(ValueError, match="policy before training"):
        trainer = trainer_in(
            tmp_path / "late", model_path, arguments={"train_dataset": dataset}, precompute_ref_log_probs=True
        )
        trainer.train()
        trainer.evaluate(color_pairs(3))
