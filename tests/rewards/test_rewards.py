"""Every reward equals TRL's, on answers of every kind."""

import pickle
import sys
import threading

import pytest
import trl.rewards

from trl_fast import rewards

SOLUTIONS = [r"\frac{1}{3}", r"\frac{1}{3}", "$x^2$", "no formula", r"$\boxed{2\text{ cm}}$", "7", r"\{1, 2\}"]
ANSWERS = [
    r"My answer is \boxed{\frac{1}{3}}",
    r"\boxed{\frac{1}{2}}",
    "It is $x^2$.",
    r"\boxed{1}",
    r"\boxed{2 \text{ cm}}",
    "seven",
    r"$\{2, 1\}$",
]
THOUGHTS = ["<think>so \\boxed{7}</think>", "<think>\n</think>\n<think></think>", "", "</think>a</think>", "[end]"]


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def logged(function, *args, **kwargs):
    columns = {}
    return function(*args, log_extra=columns.__setitem__, **kwargs), columns


def test_accuracy():
    pytest.importorskip("math_verify")
    ours = logged(rewards.accuracy_reward, messages(ANSWERS), SOLUTIONS)
    assert ours == logged(trl.rewards.accuracy_reward, messages(ANSWERS), SOLUTIONS)
    assert ours[0][:2] == [1.0, 0.0] and ours[0][3] is None


@pytest.mark.parametrize("delimiters", [None, ["[end]"], ["</think>", "[end]"], ["[end]", "</think>"]])
def test_accuracy_after_reasoning(delimiters):
    pytest.importorskip("math_verify")
    texts = [thought + answer for thought in THOUGHTS for answer in ANSWERS]
    arguments = (messages(texts), SOLUTIONS * len(THOUGHTS), delimiters)
    ours = logged(rewards.reasoning_accuracy_reward, *arguments)
    assert ours == logged(trl.rewards.reasoning_accuracy_reward, *arguments)
    assert 1.0 in ours[0] and 0.0 in ours[0]


def test_accuracy_outside_the_main_thread():
    pytest.importorskip("math_verify")
    results = []
    thread = threading.Thread(
        target=lambda: results.append(rewards.accuracy_reward(messages(ANSWERS), SOLUTIONS)), daemon=True
    )
    thread.start()
    thread.join()
    assert results == [rewards.accuracy_reward(messages(ANSWERS), SOLUTIONS)]


def test_without_math_verify_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for function in (rewards.accuracy_reward, rewards.reasoning_accuracy_reward):
        with pytest.raises(ImportError, match=r"`pip install 'trl-fast\[math\]'`"):
            function(messages(["1"]), ["1"])


def test_think_format():
    texts = [
        "<think>a</think>b",
        "<think>\na\n</think>\n",
        "<think>a<think>b</think>",
        "<think>a</think>b</think>",
        "a<think>b</think>",
        "\n<think>b</think>",
        "<think>a",
        "",
    ]
    ours = rewards.think_format_reward(messages(texts))
    assert ours == trl.rewards.think_format_reward(messages(texts)) and set(ours) == {0.0, 1.0}


IDS = [[1] * length for length in (0, 1, 49, 50, 51, 100, 140)]


@pytest.mark.parametrize("settings", [{}, dict(min_value_wrong=-3, max_value_wrong=-1, min_value_correct=1)])
def test_cosine(settings):
    pytest.importorskip("math_verify")
    ours = rewards.get_cosine_scaled_reward(100, **settings)
    theirs = trl.rewards.get_cosine_scaled_reward(100, **settings)
    for ids in IDS:
        arguments = (messages(ANSWERS), SOLUTIONS, [ids] * len(ANSWERS))
        assert ours(*arguments) == theirs(*arguments)


@pytest.mark.parametrize("size, penalty", [(1, -1.0), (2, -0.5), (3, 0.0)])
def test_repetition(size, penalty):
    ids = [[], [1], [1, 2], [1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1, 2]]
    ours = rewards.get_repetition_penalty_reward(size, penalty)(completion_ids=ids)
    assert ours == trl.rewards.get_repetition_penalty_reward(size, penalty)(completion_ids=ids)


