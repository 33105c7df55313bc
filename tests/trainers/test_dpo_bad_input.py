"""Bad input is met by name, before training starts."""

import os
import stat

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import trl_fast
from support.models import tiny_model
from support.tokenizer import build_tokenizer
from support.training import color_pairs, make_trainer

ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.fixture
def build(model_path, tmp_path):
    def build(arguments=None, **settings):
        given = {"model": model_path, "train_dataset": color_pairs(4), **(arguments or {})}
        return make_trainer(trl_fast, tmp_path, arguments=given, **settings)

    return build


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "a", "completion": "b"}], "'chosen' and 'rejected'"),
        ([ROW, {**ROW, "chosen": ""}], "row 1.*chosen.*empty"),
        ([ROW, {**ROW, "rejected": None}], "row 1.*rejected"),
        ([{**ROW, "rejected": " b"}] * 3, "'chosen' equals 'rejected' in all 3 rows"),
        ([], "no rows"),
    ],
)
def test_datasets(rows, message, build):
    columns = rows[0] if rows else ROW
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in columns})
    with pytest.raises(ValueError, match=f"(?is){message}"):
        build({"train_dataset": dataset})


def test_some_identical_pairs_are_a_warning_with_a_count(build, caplog):
    build({"train_dataset": Dataset.from_list([ROW, {**ROW, "rejected": " b"}, ROW])})
    assert [r.message for r in caplog.records if "1 of 3" in r.message]


def test_no_dataset_or_another_thing(build):
    with pytest.raises(ValueError, match="train_dataset is required"):
        build({"train_dataset": None})
    with pytest.raises(TypeError, match="train_dataset.*got list"):
        build({"train_dataset": [ROW]})
    with pytest.raises(TypeError, match="eval_dataset: .*got list"):
        build({"eval_dataset": [ROW]})
    with pytest.raises(TypeError, match=r"eval_dataset\['hard'\]: .*got list"):
        build({"eval_dataset": {"hard": [ROW]}})


def test_a_tokenizer_without_pad_and_eos(build):
    tokenizer = build_tokenizer(eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="neither a pad token nor an eos token"):
        build({"processing_class": tokenizer})
    with pytest.raises(ValueError, match="pad_token='<none>'"), pytest.warns(FutureWarning):
        build(pad_token="<none>")
    tokenizer = build_tokenizer(pad_token=None)
    build({"processing_class": tokenizer})
    assert tokenizer.pad_token == tokenizer.eos_token


def test_vocabularies_that_do_not_match(build, tokenizer):
    small = tiny_model(vocab_size=len(tokenizer) - 40)
    with pytest.raises(ValueError, match=f"(?s)vocab.*{len(tokenizer) - 40}"):
        build({"model": small, "processing_class": tokenizer})
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [len(tokenizer) + 5]}]
    with pytest.raises(ValueError, match=f"(?s)rejected_ids.*{len(tokenizer) + 5}"):
        build({"train_dataset": Dataset.from_list(rows)})


def test_models(build, model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    with pytest.raises(ValueError, match="ref_model is the very object of model"):
        build({"model": model, "ref_model": model})
    with pytest.raises(OSError, match="no-such-model"):
        build({"model": "no-such-model"})
    with pytest.raises(ValueError, match="dtype.*float8"):
        build(model_init_kwargs={"dtype": "float8"})
    lora = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="PeftModel already"):
        build({"model": get_peft_model(model, lora), "peft_config": lora})
    with pytest.raises(TypeError, match="peft_config.*got dict"):
        build({"peft_config": {"r": 4}})
    with pytest.raises(ValueError, match="lora_dropout on the head"):
        build({"peft_config": LoraConfig(target_modules=["lm_head"], lora_dropout=0.1)}, disable_dropout=False).train()
    with pytest.raises(NotImplementedError, match="sync_ref_model=True"):
        build({"peft_config": lora}, sync_ref_model=True)
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1"):
        build(router_aux_loss_coef=0.1)


