"""A run that goes on from a checkpoint is the unbroken run: weights, optimizer, random numbers and logs."""

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trl_fast
from support.families import FAMILIES
from support.models import tiny_model
from support.resuming import assert_resumes
from support.rollouts import color_prompts
from support.supervised import sft_rows
from support.training import color_labels, color_pairs, make_trainer
from trl_fast.trainers import BEMACallback
from trl_fast.trainers.online.completions_log import CompletionsLog

# Epochs of three optimizer steps, the last one of fewer micro-batches; checkpoints between two logs.
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-2,
}
# Within the first epoch, at its end, within the second one.
STEPS = (1, 3, 4)
ONLINE = {"num_generations": 2, "max_completion_length": 4, "temperature": 0.9}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3}


def slow(method):
    return pytest.param(method, marks=pytest.mark.slow)


def judge(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def arguments_of(method, paths, tokenizer):
    policy, classifier = paths
    if method == "SFT":
        return {"model": policy, "train_dataset": sft_rows("prompt and completion", 11)}
    if method == "DPO":
        return {"model": policy, "train_dataset": color_pairs(11)}
    if method == "KTO":
        return {"model": policy, "train_dataset": color_labels(11)}
    if method == "Reward":
        return {"model": classifier, "train_dataset": color_pairs(11), "processing_class": tokenizer}
    if method == "PPO":
        return {
            "model": AutoModelForCausalLM.from_pretrained(policy),
            "processing_class": tokenizer,
            "reward_model": judge,
            "value_model": AutoModelForSequenceClassification.from_pretrained(classifier),
            "train_dataset": color_prompts(13),
        }
    return {"model": policy, "reward_funcs": judge, "train_dataset": color_prompts(7)}


@pytest.fixture
def resumes(model_path, reward_model_path, tokenizer, tmp_path):
    def resumes(method, steps=STEPS, arguments=None, **changes):
        settings = {**SETTINGS, **changes}
        if method in ("GRPO", "RLOO"):
            settings = {**ONLINE, **settings}
        if method == "PPO":
            settings = {"response_length": 4, "num_ppo_epochs": 2, "num_sample_generations": 0, **settings}

        def make(folder, **more):
            given = arguments_of(method, (model_path, reward_model_path), tokenizer)
            given |= {} if arguments is None else arguments()
            return make_trainer(trl_fast, folder, method=method, arguments=given, **settings | more)

        assert_resumes(make, tmp_path, steps)

    return resumes


# Two methods from each place; the others, whose checkpoints are read by the same code, from one of the three.
PLACES = {"SFT": (3,), "DPO": STEPS, "KTO": (4,), "Reward": (1,), "GRPO": STEPS, "RLOO": STEPS, "PPO": STEPS}


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "Reward", "GRPO", *map(slow, ("RLOO", "PPO"))])
def test_in_the_middle_of_an_epoch_after_it_and_between_logs(method, resumes):
    resumes(method, PLACES[method])


@pytest.mark.parametrize("method", ["DPO", *map(slow, ("SFT", "KTO", "Reward"))])
def test_dropout_of_an_adapter_and_evaluations_between(method, resumes, model_path, reward_model_path, tokenizer):
    def more():
        task = "SEQ_CLS" if method == "Reward" else "CAUSAL_LM"
        given = arguments_of(method, (model_path, reward_model_path), tokenizer)
        return {"peft_config": LoraConfig(**LORA, task_type=task), "eval_dataset": given["train_dataset"]}

    resumes(method, (3, 4), more, disable_dropout=False, eval_strategy="steps", eval_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GRPO", "PPO"])
def test_evaluations_of_online_methods(method, resumes):
    def more():
        return {"eval_dataset": color_prompts(4)}

    resumes(method, (3, 4), more, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4)


@pytest.mark.parametrize("method", ["DPO", slow("GRPO")])
def test_a_reference_that_follows(method, resumes):
    resumes(method, (3,), sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5, beta=0.1)


def test_adaptive_weights(resumes):
    resumes("GRPO", (4,), use_adaptive_entropy=True, entropy_coef=0.1, entropy_coef_delta=0.03, entropy_target=3.0)
    # The folder has another method's checkpoints now.
    resumes("PPO", (4,), kl_target=0.5, kl_horizon=50)


@pytest.mark.parametrize("case", [{"num_iterations": 2}, {"steps_per_generation": 6}], ids=str)
def test_within_a_generation_between_logs(case, resumes):
    resumes("GRPO", (3,), beta=0.1, **case)


def test_averaged_weights_of_a_callback(resumes):
    kept: list = []

    def more():
        kept.append(BEMACallback(update_freq=2, update_after=1))
        return {"callbacks": [kept[-1]]}

    resumes("SFT", (4,), more)
    whole, resumed = (callback.running_model.state_dict() for callback in kept)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("workers", [2])
def test_workers_of_the_data_loader(workers, resumes):
    resumes("SFT", (4,), dataloader_num_workers=workers)


def test_rows_grouped_by_length(resumes):
    resumes("SFT", (2, 4), train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("method", ["SFT", "DPO"])
def test_a_stream_within_its_first_pass(method, resumes, model_path, tokenizer):
    def more():
        rows = arguments_of(method, (model_path, None), tokenizer)["train_dataset"]
        return {"train_dataset": rows.to_iterable_dataset()}

    resumes(method, (1, 2), more, max_steps=3)


def test_the_table_of_completions_within_a_generation(resumes, tmp_path, monkeypatch):
    frames: list = []
    monkeypatch.setattr(CompletionsLog, "save", lambda self, folder, step: frames.append(self.frame(step)))
    resumes("GRPO", (3,), num_iterations=2, log_completions=True, log_unique_prompts=True, logging_steps=1)
    # Of the unbroken run's logs the last ones, and those of the resumed run; each has one more at its end.
    for whole, resumed in zip(frames[3:6], frames[6:], strict=True):
        assert len(whole)
        pd.testing.assert_frame_equal(whole, resumed, check_dtype=False)


@pytest.mark.parametrize("family", ["nemotron_h", slow("qwen3_moe"), slow("olmo_hybrid")])
def test_weights_that_are_written_under_other_names(family, tokenizer, tmp_path):
    """transformers writes them as the family is published, and reads them by the model's own names."""

    def make(**settings):
        model = tiny_model(family, vocab_size=len(tokenizer), **FAMILIES[family])
        arguments = {"model": model, "processing_class": tokenizer, "train_dataset": color_pairs(8)}
        arguments["eval_dataset"] = color_pairs(2)
        return make_trainer(trl_fast, tmp_path, arguments=arguments, **{**SETTINGS, "max_steps": 2, **settings})

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name

    # The highest loss is the first one, so the last weights are not the best ones.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make(eval_strategy="steps", eval_steps=1, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    wanted = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(weight, trainer.model.state_dict()[name]) for name, weight in wanted.items())
