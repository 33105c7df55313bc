"""NaN and infinity in training: shown in the log, named with their step, never saved, and no success."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

import trl_fast
from support.rollouts import color_prompts
from support.supervised import sft_rows
from support.training import color_pairs, make_trainer
from trl_fast.ops.validation import NotFiniteError
from trl_fast.trainers.base.divergence import PATIENCE, READ_EVERY, SCALING_PATIENCE, DivergedError, DivergenceWatch

LAST = "model.layers.1.mlp.down_proj.weight"
LOGGER = "trl_fast.trainers.base.divergence"


def spoil(model, name=LAST, value=float("nan")):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    return model


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


# ---- weights that are broken from the start


def test_broken_weights_are_named_before_training(model_path, reward_model_path, tokenizer, tmp_path):
    cases = {
        "SFT": {"model": spoil(load(model_path)), "train_dataset": sft_rows("text", 4)},
        "DPO": {"model": spoil(load(model_path), value=math.inf), "train_dataset": color_pairs(4)},
        "PPO": {
            "model": spoil(load(model_path)),
            "processing_class": tokenizer,
            "reward_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
            "train_dataset": color_prompts(16),
        },
    }
    for method, arguments in cases.items():
        with pytest.raises(
            NotFiniteError, match=f"LlamaForCausalLM .*: 1 parameters hold NaN or infinity, first '{LAST}"
        ):
            make_trainer(trl_fast, tmp_path, method=method, arguments=arguments)


def test_a_broken_reference_value_model_and_adapter(model_path, reward_model_path, tokenizer, tmp_path):
    value_model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    peft_model = get_peft_model(load(model_path), LoraConfig(target_modules=["q_proj"]))
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    cases = [
        ("DPO", {"model": model_path, "ref_model": spoil(load(model_path)), "train_dataset": color_pairs(4)}, LAST),
        ("SFT", {"model": spoil(peft_model, lora), "train_dataset": sft_rows("text", 4)}, lora),
        (
            "PPO",
            {
                "model": load(model_path),
                "processing_class": tokenizer,
                "reward_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
                "value_model": spoil(value_model, "score.weight"),
                "train_dataset": color_prompts(16),
            },
            "score.weight",
        ),
    ]
    for method, arguments, name in cases:
        with pytest.raises(NotFiniteError, match=f"first '{name}'; these weights are broken"):
            make_trainer(trl_fast, tmp_path, method=method, arguments=arguments)


# ---- weights that break in the course of it


def sft(model_path, folder, **settings):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 16)}
    settings = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 100, **settings}
    return make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **settings)


def break_gradients(trainer, step, value=float("nan")):
    """The gradient of one weight has a bad number in one step; the loss is as ever."""

    def hook(gradient):
        return gradient * value if trainer.state.global_step + 1 == step else gradient

    trainer.model.get_parameter(LAST).register_hook(hook)


def break_losses(trainer, steps):
    """The loss of some steps is NaN; its gradient is as ever."""
    compute_loss = trainer.compute_loss

    def compute(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss + float("nan") if trainer.state.global_step + 1 in steps else loss

    trainer.compute_loss = compute


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_ends_on_broken_weights_and_the_last_good_checkpoint_stays(value, model_path, tmp_path):
    trainer = sft(model_path, tmp_path, max_steps=8, save_steps=2, save_total_limit=1)
    break_gradients(trainer, 3, value)
    with pytest.raises(DivergedError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(
        f"step 3: the gradient's norm was {value}; weights are NaN or infinite since then, first "
    )
    assert "none of them was saved. Lower learning_rate" in message and "\n" not in message
    assert message.endswith(f"go on from {tmp_path}/checkpoint-2.")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(torch.isfinite(weight).all() for weight in load(tmp_path / "checkpoint-2").parameters())
    norms = logged(trainer, "grad_norm")
    assert math.isfinite(norms[1]) and not math.isfinite(norms[2])


def test_steps_are_looked_at_a_few_at_a_time(model_path, tmp_path):
    trainer = sft(model_path, tmp_path, max_steps=40, save_strategy="no")
    break_gradients(trainer, 2)
    with pytest.raises(DivergedError, match=r"^step 2: the gradient's norm was nan; .* and start again\.$"):
        trainer.train()
    assert trainer.state.global_step == READ_EVERY
    losses = logged(trainer, "loss")
    assert math.isfinite(losses[1]) and all(map(math.isnan, losses[2:]))


def test_a_run_shorter_than_that_is_no_success_either(model_path, tmp_path):
    trainer = sft(model_path, tmp_path, max_steps=2, save_strategy="no")
    break_gradients(trainer, 2)
    with pytest.raises(DivergedError, match="^step 2: the gradient's norm was nan; weights are NaN"):
        trainer.train()


def test_a_learning_rate_far_too_large(model_path, tmp_path):
    trainer = sft(model_path, tmp_path, max_steps=30, learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(DivergedError, match="^step 2: the loss was (nan|inf)"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not math.isfinite(logged(trainer, "loss")[1])


def test_a_loss_of_nan_that_breaks_nothing_is_named_once_and_shown_once(model_path, tmp_path, caplog):
    trainer = sft(model_path, tmp_path, max_steps=14)
    break_losses(trainer, {3, 12})
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer.train()
    lines = [record.message for record in caplog.records if record.name == LOGGER]
    assert lines == [
        f"step 3: the loss was nan; the weights are still numbers. {PATIENCE} such steps in a row end the training."
    ]
    assert [index + 1 for index, loss in enumerate(logged(trainer, "loss")) if math.isnan(loss)] == [3, 12]
    assert (tmp_path / "checkpoint-14").is_dir()


def test_losses_that_stay_nan_are_no_success(model_path, tmp_path):
    trainer = sft(model_path, tmp_path / "long", max_steps=40)
    break_losses(trainer, range(5, 100))
    with pytest.raises(
        DivergedError, match=f"^step 5: the loss was nan; so it was in all {PATIENCE + 6} steps up to 20"
    ):
        trainer.train()
    trainer = sft(model_path, tmp_path / "short", max_steps=3)
    break_losses(trainer, {2, 3})
    with pytest.raises(DivergedError, match="^step 2: the loss was nan; training ended with it"):
        trainer.train()


def test_the_filter_may_be_asked_for(model_path, tmp_path):
    trainer = sft(model_path, tmp_path, max_steps=3, logging_nan_inf_filter=True)
    break_losses(trainer, {2})
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "loss")))


def test_a_broken_checkpoint_is_named(model_path, tmp_path):
    sft(model_path, tmp_path, max_steps=1).train()
    spoil(load(tmp_path / "checkpoint-1")).save_pretrained(tmp_path / "checkpoint-1")
    trainer = sft(model_path, tmp_path, max_steps=2)
    with pytest.raises(NotFiniteError, match=f"^resume_from_checkpoint: the checkpoint of step 1 .* first '{LAST}'"):
        trainer.train(resume_from_checkpoint=True)


ONLINE = {
    "GRPO": {"num_generations": 4, "max_completion_length": 4},
    "PPO": {"response_length": 4, "stop_token": "eos", "num_ppo_epochs": 1},
}


def online(method, model_path, folder, **settings):
    reward = lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]  # noqa: E731
    arguments = {"model": model_path, "train_dataset": color_prompts(16)}
    arguments["reward_model" if method == "PPO" else "reward_funcs"] = reward
    settings = {"gradient_accumulation_steps": 1, **ONLINE[method], **settings}
    return make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)


# Nothing is due to be saved: the next generation fails, and saves what is whole; and what is due is not begun.
@pytest.mark.parametrize("saving", [{"save_steps": 100}, {"save_steps": 2}, {"save_strategy": "epoch"}], ids=str)
@pytest.mark.parametrize("method", ONLINE)
def test_broken_weights_that_generate_or_are_due_name_their_step_and_are_not_saved(
    method, saving, model_path, tmp_path
):
    saving = {"save_strategy": "steps", "max_steps": 4, **saving}
    if saving["save_strategy"] == "epoch":
        saving |= {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    trainer = online(method, model_path, tmp_path, **saving)
    break_gradients(trainer, 2)
    with pytest.raises(DivergedError, match="^step 2: .*weights are NaN or infinite since then"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_callback_that_saves_cannot_save_them_either(model_path, tmp_path):
    class SavesAlways(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    trainer = sft(model_path, tmp_path, max_steps=8)
    trainer.add_callback(SavesAlways())
    break_gradients(trainer, 3)
    with pytest.raises(DivergedError, match="^step 3: "):
        trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_the_value_model_is_watched(max_grad_norm, model_path, tmp_path):
    trainer = online("PPO", model_path, tmp_path, max_steps=1, max_grad_norm=max_grad_norm)
    trainer.value_model.score.weight.register_hook(lambda gradient: gradient * float("nan"))
    message = "^step 1: the gradient's norm was nan; weights .*'(score.weight|model.embed_tokens.weight)'"
    with pytest.raises(DivergedError, match=message):
        trainer.train()


# ---- float16, whose loss scaling leaves steps out


def watch_steps(steps, model=None):
    """A watch that has seen (loss, norm, skipped) of some steps."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, _: tensor)
    trainer = SimpleNamespace(
        accelerator=accelerator, model=model or torch.nn.Linear(2, 2), args=SimpleNamespace(output_dir="nowhere")
    )
    watch, state = DivergenceWatch(trainer), TrainerState()
    watch.on_train_begin(None, state, None)
    for loss, norm, accelerator.optimizer_step_was_skipped in steps:
        state.global_step += 1
        watch.see_loss(torch.tensor(loss))
        watch.see_norm(norm)
        watch.on_step_end(None, state, TrainerControl())
    watch.finish()


