"""Checks a run of SFTTrainer: normalisation, learning, adapters on the head, saving, resuming, evaluating."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_fast
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, make_trainer
from trl_fast.modeling.model_changes import changes_of


def trainer_in(folder, model_path, arguments=None, **settings):
    given = {"model": model_path, "train_dataset": sft_rows("prompt and completion", 24), **(arguments or {})}
    return make_trainer(trl_fast, folder, method="SFT", arguments=given, **settings)


def losses(trainer):
    return [dict(sorted(log.items())) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_accumulation_does_not_change_the_loss(loss_type, model_path, tmp_path):
    """The loss is one mean over the learned tokens of a step, however it is cut into micro-batches."""
    logs = []
    for size in (1, 3, 12):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 12 // size, "max_steps": 2}
        trainer = trainer_in(tmp_path / str(size), model_path, loss_type=loss_type, **settings)
        trainer.train()
        logs.append([{name: log[name] for name in ("loss", "grad_norm", "num_tokens")} for log in losses(trainer)])
    for other in logs[1:]:
        assert_same_logs(other, logs[0], rel=1e-5)


def test_a_micro_batch_without_a_learned_token(model_path, tmp_path):
    rows = sft_rows("tokens and labels", 8).map(lambda row, i: {"labels": row["labels"] if i % 2 else [-100] * len(row["labels"])}, with_indices=True)  # fmt: skip  # noqa: E501
    trainer = trainer_in(
        tmp_path, model_path, {"train_dataset": rows}, max_length=None, per_device_train_batch_size=1, max_steps=4
    )
    trainer.train()
    assert all(0 <= log["loss"] < 20 and log["grad_norm"] == log["grad_norm"] for log in losses(trainer))


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 48}, {"loss_type": "dft"}])
def test_it_learns(settings, model_path, tmp_path):
    rows = {"train_dataset": sft_rows("prompt and completion", 6)}
    pace = {"max_steps": 24, "learning_rate": 1e-2, "logging_steps": 6, "gradient_checkpointing": False}
    trainer = trainer_in(tmp_path, model_path, rows, **pace, **settings)
    trainer.train()
    first, *_, last = losses(trainer)
    assert last["mean_token_accuracy"] > first["mean_token_accuracy"] + 0.25
    assert last["loss"] < first["loss"] / 2 and last["entropy"] < 1 < first["entropy"]


def test_an_adapter_on_the_head_is_trained(model_path, tmp_path):
    """TRL refuses it; here its gradient is that of the model's own forward."""
    config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trainer_in(tmp_path, model_path, {"peft_config": config}, gradient_checkpointing=False)
    batch = next(iter(trainer.get_train_dataloader()))
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert weights and all("lm_head" in name for name in weights)
    trainer.compute_loss(trainer.model, batch).backward()
    ours = {name: weight.grad.clone() for name, weight in weights.items()}
    trainer.model.zero_grad()
    logits, labels = trainer.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name], weight.grad)


def test_a_run_of_an_adapter_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(model_path, tmp_path):
    """tests/trainers/test_resume.py has the whole model."""

    def build(folder, **settings):
        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        return trainer_in(folder, model_path, {"peft_config": config}, packing=True, max_length=40, max_steps=4, **settings)  # fmt: skip  # noqa: E501

    whole = build(tmp_path / "whole")
    whole.train()
    build(tmp_path / "run", save_strategy="steps", save_steps=2).train()
    resumed = build(tmp_path / "run", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_same_logs(losses(resumed), losses(whole), rel=1e-6, abs=1e-7)
    for (name, got), (_, wanted) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name


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
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == trainer.processing_class.chat_template
    assert "SFTTrainer" in (tmp_path / "README.md").read_text()


def test_evaluate_takes_datasets_that_were_not_prepared(model_path, tmp_path):
    few, more = sft_rows("prompt and completion", 5), sft_rows("prompt and completion", 9)
    trainer = trainer_in(tmp_path, model_path, {"eval_dataset": few}, packing=True, max_length=60)
    expected = trainer.evaluate()
    assert_same_logs([trainer.evaluate(few)], [expected], rel=0, abs=0)
    # A packed dataset is not packed again.
    assert_same_logs([trainer.evaluate(trainer.eval_dataset)], [expected], rel=0, abs=0)
    both = trainer.evaluate({"few": few, "more": more})
    assert both["eval_few_loss"] == expected["eval_loss"]
    assert both["eval_more_loss"] == trainer.evaluate(more)["eval_loss"]


def test_evaluation_is_packed_only_if_asked_for(model_path, tmp_path):
    sets = {"eval_dataset": {"train": sft_rows("prompt and completion", 5)}}
    trainer = trainer_in(tmp_path, model_path, sets, packing=True, max_length=60, eval_packing=False)
    assert "seq_lengths" in trainer.train_dataset.column_names
    assert "seq_lengths" not in trainer.eval_dataset["train"].column_names


def test_rows_made_as_they_are_read(model_path, tmp_path):
    tokenizer = build_tokenizer()
    rows = sft_rows("text", 12).with_transform(lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]})
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "max_steps": 1}
    trainer = trainer_in(tmp_path, model_path, {"train_dataset": rows}, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] > 0


def test_a_chat_template_from_elsewhere(model_path, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}")
    arguments = {"train_dataset": sft_rows("messages", 4)}
    trainer = trainer_in(tmp_path / "file", model_path, arguments, chat_template_path=str(template))
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text.startswith("user>What color is 0?<|im_end|>assistant>")

    other = build_tokenizer()
    other.add_tokens(["<|turn|>"])
    other.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trainer_in(
        tmp_path / "cloned",
        model_path,
        {**arguments, "peft_config": config},
        chat_template_path=str(tmp_path / "other"),
        max_steps=1,
    )
    new = trainer.processing_class.convert_tokens_to_ids("<|turn|>")
    assert trainer.train_dataset[0]["input_ids"].count(new) == 2
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    loaded.resize_token_embeddings(len(trainer.processing_class))
    ids = torch.tensor([[5, 6, new, 8]])
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "cloned").eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
