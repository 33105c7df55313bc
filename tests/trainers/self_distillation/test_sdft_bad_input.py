"""Each thing that a model cannot be taught by itself is named, with its value and a remedy, before training."""

import pytest
from datasets import Dataset

import trl_fast
from support.told_prompts import told_prompts
from support.training import make_trainer

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"distillation_alpha": 1.5}, r"distillation_alpha: expected a finite number in \[0, 1\], got 1.5"),
        ({"distillation_topk": 0}, "distillation_topk: expected an integer >= 1"),
        ({"distillation_topk": None}, "distillation_topk is missing"),
        (
            {"distillation_mode": "topk_logit"},
            "distillation_mode='topk_logit' is unknown; expected one of .*did you mean",
        ),
        ({"distillation_mode": "sampled_token"}, "distillation_alpha=0.5 with distillation_mode='sampled_token'"),
        ({"distillation_is_clip": 0.0}, "distillation_is_clip: expected"),
        ({"teacher_model_kind": "old"}, "teacher_model_kind='old' is unknown; expected one of live, base, ema"),
        ({"teacher_update_rate": 2.0}, "teacher_update_rate: expected"),
        ({"num_loss_tokens_to_skip": -1}, "num_loss_tokens_to_skip: expected"),
        ({"teacher_prompt_template": "{prompt}"}, "lacks a place; expected both {prompt} and {privileged_context}"),
        (
            {"teacher_prompt_template": "{x}{prompt}{privileged_context}"},
            "cannot be filled in .*KeyError.*write other",
        ),
        ({"teacher_prompt_template": None}, "teacher_prompt_template=None cannot be filled in"),
        ({"teacher_prompt_template": "{prompt.x}{privileged_context}"}, "cannot be filled in .*AttributeError"),
        ({"num_generations": 3}, "num_generations=3 does not divide"),
    ],
)
def test_arguments(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl_fast.SDFTConfig(str(tmp_path), **QUIET, **settings)


def test_a_teacher_on_a_server(tmp_path):
    with pytest.raises(NotImplementedError, match="use_teacher_server=True: .* set it to False"):
        trl_fast.SDFTConfig(str(tmp_path), use_teacher_server=True, **QUIET)


@pytest.fixture
def refused(model_path, tmp_path):
    def check(message, kind=ValueError, settings=None, **changes):
        arguments = {"model": model_path, "train_dataset": told_prompts(), **changes}
        with pytest.raises(kind, match=message) as error:
            make_trainer(trl_fast, tmp_path, method="SDFT", arguments=arguments, **(settings or {}))
        assert "\n" not in str(error.value)

    return check


ROW = {"prompt": "What?", "privileged_context": "This."}
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"}]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "What?"}, r"has the columns \['prompt', .*\]; expected 'privileged_context' beside 'prompt'"),
        ({"privileged_context": "This."}, "expected 'prompt'"),
        ({**ROW, "privileged_context": None}, "row 0, column 'privileged_context': it is empty.* fill it"),
        (
            {**ROW, "prompt": CHAT},
            "row 0, column 'prompt': the last message is of 'assistant'.*end the prompt with one",
        ),
        ({**ROW, "prompt": "What? " * 999}, r"the longest prompt of the train dataset has \d+ tokens"),
        ({**ROW, "privileged_context": "This. " * 999}, r"the longest prompt of the train dataset has \d+ tokens"),
    ],
)
def test_rows(row, message, refused):
    settings = {"num_generations": 2, "max_prompt_length": None}
    refused(message, train_dataset=Dataset.from_list([row] * 8), settings=settings)


def test_more_tokens_than_there_are(refused):
    settings = {"distillation_topk": 100_000, "num_generations": 2}
    refused(r"distillation_topk=100000 is more than the \d+ tokens of the vocabulary", settings=settings)


def test_methods_that_are_never_called(model_path, tmp_path):
    class Subclass(trl_fast.SDFTTrainer):
        def sample_rollouts(self, inputs):
            return {}

    with pytest.raises(ValueError, match=r"defines sample_rollouts\(\), .* give a rollout_engine instead"):
        Subclass(model_path, trl_fast.SDFTConfig(str(tmp_path), **QUIET), told_prompts())
