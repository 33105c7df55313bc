"""Training with fused layers: the numbers of a run without them, and models that have their own code after it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.llama import modeling_llama

import trl_fast
from support.models import tiny_model
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.fused_layers import FUSED_LAYERS
from trl_fast.modeling.fused_layers.rotary_functions import restore_function
from trl_fast.modeling.model_changes import changes_of
from trl_fast.trainers.base.fused_models import FusedModels


@pytest.fixture(autouse=True)
def _own_function():
    restore_function(modeling_llama.__name__, "apply_rotary_pos_emb")


class Watch(TrainerCallback):
    """Notes at every step, and at every batch of an evaluation, which of some models are fused."""

    def __init__(self, *models, raises=None):
        self.models, self.raises, self.seen, self.seen_evaluating = models, raises, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append([is_fused(model) for model in self.models])
        if self.raises is not None:
            raise self.raises

    def on_prediction_step(self, args, state, control, **kwargs):
        self.seen_evaluating.append([is_fused(model) for model in self.models])


def is_fused(model):
    """Whether a model's layers, and the function that turns its queries and keys, are ours."""
    found = FUSED_LAYERS in changes_of(model)
    assert any(hasattr(module, "fused_class") for module in model.modules()) is found
    assert not found or hasattr(modeling_llama.apply_rotary_pos_emb, "fused_from")
    return found


def trainer_of(tokenizer, output_dir, method="DPO", **settings):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    rows = color_pairs(8) if method == "DPO" else color_pairs(8).map(lambda row: {"completion": row["chosen"]})
    rows = rows if method == "DPO" else rows.remove_columns(["chosen", "rejected"])
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": rows, "eval_dataset": rows}
    return make_trainer(trl_fast, output_dir, method=method, arguments=arguments, **settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("SFT", {}),
        ("DPO", {}),
        ("DPO", {"batch_layout": "padded", "tiled_mlp": 16}),
        ("DPO", {"gradient_checkpointing_kwargs": {"selective": True}, "activation_budget_bytes": 0}),
    ],
    ids=["sft", "dpo", "padded-tiled", "selective"],
)
def test_three_steps(method, settings, tokenizer, tmp_path):
    """Models are fused while they train, and theirs is their own code after it."""
    plain = trainer_of(tokenizer, tmp_path, method, fused_layers=False, **settings)
    classes = [type(module) for module in plain.model.modules()]
    plain.train()
    trainer = trainer_of(tokenizer, tmp_path, method, fused_layers=True, **settings)
    models = [trainer.model] if method == "SFT" else [trainer.model, trainer.ref_model]
    watch = Watch(*models)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [[True] * len(models)] * 3
    assert_same_logs(trainer.state.log_history, plain.state.log_history, rel=1e-5, abs=1e-6)
    assert not any(is_fused(model) for model in models)
    assert not hasattr(modeling_llama.apply_rotary_pos_emb, "fused_from")
    assert [type(module) for module in trainer.model.modules()] == classes


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), KeyboardInterrupt()], ids=repr)
def test_after_an_error(error, tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path)
    watch = Watch(trainer.model, trainer.ref_model, raises=error)
    trainer.add_callback(watch)
    with pytest.raises(type(error)):
        trainer.train()
    assert watch.seen == [[True, True]] and not is_fused(trainer.model) and not is_fused(trainer.ref_model)
    watch.raises = None
    trainer.train()
    assert watch.seen == [[True, True]] * 4 and not is_fused(trainer.model)


def test_evaluating_and_training_again(tokenizer, tmp_path):
    """Each call fuses what it runs: an evaluation within training leaves its end to that."""
    trainer = trainer_of(tokenizer, tmp_path, eval_strategy="steps", eval_steps=2)
    watch = Watch(trainer.model, trainer.ref_model)
    trainer.add_callback(watch)
    assert is_fused(trainer.model)
    before = trainer.evaluate()["eval_loss"]
    assert not is_fused(trainer.model)
    trainer.train()
    assert watch.seen == [[True, True]] * 3
    after = trainer.evaluate()["eval_loss"]
    assert after != before and trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(after)
    assert all(all(seen) for seen in watch.seen_evaluating) and len(watch.seen_evaluating) == 5
    trainer.fused_models = FusedModels(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)
    assert watch.seen_evaluating[-1] == [False, False]
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, weight), other in zip(trainer.model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_undone_by_hand_it_stays_undone(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path)
    changes_of(trainer.model).undo(FUSED_LAYERS)
    watch = Watch(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [[False]] * 3


def test_two_trainers_one_after_the_other(tokenizer, tmp_path):
    """The function that turns queries and keys, which all models of a family share, comes back for the second one."""
    trainers = [trainer_of(tokenizer, tmp_path, "SFT") for _ in range(2)]
    for trainer in trainers:
        watch = Watch(trainer.model)
        trainer.add_callback(watch)
        trainer.train()
        assert watch.seen == [[True]] * 3
        assert not hasattr(modeling_llama.apply_rotary_pos_emb, "fused_from")


def test_what_is_put_on_top_stays(tokenizer, tmp_path, caplog):
    """As by FSDP2, whose classes stand before those of layers."""
    caplog.set_level("INFO")
    trainer = trainer_of(tokenizer, tmp_path, "SFT")
    norm = trainer.model.model.norm
    norm.__class__ = type("OnTop", (type(norm),), {})
    trainer.train()
    assert is_fused(trainer.model)
    assert "layers of LlamaForCausalLM stay fused after training: 'fused layers' cannot be undone: " in caplog.text


def test_not_beside_liger(tmp_path):
    with pytest.raises(ValueError, match="fused_layers=True: use_liger_kernel=True fuses the same layers"):
        trl_fast.SFTConfig(str(tmp_path), use_liger_kernel=True, fused_layers=True)
