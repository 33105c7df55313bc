"""A model of which nothing would train is an error of `train`, which names the remedy; it can still be evaluated."""

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import trl_fast
from support.supervised import sft_rows
from support.training import color_labels, color_pairs, make_trainer

ROWS = {"SFT": lambda: sft_rows("text", 8), "DPO": color_pairs, "KTO": color_labels}


def trainer_of(model, method, tmp_path, tokenizer):
    arguments = {"model": model, "train_dataset": ROWS[method](), "processing_class": tokenizer}
    return make_trainer(trl_fast, tmp_path, method=method, arguments=arguments, max_steps=1)


@pytest.mark.parametrize("method", ROWS)
def test_frozen_model(method, model_path, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path).requires_grad_(False)
    trainer = trainer_of(model, method, tmp_path, tokenizer)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM: every weight is frozen.*requires_grad_\(True\), or give a"
    ):
        trainer.train()
    assert trainer.evaluate(ROWS[method]())["eval_loss"] > 0
    model.lm_head.requires_grad_(True)
    assert trainer.train().training_loss > 0


def test_frozen_adapter(model_path, tokenizer, tmp_path):
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer_of(frozen, "DPO", tmp_path, tokenizer).train()
