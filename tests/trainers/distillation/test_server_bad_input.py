"""Each thing that a teacher's server cannot be asked is named, with its value and a remedy, before training."""

import pytest
from datasets import Dataset
from PIL import Image

import trl_fast
from support.rollouts import color_prompts
from support.training import make_trainer
from support.vllm import fake_server

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}
URL = {"teacher_model_server_url": "http://localhost:1"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 1.5}, r"beta: expected a finite number in \[0, 1\], got 1.5"),
        ({"loss_top_k": 0, "beta": 0.0}, "loss_top_k=0: a server tells of a few tokens only; set their number"),
        ({"loss_top_k": 5}, "loss_top_k=5 with beta=1.0: .* set loss_top_k=1, or beta=0"),
        ({"loss_add_tail": False}, "loss_add_tail=False with loss_top_k=1 and beta=1.0: .* set loss_add_tail=True$"),
        ({"loss_add_tail": False, "beta": 0.0}, "loss_add_tail=False .* or loss_top_k above 1"),
        ({"reverse_kl_top_1_mode": "argmax"}, "reverse_kl_top_1_mode='argmax': .* use 'sampled', or a teacher beside"),
        ({"reverse_kl_top_1_mode": "samples"}, "reverse_kl_top_1_mode='samples' is unknown; .*did you mean 'sampled'"),
        ({"divergence": "tvd"}, "divergence='tvd': .*'jsd' only"),
        ({"teacher_top_k": 3}, "teacher_top_k=3: loss_top_k stands in its place"),
        ({"teacher_model_name_or_path": "big"}, "teacher_model_name_or_path='big': the server runs the teacher"),
        ({"seq_kd": True, "lmbda": 0.5}, "seq_kd=True: the server scores completions only"),
        ({"teacher_server_timeout": -1.0}, "teacher_server_timeout: expected a finite number >= 0"),
        (
            {"teacher_model_server_url": "http://me:secret@host:x"},
            r"teacher_model_server_url='http://\*\*\*@host:x' has a malformed host or port",
        ),
    ],
)
def test_arguments(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        trl_fast.ServerDistillationConfig(str(tmp_path), **{**QUIET, **URL, **settings})
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_password_is_shown_nowhere(tmp_path):
    url = {"teacher_model_server_url": "http://me:secret@host:8000"}
    config = trl_fast.ServerDistillationConfig(str(tmp_path), **QUIET, **url)
    for shown in (str(config), repr(config), config.to_json_string()):
        assert "secret" not in shown
    assert "***@host:8000" in config.to_json_string()


def test_another_temperature_is_said(tmp_path, caplog):
    trl_fast.ServerDistillationConfig(str(tmp_path), **QUIET, **URL, temperature=0.7)
    assert "temperature=0.7 divides the student's logits only" in caplog.text


@pytest.fixture
def refused(model_path, tmp_path):
    def check(message, kind=ValueError, rows=None, model=model_path, **settings):
        arguments = {"model": model, "train_dataset": rows or color_prompts()}
        with pytest.raises(kind, match=message) as error:
            make_trainer(trl_fast, tmp_path, method="ServerDistillation", arguments=arguments, **settings)
        assert "\n" not in str(error.value)

    return check


def test_no_server(refused):
    refused("teacher_model_server_url is missing; set it to the vLLM server that runs the teacher")
    message = "the vLLM server at http://localhost:1 cannot be reached .*or wait longer with teacher_server_timeout"
    refused(message, ConnectionError, teacher_server_timeout=0, **URL)


def test_something_else_than_vllm(refused):
    with fake_server({"/v1/models": {"hello": []}}) as server:
        refused(
            "expected an answer of vLLM's, .*is it vLLM's server", RuntimeError, teacher_model_server_url=server.url
        )


def test_rows(refused):
    with fake_server() as server:
        url = {"teacher_model_server_url": server.url}
        refused("but no 'completion'; where completions are given", rows=color_prompts(), lmbda=0.5, **url)
        refused("the longest prompt of the train dataset", rows=Dataset.from_list([{"prompt": "x " * 999}] * 8), **url)


def test_images(refused, folders):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}], "image": Image.new("RGB", (8, 8))}] * 8)
    with fake_server() as server:
        url = {"teacher_model_server_url": server.url}
        refused(
            "images, which the teacher's server is not sent", NotImplementedError, rows, folders("qwen2_vl"), **url
        )


def test_methods_that_are_never_called(model_path, tmp_path):
    class Subclass(trl_fast.ServerDistillationTrainer):
        def _compute_server_forward_kl_loss(self, *args):
            return 0

    with pytest.raises(ValueError, match=r"defines _compute_server_forward_kl_loss\(\), .* override _compute_loss"):
        Subclass(model_path, trl_fast.ServerDistillationConfig(str(tmp_path), **QUIET), color_prompts())
