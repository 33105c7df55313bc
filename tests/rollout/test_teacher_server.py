"""A teacher's server: what it is asked, what is read of its answers, and what is said where they cannot be."""

import math
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import save_tiny_model
from support.teacher_server import teacher_server
from support.tokenizer import build_tokenizer
from support.vllm import fake_server
from trl_fast.rollout.teacher_server import TeacherServer
from trl_fast.settings.server_url import ServerURL

PROMPT, COMPLETION = [5, 6, 7], [8, 9]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("teacher"), build_tokenizer())


def client(server, vocab_size=10**6):
    return TeacherServer(ServerURL(server.url), setting="teacher", timeout=0, vocab_size=vocab_size)


def test_it_tells_what_the_model_says(model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with teacher_server(model_path) as server:
        found = client(server).ask([(PROMPT, COMPLETION)], 3, 0.7)[0].result()
    logprobs = model(torch.tensor([PROMPT + COMPLETION])).logits[0, 2:4].detach().log_softmax(dim=-1)
    wanted = logprobs.topk(3)
    torch.testing.assert_close(found.logprobs, wanted.values)
    assert torch.equal(found.likeliest, wanted.indices)
    torch.testing.assert_close(found.own_logprobs, logprobs[range(2), COMPLETION])
    (body,) = [body for _, path, body in server.requests if path == "/v1/completions"]
    asked = {"prompt": [PROMPT + COMPLETION], "max_tokens": 1, "temperature": 0.7, "prompt_logprobs": 3}
    assert body == {"model": "policy", **asked}


def test_questions_are_asked_side_by_side(model_path):
    waiting = []

    def slow():
        waiting.append(time.monotonic())
        time.sleep(0.3)
        return {"choices": [{"prompt_logprobs": [None, *([{"8": LIKELY}] * 4)]}]}

    with fake_server({"/v1/completions": slow}) as server:
        teacher = client(server)
        asked = teacher.ask([(PROMPT, [8, 8])] * 8, 1, 1.0)
        assert [each.result().own_logprobs.tolist() for each in asked] == [[-0.5, -0.5]] * 8
    assert max(waiting) - min(waiting) < 0.25


LIKELY, RARE = {"logprob": -0.5, "rank": 1}, {"logprob": -4.0, "rank": 90}
ANSWERS = {
    "refused": (
        (400, {"message": "max allowed: 2"}),
        RuntimeError,
        r"answered 400.*start.* --max-logprobs 3 and --max-m",
    ),
    "no vLLM": ({"hello": 1}, RuntimeError, r"JSON with \['choices'\]\[0\]\['prompt_logprobs'\].*is it vLLM's"),
    "too few places": ([{"8": LIKELY}], RuntimeError, r"answered 1 places .*expected 5 with a map from tokens"),
    "other things": ([None] * 4 + ["x"], RuntimeError, "answered 5 places with .*expected 5 with a map from tokens"),
    "no own token": (
        [None, *([{"8": LIKELY}] * 4)],
        *(RuntimeError, "expected a log-prob of the completion's token 9, and of the likeliest one"),
    ),
    "no number": (
        [None, *([{"8": LIKELY, "9": {"logprob": None, "rank": 2}}] * 4)],
        *(RuntimeError, "expected a log-prob of the completion's token 9"),
    ),
    "no rank": ([None, *([{"8": {"logprob": -1.0}}] * 4)], RuntimeError, "expected a rank and a log-prob for each"),
    "own token alone": (
        [None, *([{"8": RARE, "9": RARE}] * 4)],
        *(RuntimeError, "expected a log-prob of the completion's token 8, and of the likeliest one"),
    ),
    "logits": (
        [None, *([{"8": {"logprob": 3.5, "rank": 1}, "9": LIKELY}] * 4)],
        *(RuntimeError, "expected log-probs, which are not above 0; serve without --logprobs-mode"),
    ),
    "no token's number": (
        [None, *([{"-8": RARE, "8": LIKELY, "9": RARE}] * 4)],
        *(RuntimeError, "answered token -8; expected one of the student's 300"),
    ),
    "another tokenizer": (
        [None, *([{"8": LIKELY, "9": RARE, "500": RARE}] * 4)],
        *(RuntimeError, "answered token 500; expected one of the student's 300: serve a teacher with its tokenizer"),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_cannot_be_read(name):
    answer, kind, message = ANSWERS[name]
    body = {"choices": [{"prompt_logprobs": answer}]} if isinstance(answer, list) else answer
    with fake_server({"/v1/completions": body}) as server:
        (asked,) = client(server, vocab_size=300).ask([(PROMPT, COMPLETION)], 3, 1.0)
        with pytest.raises(kind, match=message) as error:
            asked.result()
    assert "\n" not in str(error.value) and str(error.value).startswith("teacher: ") and server.url in str(error.value)


def test_fewer_likely_tokens_than_asked_for():
    with fake_server({"/v1/completions": {"choices": [{"prompt_logprobs": [None, {"8": LIKELY}]}]}}) as server:
        found = client(server).ask([([5], [8])], 3, 1.0)[0].result()
    assert found.logprobs.tolist() == [[-0.5, -math.inf, -math.inf]]


def test_a_server_that_is_gone(monkeypatch):
    with fake_server() as server:
        asked = client(server)
        asked._server.session.adapters.clear()
    with pytest.raises(
        ConnectionError, match=r"did not answer /v1/completions .*go on with train\(resume_from"
    ) as error:
        asked.ask([(PROMPT, COMPLETION)], 1, 1.0)[0].result()
    assert "asked for the 1 likeliest tokens at 2 places after 3 tokens" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_has_not_been_asked_is_not_asked_of_a_server_that_refuses():
    """A run ends with its error, and does not wait for all other answers of the step to be lost too."""
    with fake_server({"/v1/completions": lambda: time.sleep(0.2) or (500, {})}) as server:
        asked = client(server).ask([(PROMPT, COMPLETION)] * 200, 1, 1.0)
        for each in asked:
            with pytest.raises(RuntimeError, match="teacher: .* 500"):
                each.result()
        assert len([path for _, path, _ in server.requests if path == "/v1/completions"]) < 100
