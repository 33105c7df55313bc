"""Each thing that SDPO cannot learn from is named, with its value and a remedy, before training."""

import pytest
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM

import trl_fast
from support.rewarded_prompts import prompts_with_feedback, short
from support.training import make_trainer

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"distillation_weight": 1.5}, r"distillation_weight: expected a finite number in \[0, 1\], got 1.5"),
        ({"distillation_alpha": 0.5}, "distillation_alpha=0.5 with distillation_mode='sampled_token'"),
        ({"distillation_mode": "topk_logits"}, "distillation_topk is missing"),
        ({"loss_type": "cispo"}, "loss_type='cispo' is unknown; expected one of grpo, bnpo, dr_grpo, dapo"),
        ({"scale_rewards": "groups"}, "scale_rewards='groups' is unknown; expected one of group, batch, none"),
        ({"max_reprompt_len": 0}, "max_reprompt_len: expected an integer >= 1"),
        ({"success_reward_threshold": float("nan")}, "success_reward_threshold: expected"),
        ({"diagnostics_warning_interval": -1}, "diagnostics_warning_interval: expected"),
        (
            {"solution_template": "{solution}"},
            r"solution_template='\{solution\}' cannot be filled in \(KeyError.*\{successful_previous_attempt\}",
        ),
        ({"feedback_template": None}, "feedback_template=None cannot be filled in"),
        ({"reprompt_template": "{prompt.x} {prompt[x]}"}, "reprompt_template=.* cannot be filled in"),
        ({"reprompt_template": "{prompt[x]}"}, "reprompt_template=.* cannot be filled in"),
        ({"reprompt_template": "{prompt} {"}, "reprompt_template=.* other braces are written twice"),
    ],
)
def test_arguments(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        trl_fast.SDPOConfig(str(tmp_path), **QUIET, **settings)
    assert "\n" not in str(error.value)


def test_what_has_no_effect_is_said(tmp_path, caplog):
    trl_fast.SDPOConfig(str(tmp_path), beta=0.1, distillation_add_tail=True, **QUIET)
    assert "beta=0.1 has no effect" in caplog.text and "distillation_add_tail=True has no effect" in caplog.text


def test_older_scales(tmp_path):
    scales = [
        trl_fast.SDPOConfig(str(tmp_path), scale_rewards=given, **QUIET).scale_rewards for given in (True, False)
    ]
    assert scales == ["group", "none"]


@pytest.fixture
def refused(model_path, tmp_path):
    def check(message, kind=ValueError, settings=None, **changes):
        rows = prompts_with_feedback()
        arguments = {"model": model_path, "reward_funcs": short, "train_dataset": rows, **changes}
        with pytest.raises(kind, match=message) as error:
            make_trainer(trl_fast, tmp_path, method="SDPO", arguments=arguments, **{**settings} if settings else {})
        assert "\n" not in str(error.value)

    return check


def test_no_rewards(refused):
    refused("reward_funcs", reward_funcs=None)


def test_a_prompt_that_ends_with_an_answer(refused):
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"}]
    rows = Dataset.from_list([{"prompt": given, "shade": 0} for given in (chat[:1], chat[:1], chat)])
    where = "The train dataset, row 2, column 'prompt'"
    refused(f"{where}: the last message is of 'assistant'.*end the prompt with one", train_dataset=rows)


def test_images(refused, folders):
    chat = [{"role": "user", "content": "What?"}]
    rows = Dataset.from_list([{"prompt": chat, "image": Image.new("RGB", (8, 8)), "shade": 0}] * 8)
    refused("has images", NotImplementedError, model=folders("qwen2_vl"), train_dataset=rows)


ADAPTERS = {
    "virtual tokens": (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "live", "use LoRA"),
    "saved modules": (
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        *("ema", "teacher_model_kind='ema' with an adapter averages LoRA's weights"),
    ),
    "biases": (
        LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM"),
        *(
            "ema",
            "teacher_model_kind='ema' with an adapter averages LoRA's weights.* and bias",
        ),
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, refused):
    peft_config, kind, message = ADAPTERS[name]
    settings = {"teacher_model_kind": kind, "num_generations": 4, "max_completion_length": 8}
    refused(message, settings=settings, peft_config=peft_config)


def test_an_adapter_of_the_teachers_name(refused, model_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config, adapter_name="teacher")
    settings = {"num_generations": 4, "max_completion_length": 8}
    refused("model: it has an adapter of the name 'teacher' already", model=adapted, settings=settings)


def test_methods_that_are_never_called(model_path, tmp_path):
    class Subclass(trl_fast.SDPOTrainer):
        def _compute_policy_loss(self, inputs, student_logits):
            return 0

    config = trl_fast.SDPOConfig(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match=r"defines _compute_policy_loss\(\), .* override _compute_loss\(\) instead"):
        Subclass(model_path, short, config, prompts_with_feedback())
