"""Bad input is met by name, before training starts; what can be put right is, with one line."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_fast
from support.models import tiny_classifier
from support.tokenizer import build_tokenizer
from support.training import color_pairs, make_trainer

ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.fixture
def build(model_path, tmp_path):
    def build(arguments=None, **settings):
        given = {"model": model_path, "train_dataset": color_pairs(4), **(arguments or {})}
        return make_trainer(trl_fast, tmp_path, method="Reward", arguments=given, **settings)

    return build


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "a", "completion": "b"}], "'chosen' and 'rejected'"),
        ([ROW, {**ROW, "chosen": "", "rejected": ""}], "row 1.*chosen.*empty"),
        ([{**ROW, "rejected": " b"}] * 3, "'chosen' equals 'rejected' in all 3 rows"),
        ([{**ROW, "margin": None}], "row 0, column 'margin'"),
    ],
)
def test_datasets(rows, message, build):
    dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=f"(?s)train dataset.*{message}"):
        build({"train_dataset": dataset})
    with pytest.raises(ValueError, match=f"(?s)eval mine dataset.*{message}"):
        build({"eval_dataset": {"mine": dataset}})


def test_rows_that_are_all_too_long(build):
    with pytest.raises(ValueError, match="train dataset is empty.*max_length=3"):
        build(max_length=3)
    with pytest.raises(ValueError, match="train dataset has no row of at most max_length"):
        build({"train_dataset": color_pairs(4).to_iterable_dataset()}, max_length=3)


def test_no_dataset_or_another_thing(build):
    with pytest.raises(ValueError, match="train_dataset is required"):
        build({"train_dataset": None})
    with pytest.raises(TypeError, match="train_dataset.*got list"):
        build({"train_dataset": [ROW]})


def test_models(build, model_path, tokenizer):
    with pytest.raises(ValueError, match="LlamaForCausalLM has num_labels=2.*num_labels=1"):
        build({"model": AutoModelForCausalLM.from_pretrained(model_path)})
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has num_labels=3"):
        build({"model": tiny_classifier(num_labels=3), "processing_class": tokenizer})
    with pytest.raises(ValueError, match="model_init_kwargs: num_labels=2"):
        build(model_init_kwargs={"num_labels": 2})
    language_model = AutoModelForCausalLM.from_pretrained(model_path, num_labels=1)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM returns logits of shape"):
        build({"model": language_model})
    with pytest.raises(OSError, match="no-such-model"):
        build({"model": "no-such-model"})
    with pytest.raises(TypeError, match="peft_config.*got dict"):
        build({"peft_config": {"r": 4}})


def test_tokenizers(build, tokenizer):
    with pytest.raises(ValueError, match="neither a pad token nor an eos token"):
        build({"processing_class": build_tokenizer(eos_token=None, pad_token=None)})
    with pytest.raises(ValueError, match="eos_token='<none>'"):
        build(eos_token="<none>")
    with pytest.raises(OSError, match="chat_template_path='no-such.jinja'"):
        build(chat_template_path="no-such.jinja")
    small = tiny_classifier(vocab_size=len(tokenizer) - 40)
    with pytest.raises(ValueError, match=f"(?s)vocab.*{len(tokenizer) - 40}"):
        build({"model": small, "processing_class": tokenizer})
    rows = [{"chosen_ids": [5, 6], "rejected_ids": [len(tokenizer) + 5]}]
    with pytest.raises(ValueError, match=f"(?s)rejected_ids.*{len(tokenizer) + 5}"):
        build({"train_dataset": Dataset.from_list(rows)})
    with pytest.raises(ValueError, match="tokenizer and processing_class"):
        build({"processing_class": tokenizer, "tokenizer": tokenizer})
    with pytest.warns(FutureWarning, match="`tokenizer`"):
        assert build({"tokenizer": tokenizer}).processing_class is tokenizer


def test_fields_given_to_the_trainer(build):
    with pytest.warns(FutureWarning, match="`max_length`.*RewardConfig"):
        assert build({"max_length": 20}).args.max_length == 20
    with pytest.raises(TypeError, match="RewardTrainer has no argument 'max_lenght'; did you mean 'max_length'"):
        build({"max_lenght": 20})


def test_a_layout_that_the_model_cannot_run(build, tokenizer):
    arguments = {"model": tiny_classifier("bert", max_position_embeddings=64), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="batch_layout='packed' cannot be used: BertFor.* has no head 'score'"):
        build(arguments, batch_layout="packed")
    assert build(arguments).data_collator.layout == "padded"


def test_an_adapter_for_a_language_model_becomes_one_for_a_classifier(build, caplog):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = build({"peft_config": config})
    assert "task_type='CAUSAL_LM' is for language models; 'SEQ_CLS' is used" in caplog.text
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert any("score.modules_to_save" in name for name in trained)
    assert config.task_type == "CAUSAL_LM"


def test_an_adapters_config_can_be_used_twice(build):
    """Used once, it names both heads that peft knows, of which a model has one."""
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    for _ in range(2):
        build({"peft_config": config})
    assert "classifier" in config.modules_to_save
    with pytest.raises(ValueError, match="modules_to_save names 'classifier'"):
        build({"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])})


def test_a_head_that_is_new_and_frozen_is_a_warning(build, caplog):
    build({"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["score"])})
    assert "frozen" not in caplog.text
    build({"peft_config": LoraConfig(target_modules=["q_proj"])})
    assert "head ('score') is frozen" in caplog.text and "modules_to_save=['score']" in caplog.text


def test_a_cloned_template_trains_its_new_tokens(build, tmp_path):
    source = build_tokenizer()
    source.add_special_tokens({"eos_token": "<|endofturn|>"})
    source.save_pretrained(tmp_path / "source")
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    trainer = build({"peft_config": config}, chat_template_path=str(tmp_path / "source"))
    assert trainer.processing_class.eos_token == "<|endofturn|>"
    eos = trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"][0]
    assert eos == trainer.processing_class.eos_token_id == trainer.model.config.eos_token_id
    trainer.train()
