"""ServerDistillationTrainer as a person uses it: it learns, asks at once, resumes, survives a server that is lost."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import trl_fast
from support.models import tiny_model
from support.resuming import assert_resumes
from support.rollouts import FixedEngine, color_prompts
from support.teacher_server import teacher_server
from support.training import make_trainer
from trl_fast.rollout import Rollout


@pytest.fixture(scope="module")
def server(teacher_path):
    with teacher_server(teacher_path) as served:
        yield served


@pytest.fixture
def make(model_path, tokenizer, tmp_path, server):
    def trainer(folder=None, **given):
        names = ("model", "train_dataset", "eval_dataset", "peft_config", "rollout_engine", "processing_class")
        arguments = {"model": model_path, "train_dataset": color_prompts(), "rollout_engine": FixedEngine(tokenizer)}
        arguments |= {name: given.pop(name) for name in names if name in given}
        settings = {"max_completion_length": 8, "max_steps": 2, "teacher_model_server_url": server.url, **given}
        return make_trainer(trl_fast, folder or tmp_path, method="ServerDistillation", arguments=arguments, **settings)

    return trainer


class ByPrompt:
    """An engine whose completions depend on their prompts only."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [[6 + (7 * token) % 200 for token in ids[-5:]] for ids in prompt_ids])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"beta": 0.0, "loss_top_k": 50}, {"beta": 0.5}, {"beta": 1.0}], ids=str)
def test_the_student_comes_to_its_teacher(settings, make, teacher_path):
    settings = {"max_steps": 40, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **settings}
    trainer = make(rollout_engine=ByPrompt(), **settings)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    rows = [trainer.train_dataset[index] for index in range(8)]

    def gap():
        samples = trainer.mixture.samples(rows, [True] * 8)
        batch = trainer._update(samples, 1).batch
        trainer.model.eval()
        own = trainer.policy_logprobs(batch).detach()
        trainer.model.train()
        told = torch.cat(
            [each.result().own_logprobs for each in samples.select(samples.by_beginning(range(8))).taught]
        )
        return (own.exp() - told.exp()).abs().mean()

    before = gap()
    trainer.train()
    assert gap() < 0.5 * before and teacher is not None


def test_given_completions(make):
    rows = Dataset.from_list([{**row, "completion": f" It is {row['shade'] * 7}"} for row in color_prompts(8)])
    trainer = make(train_dataset=rows, eval_dataset=rows, lmbda=0.0, beta=0.0, loss_top_k=3, max_steps=1)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before > 1e-3 and trainer.state.log_history[-2]["loss"] > 1e-3


def test_all_completions_of_a_step_are_asked_about_before_it(make, server):
    trainer = make(max_steps=1, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    asked = []
    update = trainer._update

    def counted(samples, tokens):
        asked.append(sum(path == "/v1/completions" for _, path, _ in server.requests))
        found = update(samples, tokens)
        # Each about its own tokens, also where a batch has another order.
        assert torch.equal(found.ids[:, 0], found.batch.targets) and len(found.ids) == len(found.batch.targets)
        return found

    server.requests.clear()
    trainer._update = counted
    trainer.train()
    assert sum(path == "/v1/completions" for _, path, _ in server.requests) == 8 and len(asked) == 4


def losses(trainer):
    trainer.train()
    return [log[name] for log in trainer.state.log_history if "loss" in log for name in ("loss", "grad_norm")]


SPARSE = [{"beta": 0.0, "loss_top_k": 5, "loss_add_tail": False}, {"beta": 0.4, "temperature": 1.3}]


@pytest.mark.parametrize("settings", [SPARSE[0], pytest.param(SPARSE[1], marks=pytest.mark.slow)], ids=str)
def test_a_model_that_gives_its_own_logits_is_trained_alike(settings, make):
    # A micro-batch's loss is a mean of its own, and which completions it has is drawn.
    fused = losses(make(**settings))
    trainer = make(**settings)
    trainer.model.trl_fast_fused_head = False
    assert losses(trainer) == pytest.approx(fused, rel=1e-4)


@pytest.mark.slow
def test_resuming(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "beta": 0.5}
    assert_resumes(lambda folder, **own: make(folder, rollout_engine=None, **{**settings, **own}), tmp_path, (1, 2))


def test_a_server_that_is_lost_loses_no_step(make, tokenizer, teacher_path, tmp_path):
    with teacher_server(teacher_path) as lost:
        trainer = make(teacher_model_server_url=lost.url, save_strategy="steps", save_steps=50, max_steps=4)
        # No time for trying again.
        trainer.server._server.session.adapters.clear()
        from requests.adapters import HTTPAdapter

        trainer.server._server.session.mount("http://", HTTPAdapter())
        ask = trainer.server.ask

        def until_the_third_step(*given):
            if trainer.state.global_step == 2:
                trainer.server._server.base_url = "http://127.0.0.1:9"
            return ask(*given)

        trainer.server.ask = until_the_third_step
        with pytest.raises(ConnectionError, match="teacher_model_server_url: .*127.0.0.1:9.* did not answer") as error:
            trainer.train()
    assert "Step 2 is saved" in error.value.__notes__[0]
    assert (tmp_path / "checkpoint-2").is_dir()
    again = make(max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_mixture_of_experts_keeps_its_router_loss(make, tokenizer):
    trainer = make(model=tiny_model("mixtral"), processing_class=tokenizer, max_steps=1, router_aux_loss_coef=0.5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["aux_loss"] > 0 and log["loss"] > 0.4 * log["aux_loss"]


def test_what_may_be_changed_in_training(make):
    trainer = make()
    assert trainer.teacher_model is None
    trainer.beta, trainer.loss_top_k = 0.0, 4
    assert (trainer.args.beta, trainer.args.loss_top_k) == (0.0, 4)
    with pytest.raises(ValueError, match="loss_top_k=0: a server"):
        trainer.loss_top_k = 0
    samples = trainer.mixture.samples([trainer.train_dataset[0]] * 2, [True] * 2)
    assert trainer._update(samples, 1).ids.shape == (sum(map(len, samples.completion_ids)), 4)
