"""A student learns from a real teacher: the demo is its own judge."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.demo_distillation import main, make_student, questions
from support.models import tiny_model


@pytest.mark.slow
def test_the_held_out_divergence_falls(tmp_path):
    assert main(["--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_a_student_has_some_of_its_teachers_layers():
    teacher = tiny_model("llama")
    student = make_student(teacher, 1)
    assert isinstance(student, type(AutoModelForCausalLM.from_config(teacher.config)))
    own, whole = student.state_dict(), teacher.state_dict()
    assert own.keys() < whole.keys()
    assert all(torch.equal(own[name], whole[name]) for name in own)


def test_no_topic_is_in_both_splits():
    asked = questions()
    texts = {split: {prompt[0]["content"] for prompt in prompts} for split, prompts in asked.items()}
    assert not texts["train"] & texts["test"] and len(texts["test"]) == 24
