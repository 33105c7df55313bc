"""SDFTTrainer as a person uses it: it learns, shares prompts, resumes, evaluates; callbacks hear of it."""

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

import trl_fast
import trl_fast.data.packing as packing
from support.models import tiny_model
from support.resuming import assert_resumes
from support.rollouts import FixedEngine
from support.told_prompts import told_chats, told_prompts
from support.training import make_trainer
from trl_fast.data.segments import segments_of
from trl_fast.rollout import Rollout

SETTINGS = {"max_completion_length": 8, "num_generations": 2, "max_steps": 2, "distillation_topk": 7}


@pytest.fixture
def make(model_path, tokenizer, tmp_path):
    def trainer(folder=None, **given):
        names = ("model", "train_dataset", "eval_dataset", "peft_config", "rollout_engine", "processing_class")
        arguments = {"model": model_path, "train_dataset": told_prompts(), "rollout_engine": FixedEngine(tokenizer)}
        arguments |= {name: given.pop(name) for name in (*names, "callbacks") if name in given}
        return make_trainer(trl_fast, folder or tmp_path, method="SDFT", arguments=arguments, **{**SETTINGS, **given})

    return trainer


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})


class Alike:
    """An engine whose completions depend on their prompts only."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [[6 + (7 * token) % 200 for token in ids[-5:]] for ids in prompt_ids])


@pytest.mark.parametrize("mode", ["topk_logits", "full_logits"])
def test_the_student_comes_to_its_told_self(mode, make):
    settings = {"max_steps": 25, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "distillation_mode": mode}
    settings |= {"distillation_alpha": 1.0, "distillation_topk": 50}
    trainer = make(eval_dataset=told_prompts(4), rollout_engine=Alike(), num_generations_eval=1, **settings)
    trainer.args.distillation_mode = "full_logits"
    before = trainer.evaluate()["eval_loss"]
    trainer.args.distillation_mode = mode
    trainer.train()
    trainer.args.distillation_mode = "full_logits"
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_sampled_tokens_come_to_be_as_likely_as_for_the_teacher(make):
    settings = {"max_steps": 25, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = make(rollout_engine=Alike(), distillation_mode="sampled_token", distillation_alpha=1.0, **settings)

    def gap():
        trainer.model.eval()
        update = trainer._prepare_inputs([trainer.train_dataset[index] for index in range(8)])
        own = trainer.policy_logprobs(update.batch)
        gap = own - trainer.reference.score(update.teacher_batch, temperature=1.0).logprobs
        trainer.model.train()
        return gap.detach().abs().mean()

    before = gap()
    trainer.train()
    assert gap() < 0.5 * before


def test_prompts_are_computed_once_for_student_and_teacher(make, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    trainer = make(num_generations=4)
    update = trainer._prepare_inputs([trainer.train_dataset[0]] * 8)
    for batch in (update.batch, update.teacher_batch):
        assert len([segment for segment in segments_of(batch.tree_lengths) if segment.parent is None]) == 1
    assert torch.equal(update.batch.targets, update.teacher_batch.targets)
    assert update.teacher_batch.input_ids.numel() > update.batch.input_ids.numel()


def test_the_policy_that_just_sampled_is_not_asked_again(make):
    asked = []
    for settings, count in (
        ({}, 0),
        ({"num_iterations": 2}, 2),
        ({"num_iterations": 2, "distillation_is_clip": None}, 0),
    ):
        trainer = make(max_steps=1, **settings)
        policy_logprobs = trainer.policy_logprobs
        trainer.policy_logprobs = lambda batch, score=policy_logprobs: asked.append(batch) or score(batch)
        trainer.train()
        assert len(asked) == count
        asked.clear()


def test_an_evaluation_asks_the_policy_once(make):
    trainer = make(num_iterations=2, eval_dataset=told_prompts(4), per_device_eval_batch_size=4)
    trainer.policy_logprobs = None
    assert trainer.evaluate()["eval_loss"] > 0


def losses(trainer):
    trainer.train()
    return [log[name] for log in trainer.state.log_history if "loss" in log for name in ("loss", "grad_norm")]


def test_an_adapter_on_the_head_is_not_the_teachers(make, tokenizer, model_path):
    """The base's head is read for the teacher, though the student's carries the adapter."""
    trainer = make(peft_config=lora(target_modules=["q_proj", "lm_head"]), learning_rate=0.1, max_steps=3)
    losses(trainer)
    trainer.model.eval()
    update = trainer._prepare_inputs([trainer.train_dataset[index] for index in range(8)])
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, update)
    copied = make(model=trainer.model.merge_and_unload())
    copied.model.eval()
    copied.reference.model.load_state_dict(AutoModelForCausalLM.from_pretrained(model_path).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loss, copied._compute_loss(copied.model, update), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{"target_modules": ["embed_tokens", "v_proj"]}, {"use_dora": True}])
def test_an_averaged_adapter_begins_as_the_model_and_follows_as_a_whole(changes, make):
    settings = {"teacher_model_kind": "ema", "teacher_update_rate": 1.0, "learning_rate": 0.1}
    trainer = make(peft_config=lora(**changes), **settings)
    trainer.model.eval()
    batch = trainer._prepare_inputs([trainer.train_dataset[0]] * 4).batch

    def both():
        with torch.no_grad():
            return trainer.policy_logprobs(batch), trainer.reference.score(batch, temperature=1.0).logprobs

    own, taught = before = both()
    torch.testing.assert_close(taught, own)
    trainer.model.train()
    trainer.train()
    own, taught = both()
    assert (own - before[0]).abs().max() > 1e-2
    torch.testing.assert_close(taught, own)


@pytest.mark.parametrize("kind", ["base", pytest.param("ema", marks=pytest.mark.slow)])
@pytest.mark.parametrize("peft", [False, True])
def test_resuming(kind, peft, make, tmp_path):
    def trainer(folder, **changes):
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "teacher_model_kind": kind}
        settings |= {"num_iterations": 2, **({"peft_config": lora()} if peft else {}), **changes}
        return make(folder, rollout_engine=None, **settings)

    assert_resumes(trainer, tmp_path / "run", (1, 2))


def test_streams_and_conversations(make):
    rows = list(told_chats(16))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = make(train_dataset=stream, eval_dataset=stream.take(4), per_device_eval_batch_size=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_teachers_prompts_are_sampled_after_if_asked_for(make):
    seen = []

    class Engine(Alike):
        def generate(self, prompt_ids, settings):
            seen.extend(prompt_ids)
            return super().generate(prompt_ids, settings)

    trainer = make(rollout_engine=Engine(), generate_from_teacher=True, max_steps=1)
    trainer.train()
    taught = {tuple(ids) for ids in trainer.train_dataset["teacher_prompt_ids"]}
    assert {tuple(ids) for ids in seen} <= taught
    samples = trainer.make_samples([trainer.train_dataset[0]] * 2)
    assert samples.prompt_ids[0] == trainer.train_dataset[0]["prompt_ids"]


class Listener(TrainerCallback):
    """Keeps what it is told, by the event's name."""

    def __init__(self):
        self.heard = {}

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda **told: self.heard.setdefault(name, []).append(told)