def test_models_without_a_name_without_values_or_with_another_vocabulary(build, model_path, tokenizer):
    with pytest.raises(OSError, match="processing_class is missing: LlamaForCausalLM was not loaded by a name"):
        build({"model": tiny_model(vocab_size=len(tokenizer))})
    with pytest.raises(ValueError, match="LlamaForCausalLM is on the meta device"):
        build({"model": tiny_model().to("meta"), "processing_class": tokenizer})
    with pytest.raises(ValueError, match="ref_model has another vocabulary.*row 0, column 'prompt_ids'.*100 entries"):
        build({"ref_model": tiny_model(vocab_size=100)})
    # Rows that nothing reads may be missing.
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    model.resize_token_embeddings(len(tokenizer) + 24)
    assert build({"model": model, "processing_class": tokenizer, "ref_model": model_path}).ref_model is not None


def test_an_optimizer_of_other_weights(build, model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert build({"model": model, "optimizers": (optimizer, None)}).optimizer is optimizer
    with pytest.raises(ValueError, match="optimizers: the optimizer holds no weight that is trained"):
        build({"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="optimizers: .*With a peft_config"):
        build({"model": model, "optimizers": (optimizer, None), "peft_config": LoraConfig(task_type="CAUSAL_LM")})


@pytest.mark.parametrize("names", [("ref_chosen_logps",), ("ref_chosen_logps", "ref_rejected_logps")])
@pytest.mark.parametrize("precompute", [False, True])
def test_numbers_of_a_reference_in_the_dataset_are_not_read(names, precompute, build, caplog):
    dataset = color_pairs(4)
    for name in names:
        dataset = dataset.add_column(name, [-1.0] * 4)
    trainer = build({"train_dataset": dataset}, precompute_ref_log_probs=precompute, max_steps=1)
    assert [line for line in caplog.messages if f"The train dataset's columns {list(names)} are not read" in line]
    trainer.train()
    # The policy is the reference.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_tokenizer_given_twice_or_of_another_kind(build, tokenizer):
    with pytest.raises(ValueError, match="tokenizer and processing_class"):
        build({"processing_class": tokenizer, "tokenizer": tokenizer})
    with pytest.raises(TypeError, match="processing_class.*got str"):
        build({"processing_class": "gpt2"})


def test_a_layout_that_the_model_cannot_run(tmp_path, tokenizer):
    chunked = {"attention_chunk_size": 16, "num_local_experts": 2}
    model = tiny_model("llama4_text", vocab_size=len(tokenizer), **chunked)
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": color_pairs(4)}
    with pytest.raises(ValueError, match="batch_layout='packed'.*chunks of 16 tokens.*use 'auto' or 'padded'"):
        make_trainer(trl_fast, tmp_path, arguments=arguments, batch_layout="packed")
    trainer = make_trainer(trl_fast, tmp_path, arguments=arguments)
    assert trainer.data_collator.layout == "padded"


def test_rows_longer_than_the_models_positions(build, tokenizer):
    """In the data as it is cut: what max_length would allow does not count."""
    model = tiny_model("gpt2", vocab_size=len(tokenizer), max_position_embeddings=32)
    given = {"model": model, "processing_class": tokenizer, "train_dataset": Dataset.from_list([ROW])}
    long = Dataset.from_list([ROW, {**ROW, "chosen": " b" * 40}])
    with pytest.raises(ValueError, match="max_length=1024.*train dataset has [0-9]+ tokens.*table of 32 positions"):
        build({**given, "train_dataset": long})
    build({**given, "train_dataset": long}, max_length=32)
    with pytest.raises(ValueError, match="eval dataset has [0-9]+ tokens.*table of 32 positions"):
        build(given).evaluate(long)


def test_an_output_folder_that_cannot_be_written(model_path, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(ValueError, match="output_dir=.*taken.*cannot be written to"):
        make_trainer(trl_fast, taken / "run", arguments={"model": model_path, "train_dataset": color_pairs(4)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission(model_path, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ValueError, match="cannot be written to.*Permission"):
        make_trainer(trl_fast, tmp_path / "run", arguments={"model": model_path, "train_dataset": color_pairs(4)})


def test_nan_in_the_hidden_states_names_the_step(build, monkeypatch):
    trainer = build()
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    monkeypatch.setenv("TRL_FAST_CHECK", "1")
    with pytest.raises(ValueError, match="step 1: hidden: .* not finite"):
        trainer.train()


def test_a_backend_that_cannot_serve_is_refused(build):
    with pytest.raises((ValueError, RuntimeError), match="triton"):
        build(head_backend="triton").train()