@pytest.mark.parametrize("limit, cache", [(100, 50), (50, 0), (140, 100)])
def test_overlong(limit, cache):
    ours = rewards.get_soft_overlong_punishment(limit, cache)(completion_ids=IDS)
    assert ours == trl.rewards.get_soft_overlong_punishment(limit, cache)(completion_ids=IDS)


def test_rewards_with_settings_are_named_and_pickled_as_trls():
    made = {
        "get_cosine_scaled_reward": (10,),
        "get_repetition_penalty_reward": (),
        "get_soft_overlong_punishment": (10, 5),
    }
    for name, arguments in made.items():
        ours, theirs = (getattr(module, name)(*arguments) for module in (rewards, trl.rewards))
        assert ours.__name__ == theirs.__name__ and pickle.loads(pickle.dumps(ours)) == ours


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rewards.get_repetition_penalty_reward(max_penalty=1), "max_penalty.*1"),
        (lambda: rewards.get_repetition_penalty_reward(0), "ngram_size.*0"),
        (lambda: rewards.get_cosine_scaled_reward(0), "max_len.*0"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_solution_is_named():
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="solution: expected one for each of 2 completions, got 1"):
        rewards.accuracy_reward(messages(["1", "2"]), ["1"])


# What a model or a data set may hold instead of a text.
NASTY = [None, "", [], [{"type": "text", "text": "\\boxed{7}"}], 7, b"7", {"text": "7"}, "x" * 20000, "é\x00\ud800"]
NASTY += ["\\boxed{" * 200, "\\boxed{}", "\\boxed{7}", "$7$</think>", "<think>" * 500, "<think>a</think>\n<think>"]
NASTY_SOLUTIONS = ["7", "", None, 7, "no", "\\frac{1}{0}", "$" * 500, ["7"], 7.5, True]


def outcome(function, *args, **kwargs):
    """The result of a function as text, or the type of the error that it raises."""
    try:
        return repr(function(*args, **kwargs))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward"])
def test_nasty_answers(name):
    pytest.importorskip("math_verify")
    for text in NASTY:
        for solution in NASTY_SOLUTIONS:
            given = (messages([text]), [solution])
            found, expected = (outcome(getattr(module, name), *given) for module in (rewards, trl.rewards))
            assert found == expected, given


@pytest.mark.parametrize(
    "completions", [*(messages([text]) for text in NASTY), [], [[]], [None], [[{"role": "a"}]], None]
)
def test_nasty_formats(completions):
    found, expected = (outcome(module.think_format_reward, completions) for module in (rewards, trl.rewards))
    assert found == expected


LENGTHS = [[], [[]], [[1] * 3], [[1] * 5, [1] * 10, [1] * 11, [1] * 200], [[1, 2] * 40, [1, 2, 3] * 3], None, [None]]


@pytest.mark.parametrize("ids", LENGTHS)
def test_nasty_lengths(ids):
    for limit in (0, 1, 10, 100, -5, 1.5):
        for size in (0, 1, 5, 10, 20, -3, 2.5):
            found, expected = (
                outcome(module.get_soft_overlong_punishment(limit, size), completion_ids=ids)
                for module in (rewards, trl.rewards)
            )
            assert found == expected, (limit, size)
    for size in (1, 2, 3, 10):
        for penalty in (0, -1, -0.5, float("nan"), -float("inf")):
            found, expected = (
                outcome(module.get_repetition_penalty_reward(size, penalty), completion_ids=ids)
                for module in (rewards, trl.rewards)
            )
            assert found == expected, (size, penalty)


def test_texts_instead_of_conversations_are_named():
    for function in (rewards.accuracy_reward, rewards.think_format_reward, rewards.reasoning_accuracy_reward):
        with pytest.raises(
            TypeError, match="expected lists with one message, got texts; give prompts as conversations"
        ):
            function(["text"], solution=["7"])
