"""IWOPDTrainer as a person uses it: it learns, reads what vLLM sampled by, resumes; what cannot be served is named."""

import pytest
import torch
from datasets import Dataset
from PIL import Image

import trl_fast
from support.resuming import assert_resumes
from support.rollouts import FixedEngine, color_prompts
from support.teacher_server import teacher_server
from support.training import make_trainer
from trl_fast.rollout import Rollout

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def make(model_path, teacher_path, tokenizer, tmp_path):
    def trainer(folder=None, **given):
        names = ("model", "teacher_model", "train_dataset", "eval_dataset", "peft_config", "rollout_engine")
        arguments = {"model": model_path, "teacher_model": teacher_path, "train_dataset": color_prompts()}
        arguments |= {"rollout_engine": FixedEngine(tokenizer)}
        arguments |= {name: given.pop(name) for name in names if name in given}
        settings = {"max_completion_length": 8, "max_steps": 2, "max_length": 64, **given}
        return make_trainer(trl_fast, folder or tmp_path, method="IWOPD", arguments=arguments, **settings)

    return trainer


class ByPrompt:
    """An engine whose completions depend on their prompts only, and that says it samples every token by chance."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        found = [[6 + (7 * token) % 200 for token in ids[-5:]] for ids in prompt_ids]
        return Rollout(prompt_ids, found, [[-6.0] * len(ids) for ids in found])


@pytest.mark.slow
def test_tokens_come_to_be_as_likely_as_for_the_teacher(make):
    class Silent(ByPrompt):
        def generate(self, prompt_ids, settings):
            return Rollout(prompt_ids, super().generate(prompt_ids, settings).completion_ids)

    trainer = make(rollout_engine=Silent(), max_steps=40, learning_rate=1e-2, lr_scheduler_type="constant")
    rows = [trainer.train_dataset[index] for index in range(8)]

    def gap():
        batch = trainer._update(trainer.mixture.samples(rows, [True] * 8), 1).batch
        trainer.model.eval()
        found = trainer.policy_logprobs(batch).detach() - trainer.reference_logprobs(batch)
        trainer.model.train()
        return found.abs().mean()

    before = gap()
    trainer.train()
    assert gap() < 0.5 * before


def test_advantages_are_held_against_what_sampled(make):
    trainer = make(rollout_engine=ByPrompt(), max_steps=1, gradient_accumulation_steps=1, iw_opd_gamma=0.0)
    update = trainer._update(trainer.mixture.samples([*trainer.train_dataset.select(range(4))], [True] * 4), 1)
    wanted = trainer.reference_logprobs(update.batch) + 6
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["iw_opd/mean_weight"] == 1 and update.rollout_logprobs.eq(-6).all()
    assert log["iw_opd/mean_abs_advantage"] == pytest.approx(wanted.abs().mean().item(), rel=0.2)


def test_prompts_lose_their_beginning_and_answers_are_not_read(make, tokenizer):
    chat = [{"role": "user", "content": "red " * 30 + "blue?"}, {"role": "assistant", "content": "yes"}]
    rows = Dataset.from_list([{"messages": chat}, {"messages": chat[:1]}] * 4)
    trainer = make(train_dataset=rows, max_length=20)
    first, second = (trainer.train_dataset[index]["prompt_ids"] for index in range(2))
    whole = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)
    whole = whole if isinstance(whole, list) else whole["input_ids"]
    assert first == second == whole[-12:]


def test_prompts_of_given_answers_lose_their_beginning_too(make, tokenizer):
    rows = Dataset.from_list([{"prompt": "red " * 30 + "blue?", "completion": " yes"}] * 4)
    settings = {"distillation_objective": "jsd", "lmbda": 0.5, "loss_top_k": 0}
    trainer = make(train_dataset=rows, max_length=256, max_prompt_length=12, **settings)
    (first, *_) = (row["prompt_ids"] for row in trainer.train_dataset)
    assert first == tokenizer("red " * 30 + "blue?")["input_ids"][-12:]


def test_kinds_of_completions_are_told_apart(make):
    rows = Dataset.from_list([{**row, "completion": f" It is {row['shade'] * 7}"} for row in color_prompts(16)])
    settings = {"distillation_objective": "jsd", "lmbda": 0.5, "max_steps": 2, "gradient_accumulation_steps": 4}
    trainer = make(train_dataset=rows, per_device_train_batch_size=2, loss_top_k=0, **settings)
    trainer.train()
    logged = {name for log in trainer.state.log_history for name in log}
    for kind in ("on_policy", "off_policy"):
        assert {f"{kind}_loss", f"completions/{kind}_mean_length"} <= logged


@pytest.mark.slow
def test_resuming(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "rollout_engine": None}
    assert_resumes(lambda folder, **own: make(folder, **{**settings, **own}), tmp_path, (1, 2))


def test_evaluation_is_on_sampled_completions(make):
    found = make(eval_dataset=color_prompts(4)).evaluate()
    assert {"eval_loss", "eval_iw_opd/mean_weight"} <= found.keys()


def test_a_served_teacher_says_what_one_beside_the_student_does(make, teacher_path):
    def losses(**given):
        trainer = make(**given)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [log[name] for log in logs for name in ("loss", "grad_norm", "iw_opd/mean_advantage")]

    with teacher_server(teacher_path) as server:
        url = {"use_teacher_server": True, "teacher_model_server_url": server.url}
        assert losses(teacher_model=None, **url) == pytest.approx(losses(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lmbda": 0.5}, "lmbda=0.5 with distillation_objective='iw_opd'.*set lmbda=1"),
        ({"reverse_kl_top_1_mode": "argmax"}, "reverse_kl_top_1_mode='argmax' with distillation_objective='iw_opd'"),
        ({"distillation_objective": "kl"}, "distillation_objective='kl' is unknown; expected one of iw_opd, jsd"),
        ({"iw_opd_gamma": -1.0}, "iw_opd_gamma: expected a finite number >= 0, got -1.0"),
        ({"iw_opd_epsilon": 0.0}, "iw_opd_epsilon: expected"),
        ({"max_length": 512}, "max_completion_length=512 with max_length=512 leaves no token for a prompt"),
        ({"num_generations": 3}, "num_generations=3 does not divide"),
        ({"generation_batch_size": 3}, "generation_batch_size=3 prompts with num_generations=1 are not the 8"),
        ({"vllm_sync_frequency": 2}, "vllm_sync_frequency=2: .*leave it at 1"),
        ({"use_teacher_server": True}, "use_teacher_server=True: teacher_model_server_url is missing"),
        (
            {"use_teacher_server": True, "teacher_model_server_url": "http://h:1", "loss_top_k": 3},
            "loss_top_k=3 with beta=1.0",
        ),
        ({"distillation_objective": "jsd", "loss_add_tail": False}, "loss_add_tail=False with loss_top_k=1"),
    ],
)
def test_arguments(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        trl_fast.IWOPDConfig(str(tmp_path), **QUIET, **settings)
    assert "\n" not in str(error.value)


def test_what_is_not_served(tmp_path, make, folders):
    with pytest.raises(NotImplementedError, match="loss_top_k=1 with beta=0.5: .* set loss_top_k=0 to compare all"):
        trl_fast.IWOPDConfig(str(tmp_path), **QUIET, distillation_objective="jsd", beta=0.5)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}], "image": Image.new("RGB", (8, 8))}] * 8)
    with pytest.raises(NotImplementedError, match="images, which are not served; use DistillationTrainer"):
        make(model=folders("qwen2_vl"), train_dataset=rows, teacher_model=folders("qwen2_5_vl"))


def test_arguments_that_are_not_used_are_said(make, teacher_path, tmp_path, model_path, caplog):
    with pytest.raises(ValueError, match="compute_metrics: no logits are kept"):
        trl_fast.IWOPDTrainer(model_path, teacher_path, compute_metrics=print)
    trl_fast.IWOPDConfig(str(tmp_path), **QUIET, teacher_model_server_url="http://h:1")
    assert "teacher_model_server_url has no effect without use_teacher_server=True" in caplog.text


def test_what_may_be_changed_in_training(make):
    trainer = make()
    trainer.iw_opd_gamma = 2.0
    assert trainer.args.iw_opd_gamma == 2.0 and trainer.teacher_model is trainer.ref_model
    with pytest.raises(ValueError, match="iw_opd_epsilon: expected"):
        trainer.iw_opd_epsilon = 0.0
    assert torch.is_tensor(next(trainer.teacher_model.parameters()))
