"""The contexts of SDPO's teacher: which completion and which feedback it is told of, and in which words."""

from dataclasses import dataclass

import pytest
import torch

from trl_fast.trainers.self_distillation.contexts import Context, choose_contexts, context_metrics, teacher_prompt

NONE = float("nan")


@dataclass
class Settings:
    use_successful_as_teacher: bool = True
    success_reward_threshold: float = 1.0
    dont_reprompt_on_self_success: bool = True
    include_environment_feedback: bool = False
    environment_feedback_only_without_solution: bool = False
    remove_thinking_from_demonstration: bool = False
    reprompt_template: str = "{prompt}|{solution}|{feedback}"
    solution_template: str = "solved by {successful_previous_attempt}"
    feedback_template: str = "wrong: {feedback_raw}"


def demonstrations(rewards, **settings):
    contexts = choose_contexts(torch.tensor(rewards), [None] * len(rewards), 3, Settings(**settings))
    return [each.demonstration for each in contexts]


def test_the_first_other_success_of_the_group_is_shown():
    rewards = [0.0, 1.0, 2.0, 0.0, 0.0, 1.0, 0.5, NONE, 0.9]
    assert demonstrations(rewards) == [1, 2, 1, 5, 5, None, None, None, None]
    assert demonstrations(rewards, dont_reprompt_on_self_success=False) == [1, 1, 1, 5, 5, 5, None, None, None]
    assert demonstrations(rewards, success_reward_threshold=0.9) == [1, 2, 1, 5, 5, None, 8, 8, None]
    assert demonstrations(rewards, use_successful_as_teacher=False) == [None] * 9


FEEDBACK = {
    (): [None, None, None],
    ("include_environment_feedback",): ["no", "no", None],
    ("include_environment_feedback", "environment_feedback_only_without_solution"): [None, "no", None],
}


@pytest.mark.parametrize("switches", FEEDBACK)
def test_feedback_is_shown_where_that_is_asked_for(switches):
    settings = Settings(**dict.fromkeys(switches, True))
    contexts = choose_contexts(torch.tensor([0.0, 1.0, 0.0]), ["no", "no", "  "], 3, settings)
    assert [each.feedback for each in contexts] == FEEDBACK[switches]
    assert [each.demonstration for each in contexts] == [1, None, 1]


def test_shares():
    contexts = [Context(1, "no"), Context(), Context(None, "no"), Context(2), Context(), Context()]
    rewards, feedbacks = torch.tensor([0.0, 1.0, 0.0, 0.0, NONE, 0.0]), ["no", None, "no", "no", 3, " "]
    assert context_metrics(contexts, rewards, feedbacks, 3, 1.0) == {
        "self_distillation/success_group_fraction": 0.5,
        "self_distillation/success_sample_fraction": 2 / 6,
        "self_distillation/feedback_available_fraction": 3 / 6,
        "self_distillation/feedback_used_fraction": 2 / 6,
        "self_distillation/reprompt_sample_fraction": 3 / 6,
    }


def test_words():
    settings = Settings(remove_thinking_from_demonstration=True)
    thought = "<think>hm\nhm</think> It is 4. <think></think>"
    assert teacher_prompt("2+2?", thought, "5", settings) == "2+2?|solved by It is 4.|wrong: 5"
    assert teacher_prompt("2+2?", thought, None, Settings()) == f"2+2?|solved by {thought}|"
    assert teacher_prompt("{x}", None, "{y}", settings) == "{x}||wrong: {y}"


def test_the_last_message_tells_more():
    first = {"role": "system", "content": "Count."}
    parts = [{"type": "text", "text": "2+2"}, {"type": "text", "text": "= ?"}]
    prompt = [first, {"role": "user", "content": parts}]
    assert teacher_prompt(prompt, "4", None, Settings()) == [
        first,
        {"role": "user", "content": "2+2 = ?|solved by 4|"},
    ]
    with pytest.raises(ValueError, match=r"prompt: the last message is of 'assistant'.*end the prompt with one"):
        teacher_prompt([*prompt, {"role": "assistant", "content": "Hm"}], "4", None, Settings())
