"""Bad input is met by name, before training starts. What is said about rows is in tests/data/test_sft_data.py."""

import pytest
from datasets import Dataset
from peft import LoraConfig

import trl_fast
from support.models import tiny_model
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import make_trainer
from trl_fast.data import DataCollatorForLanguageModeling


@pytest.fixture
def build(model_path, tmp_path):
    def build(arguments=None, **settings):
        given = {"model": model_path, "train_dataset": sft_rows("text", 4), **(arguments or {})}
        return make_trainer(trl_fast, tmp_path, method="SFT", arguments=given, **settings)

    return build


def test_datasets(build):
    with pytest.raises(ValueError, match="train_dataset is required"):
        build({"train_dataset": None})
    with pytest.raises(TypeError, match="train_dataset.*got list"):
        build({"train_dataset": [{"text": "a"}]})
    with pytest.raises(ValueError, match="The train dataset has no rows"):
        build({"train_dataset": Dataset.from_dict({"text": []})})
    with pytest.raises(ValueError, match=r"The eval hard dataset has the columns \['story', 'id'\]"):
        build({"eval_dataset": {"hard": sft_rows("story", 2)}})


WRONG_DATA = [
    (
        {"completion_only_loss": True},
        "text",
        r"completion_only_loss=True needs.*'prompt' and 'completion'.*\['text'\]",
    ),
    ({"assistant_only_loss": True}, "text", r"assistant_only_loss=True needs conversations.*\['text'\]"),
    ({"assistant_only_loss": True}, "prompt and completion", "assistant_only_loss=True needs conversations"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), WRONG_DATA)
def test_losses_that_the_data_cannot_have(settings, kind, message, build):
    with pytest.raises(ValueError, match=message):
        build({"train_dataset": sft_rows(kind, 4)}, **settings)


def test_a_formatted_text_has_no_completion(build):
    arguments = {"train_dataset": sft_rows("prompt and completion", 4), "formatting_func": lambda row: row["prompt"]}
    assert build(arguments).completion_only_loss is False
    with pytest.raises(ValueError, match="formatting_func makes one text"):
        build(arguments, completion_only_loss=True)


def test_a_formatting_func_that_fails(build):
    with pytest.raises(ValueError, match="train dataset, row 0: formatting_func raised KeyError: 'story'"):
        build({"formatting_func": lambda row: row["story"]})


@pytest.mark.parametrize("kind", ["text", "messages"])
@pytest.mark.parametrize("format", ["arrow", "pandas"])
def test_formats_whose_rows_are_tables(format, kind, build):
    rows = sft_rows(kind, 4)
    prepared = build({"train_dataset": rows.with_format(format), "eval_dataset": {"one": rows.with_format(format)}})
    assert (
        prepared.train_dataset[:] == prepared.eval_dataset["one"][:] == build({"train_dataset": rows}).train_dataset[:]
    )


def test_templates_that_cannot_mark_the_assistant(build, caplog):
    tokenizer = build_tokenizer()
    arguments = {"train_dataset": sft_rows("messages", 4), "processing_class": tokenizer}
    build(arguments, assistant_only_loss=True)
    assert not caplog.records
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    build(arguments, assistant_only_loss=True)
    assert "may not learn to stop" in caplog.text
    tokenizer.chat_template = "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="chat_template cannot tell.*Put {% generation %}"):
        build(arguments, assistant_only_loss=True)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*chat_template_path"):
        build(arguments, assistant_only_loss=True)


def test_datasets_that_are_taken_as_they_are(build):
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="has masks but no labels"):
        build({"train_dataset": sft_rows("tokens and completions", 4)}, **skip)
    trainer = build({"train_dataset": sft_rows("tokens", 4)}, **skip)
    with pytest.raises(ValueError, match="The eval dataset has masks but no labels"):
        trainer.evaluate(sft_rows("tokens and assistant", 4))


def test_tokens_that_the_model_does_not_know(build, tokenizer):
    rows = Dataset.from_dict({"input_ids": [[5, 6], [7, len(tokenizer) + 5]]})
    with pytest.raises(ValueError, match=f"(?s)train dataset, row 1.*input_ids.*{len(tokenizer) + 5}"):
        build({"train_dataset": rows})
    with pytest.raises(ValueError, match=f"(?s)vocab.*{len(tokenizer) - 40}"):
        build({"model": tiny_model(vocab_size=len(tokenizer) - 40), "processing_class": tokenizer})


def test_end_tokens(build):
    with pytest.raises(ValueError, match="eos_token='<none>' is not in the tokenizer's vocabulary"):
        build(eos_token="<none>")
    with pytest.raises(ValueError, match="eos_token=None"):
        build({"processing_class": build_tokenizer(eos_token=None)})


def test_collators(build):
    with pytest.raises(ValueError, match="data_collator: with packing_strategy='bfd'"):
        build({"data_collator": DataCollatorForLanguageModeling(2)}, packing=True)
    trainer = build({"data_collator": lambda rows: {"input_ids": None}})
    with pytest.raises(ValueError, match=r"has \['input_ids'\], but the loss reads 'labels' too; let data_collator"):
        trainer.train()


def test_arguments(build, tmp_path, model_path):
    with pytest.raises(TypeError, match="SFTTrainer has no argument 'beta'"):
        build({"beta": 0.1})
    with pytest.raises(TypeError, match="args: expected a SFTConfig, got dict"):
        trl_fast.SFTTrainer(model_path, {"output_dir": str(tmp_path)}, train_dataset=sft_rows("text", 2))
    with pytest.raises(ValueError, match="loss_type='dft' cannot be used too"):
        build({"compute_loss_func": lambda *_: None}, loss_type="dft")
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1"):
        build(router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="lora_dropout on the head"):
        build({"peft_config": LoraConfig(target_modules=["lm_head"], lora_dropout=0.1, task_type="CAUSAL_LM")}).train()
