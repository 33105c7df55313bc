"""Runs of KTOTrainer: interrupted, precomputed, evaluated, in bfloat16; and which completions share a pass."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

import trl_fast
from support.training import assert_same_logs, color_labels, make_trainer
from trl_fast.modeling import scoring
from trl_fast.trainers import kto
from trl_fast.trainers.base import reference

LORA = {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", "init_lora_weights": False}


def trainer_in(folder, model_path, *, peft=False, arguments=None, **settings):
    given = {"model": model_path, "train_dataset": color_labels(), **(arguments or {})}
    if peft:
        given["peft_config"] = LoraConfig(**LORA)
    return make_trainer(trl_fast, folder, method="KTO", arguments=given, **{"max_steps": 4, **settings})


def losses(trainer):
    # A trainer state that was read from a file has its names sorted.
    return [dict(sorted(log.items())) for log in trainer.state.log_history if "loss" in log]


class PullThePlug(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("peft", [False, True])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(peft, model_path, tmp_path):
    whole = trainer_in(tmp_path / "whole", model_path, peft=peft)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    broken = trainer_in(tmp_path / "run", model_path, peft=peft, arguments={"callbacks": [PullThePlug()]}, **saving)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_in(tmp_path / "run", model_path, peft=peft, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert_same_logs(losses(resumed), losses(whole), rel=1e-6, abs=1e-7)
    for (name, got), (_, wanted) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name

    resumed.save_model()
    base = AutoModelForCausalLM.from_pretrained(model_path if peft else tmp_path / "run", dtype="float32")
    loaded = PeftModel.from_pretrained(base, tmp_path / "run") if peft else base
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded.eval()(ids).logits, resumed.model.eval()(ids).logits)
    assert "KTO" in (tmp_path / "run/README.md").read_text()


def test_evaluate_takes_datasets_that_were_not_prepared(model_path, tmp_path):
    trainer = trainer_in(tmp_path, model_path, arguments={"eval_dataset": color_labels(5)})
    expected = trainer.evaluate()
    assert_same_logs([trainer.evaluate(color_labels(5))], [expected], rel=0, abs=0)
    assert_same_logs([trainer.evaluate(trainer.eval_dataset)], [expected], rel=0, abs=0)


def test_precomputed_references_are_computed_once(model_path, tmp_path, monkeypatch):
    passes = []
    original = reference.ReferencePolicy.score
    monkeypatch.setattr(
        reference.ReferencePolicy, "score", lambda self, batch: passes.append(len(batch)) or original(self, batch)
    )
    color_labels().add_column("run", [str(tmp_path)] * 24).save_to_disk(tmp_path / "data")
    dataset = Dataset.load_from_disk(str(tmp_path / "data"))

    def run(name, **settings):
        passes.clear()
        arguments = {"train_dataset": dataset}
        options = {"precompute_ref_log_probs": True, "max_steps": 1, **settings}
        trainer = trainer_in(tmp_path / name, model_path, arguments=arguments, **options)
        trainer.train()
        assert trainer.ref_model is None
        return list(passes)

    # Both completions of a row are scored in one pass; what other blocks pair is another dataset.
    assert run("first") == [8] * 6
    assert run("second") == []
    assert run("other blocks", per_device_train_batch_size=6) == [12] * 4
    assert run("no mismatched ones", loss_type="apo_zero_unpaired") == [4] * 6


def with_prompts(copies):
    return color_labels(4).map(lambda row: {"prompt": "What color? " * copies})


@pytest.mark.parametrize(
    ("copies", "peft", "checkpointing", "together"),
    [(1, True, False, False), (30, False, True, True), (6, False, True, False), (6, True, False, True)],
)
def test_one_pass_where_it_costs_less(copies, peft, checkpointing, together, model_path, tmp_path):
    """Mismatched completions in backward cost up to three passes over them; apart, the prompts cost one more."""
    arguments = {"train_dataset": with_prompts(copies)}
    trainer = trainer_in(tmp_path, model_path, peft=peft, arguments=arguments, gradient_checkpointing=checkpointing)
    batch = trainer.data_collator.collate(list(trainer.train_dataset))
    assert trainer._scores_together(batch) == together
    with torch.no_grad():
        assert trainer._scores_together(batch) == (copies > 1)


@pytest.mark.parametrize(("loss_type", "copies"), [("kto", 30), ("kto", 6), ("apo_zero_unpaired", 6)])
def test_tokens_that_the_models_see(loss_type, copies, model_path, tmp_path, monkeypatch):
    """A prompt once for both of its completions; mismatched ones only where the loss needs them."""
    seen = []
    original = scoring.score

    def score(model, batch, **kwargs):
        seen.append((batch.input_ids.numel(), torch.is_grad_enabled()))
        return original(model, batch, **kwargs)

    settings = {"loss_type": loss_type, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = trainer_in(tmp_path, model_path, arguments={"train_dataset": with_prompts(copies)}, **settings)
    # The policy's passes, and the reference's.
    for module in (kto, reference):
        monkeypatch.setattr(module, "score", score)
    trainer.train()
    lengths = {
        name: sum(map(len, trainer.train_dataset[name])) if name in trainer.train_dataset.column_names else 0
        for name in ("prompt_ids", "completion_ids", "KL_completion_ids")
    }
    prompt, own, other = lengths.values()
    policy = [(prompt + own + other, True)] if copies == 30 else [(prompt + other, False), (prompt + own, True)]
    assert seen == [(prompt + own + other, False), *(policy if loss_type == "kto" else policy[1:])]


def test_one_pass_or_two_give_the_same(model_path, tmp_path, monkeypatch):
    logs = []
    for together in (True, False):
        monkeypatch.setattr(trl_fast.KTOTrainer, "_scores_together", lambda *_, together=together: together)
        reference = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
        reference.model.norm.weight.data.mul_(1.6)
        trainer = trainer_in(tmp_path, model_path, arguments={"ref_model": reference}, max_steps=2)
        trainer.train()
        logs.append(losses(trainer))
    assert logs[0][0]["kl"] > 0.1
    assert_same_logs(*logs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("copies", [1, 30], ids=["apart", "in one pass"])
def test_a_policy_that_has_not_changed_has_no_kl(copies, model_path, tmp_path, monkeypatch):
    """The reference scores mismatched completions beside own ones, the policy apart: other rows, the same bits."""
    seen = []
    original = kto.kl_estimate
    monkeypatch.setattr(kto, "kl_estimate", lambda *given: seen.append(given) or original(*given))
    arguments = {"train_dataset": with_prompts(copies)}
    trainer = trainer_in(tmp_path, model_path, arguments=arguments, gradient_accumulation_steps=1, max_steps=1)
    assert trainer._scores_together(trainer.data_collator.collate(list(trainer.train_dataset))) == (copies == 30)
    trainer.train()
    assert seen and losses(trainer)[0]["kl"] == 0
    for logprobs, reference_logprobs in seen:
        assert logprobs.all() and torch.equal(logprobs, reference_logprobs)


def test_bfloat16_gives_the_gradients_of_float32_nearly(model_path, tmp_path):
    """The pass without gradient comes first and must leave no weights without gradient in autocast's cache."""
    norms = []
    for bf16 in (False, True):
        trainer = trainer_in(tmp_path, model_path, bf16=bf16, max_steps=1)
        trainer.train()
        norms.append(losses(trainer)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.1)