GOOD, SKIPPED = (1.0, torch.tensor(2.0), False), (1.0, torch.tensor(math.inf), True)


def test_steps_left_out_by_loss_scaling_are_normal(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        watch_steps([SKIPPED] * (SCALING_PATIENCE - 1) + [GOOD] * 5 + [SKIPPED] * 3)
        watch_steps([(1.0, math.nan, True), (math.nan, math.nan, True), GOOD, (1.0, None, False)])
    assert not caplog.records


def test_loss_scaling_that_never_ends_is_no_success():
    with pytest.raises(DivergedError, match="^step 3: the gradient's norm was inf; so it was in all 2[5-9] steps"):
        watch_steps([GOOD, GOOD] + [SKIPPED] * 40)


def test_a_bad_step_after_skipped_ones_is_the_one_that_is_named():
    model = torch.nn.Linear(2, 2)
    model.bias.data[0] = math.inf
    with pytest.raises(DivergedError, match="^step 3: the loss was inf and the gradient's norm was nan; .*'bias'"):
        watch_steps([GOOD, SKIPPED, (math.inf, math.nan, False), SKIPPED], model)


def test_an_update_that_breaks_weights_after_a_good_step_is_not_saved(model_path, tmp_path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                spoil(kwargs["model"])

    trainer = sft(model_path, tmp_path, max_steps=3, save_steps=1)
    trainer.add_callback(Break())
    with pytest.raises(DivergedError, match="^step 3: its update made weights NaN or infinite, first 'model.layers"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    trainer = sft(model_path, tmp_path / "unsaved", max_steps=3, save_strategy="no")
    trainer.add_callback(Break())
    with pytest.raises(DivergedError, match="and start again"):
        trainer.train()


def test_saving_broken_weights_is_said(model_path, tmp_path, caplog):
    trainer = sft(model_path, tmp_path)
    trainer.save_model(str(tmp_path / "good"))
    assert not caplog.text
    spoil(trainer.model)
    trainer.save_model(str(tmp_path / "bad"))
    said = f"The model that is saved to {tmp_path}/bad is broken: 1 parameters hold NaN or infinity, first {LAST!r}."
    assert said in caplog.text