def test_callbacks_hear_what_trls_do(make, tokenizer):
    listener = Listener()
    make(callbacks=[listener], num_iterations=2, max_steps=1, gradient_accumulation_steps=1).train()
    (selected,), (prepared,), (built,) = (
        listener.heard[f"on_{name}"]
        for name in ("generation_prompts_selected", "self_distillation_batch_prepared", "generation_batch_built")
    )
    assert len(selected["generation_prompts"]) == 4 and selected["generation_prompt_text"] is None
    assert (built["generate_every"], built["steps_per_generation"]) == (2, 1)
    length = prepared["completion_ids"].shape[1]
    assert torch.equal(prepared["teacher_input_ids"][:, -length:], prepared["completion_ids"])
    assert prepared["old_per_token_logps"].shape == prepared["completion_ids"].shape
    assert prepared["teacher_attention_mask"].shape == prepared["teacher_input_ids"].shape
    text = tokenizer.decode(prepared["teacher_input_ids"][0][prepared["teacher_attention_mask"][0] == 1])
    assert "It is blue" in text


def test_a_mixture_of_experts_keeps_its_router_loss(make, tokenizer):
    trainer = make(model=tiny_model("mixtral"), processing_class=tokenizer, max_steps=1, router_aux_loss_coef=0.5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["aux_loss"] > 0 and log["loss"] > 0.4 * log["aux_loss"]


def test_what_may_be_changed_in_training(make):
    trainer = make()
    trainer.num_loss_tokens_to_skip = 2
    assert trainer.args.num_loss_tokens_to_skip == 2 and trainer.teacher_model is trainer.reference.model
    with pytest.raises(ValueError, match="num_loss_tokens_to_skip: expected"):
        trainer.num_loss_tokens_to_skip = -1
    assert trainer.num_generations == trainer.num_generations_eval == 2
