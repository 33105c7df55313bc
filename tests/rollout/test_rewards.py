"""Reward functions and models: TRL's results, and every wrong answer named."""

import asyncio
import functools
import logging
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from support.models import save_tiny_classifier, tiny_classifier, tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.rollout import RewardFunctions

PROMPTS = ["What color is the sky?", "What color is the sea?", "The answer is"]
COMPLETIONS = [" It is blue.", " It is green, of course. It is green", " 42"]
COMPLETION_IDS = [[3, 4, 5], [6, 7, 8, 9], [10]]
COLUMNS = {"prompt": PROMPTS, "length": [1, 2, 3], "solution": ["blue", "green", None]}


def word_count(completions, **kwargs):
    return [len(completion.split()) for completion in completions]


def longer_than(prompts, completions, length, margin=0):
    return [float(len(c) > n + margin) for c, n in zip(completions, length, strict=True)]


async def tokens_or_none(completion_ids, solution, **kwargs):
    return [None if answer is None else len(ids) for ids, answer in zip(completion_ids, solution, strict=True)]


class Async:
    async def __call__(self, completions, trainer_state, **kwargs):
        return [trainer_state.global_step + len(kwargs["length"])] * len(completions)


@pytest.fixture(scope="module")
def classifier_path(tmp_path_factory):
    return save_tiny_classifier(tmp_path_factory.mktemp("tiny-reward"), build_tokenizer())


def ask(functions, columns=COLUMNS, prompts=PROMPTS, completions=COMPLETIONS, **kwargs):
    return functions(prompts, completions, COMPLETION_IDS, columns, **kwargs)


def trl_rewards(functions, rows, prompts, completions, state):
    """Returns the rewards that TRL's trainer gets from the same functions."""
    trainer = object.__new__(GRPOTrainer)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    vars(trainer).update(
        accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=True),
        args=SimpleNamespace(report_to=[], device=torch.device("cpu"), past_index=-1),
        is_deepspeed_enabled=False,
        state=state,
        environments=None,
        chat_template_kwargs={},
        async_loop=loop,
        reward_funcs=[getattr(function, "model", function) for function in functions.functions],
        reward_processing_classes=[getattr(function, "tokenizer", None) for function in functions.functions],
        reward_func_names=functions.names,
    )
    rewards = trainer._calculate_rewards(rows, prompts, completions, COMPLETION_IDS)
    loop.call_soon_threadsafe(loop.stop)
    return rewards


@pytest.mark.parametrize("conversational", [False, True])
def test_equals_trl(conversational, classifier_path):
    prompts, completions = PROMPTS, COMPLETIONS
    sources = [classifier_path, longer_than, tokens_or_none, Async()]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        completions = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    state = SimpleNamespace(global_step=7)
    functions = RewardFunctions(sources)
    rewards = ask(functions, prompts=prompts, completions=completions, trainer_state=state)
    # TRL gives a function all columns, whether it takes them or not.
    functions.functions[1] = lambda prompts, completions, length, **kwargs: longer_than(prompts, completions, length)
    rows = [{name: values[i] for name, values in {**COLUMNS, "prompt": prompts}.items()} for i in range(len(prompts))]
    expected = trl_rewards(functions, rows, prompts, completions, state)
    torch.testing.assert_close(rewards, expected, equal_nan=True, rtol=0, atol=0)
    assert rewards.shape == (3, 4) and rewards.dtype == torch.float32
    assert math.isnan(rewards[2, 2])


def test_reward_model_reads_each_text_to_its_end():
    model, tokenizer = tiny_classifier(), build_tokenizer(pad_token=None)
    rewards = ask(RewardFunctions(model, reward_processing_classes=tokenizer))[:, 0]
    assert not model.training
    for reward, prompt, completion in zip(rewards, PROMPTS, COMPLETIONS, strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt").input_ids
        torch.testing.assert_close(reward, model(ids).logits[0, 0], rtol=1e-5, atol=1e-6)


def test_reward_model_cuts_at_max_length():
    model, tokenizer = tiny_classifier(), build_tokenizer()
    rewards = ask(RewardFunctions(model, reward_processing_classes=tokenizer, max_length=4))[:, 0]
    for reward, prompt, completion in zip(rewards, PROMPTS, COMPLETIONS, strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt").input_ids[:, :4]
        torch.testing.assert_close(reward, model(ids).logits[0, 0], rtol=1e-5, atol=1e-6)


def test_reward_model_of_few_positions():
    model = tiny_classifier(max_position_embeddings=8)
    with pytest.raises(
        RuntimeError, match=r"'LlamaForSeq\w+' raised ValueError: .* tokens, the model has 8 positions"
    ):
        ask(RewardFunctions(model, reward_processing_classes=build_tokenizer()))


def broken_classifier(kind):
    """A classifier that cannot serve, and its tokenizer."""
    model, tokenizer = tiny_classifier(), build_tokenizer()
    if kind == "two labels":
        model = tiny_classifier(num_labels=2)
    elif kind == "a language model":
        model = tiny_model()
        model.config.num_labels = 1
    elif kind == "NaN":
        torch.nn.init.constant_(model.score.weight, math.nan)
    elif kind == "another vocabulary":
        model = tiny_classifier(vocab_size=100)
    elif kind == "no tokenizer":
        tokenizer = None
    elif kind == "a name for tokenizer":
        tokenizer = "folder"
    elif kind == "no pad token":
        tokenizer = build_tokenizer(pad_token=None, eos_token=None)
    elif kind == "tokens and no logits":
        model.forward = lambda input_ids, **_: SimpleNamespace(rewards=input_ids)
    elif kind == "a number a token":
        model.forward = lambda input_ids, **_: SimpleNamespace(logits=input_ids.float())
    elif kind == "a device that there is not":
        model.forward = lambda input_ids, **_: input_ids.to("meta") + model.score.weight
    return model, tokenizer


BROKEN = {
    "two labels": "has num_labels=2, but a reward is one number; give a sequence classifier",
    "a language model": r"\(LlamaForCausalLM\) gives logits of shape \(2, 3, \d+\) for two texts; expected a sequence",
    "NaN": "gives numbers that are not finite for two texts",
    "another vocabulary": "has 100 tokens, but its tokenizer '' gives up to token 3[0-9]+; give the tokenizer that",
    "no tokenizer": "its tokenizer cannot be loaded .*; give it as reward_processing_classes",
    "a name for tokenizer": "_processing_classes: expected a tokenizer for reward model .*, got str",
    "no pad token": "has neither a pad token nor an end token; set tokenizer.pad_token",
    "tokens and no logits": "cannot read a text: AttributeError: .*'logits'; give a sequence classifier",
    "a number a token": r"gives logits of shape \(2, 3\)",
    "a device that there is not": "cannot read a text: RuntimeError: .*; give a sequence classifier",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_reward_models_that_cannot_serve_are_named_at_once(kind):
    model, tokenizer = broken_classifier(kind)
    with pytest.raises((ValueError, TypeError), match=f"^reward.*{BROKEN[kind]}") as caught:
        RewardFunctions(model, reward_processing_classes=tokenizer)
    assert "\n" not in str(caught.value)


def test_a_reward_model_without_a_chat_template():
    tokenizer = build_tokenizer()
    functions = RewardFunctions([word_count, tiny_classifier()], reward_processing_classes=[None, tokenizer])
    functions.check_conversations()
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="'LlamaForSeq.*': prompts are conversations, but its tokenizer '' has no chat"
    ):
        functions.check_conversations()


def test_names_and_weights(classifier_path):
    partial = functools.partial(functools.partial(longer_than, margin=2))
    functions = RewardFunctions([word_count, partial, Async(), classifier_path], weights=[1, 0.5, 0, 2])
    assert functions.names == ["word_count", "longer_than", "Async", classifier_path.split("/")[-1]]
    assert functions.weights.tolist() == [1, 0.5, 0, 2] and functions.weights.dtype == torch.float32
    assert RewardFunctions(word_count).weights.tolist() == [1]


def test_functions_get_what_they_name():
    seen = {}

    def everything(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [1, 2, 3]

    def few(solution, *, log_metric, undefined=5):
        log_metric("seen", undefined)
        return [0, 0, 0]

    metrics = {}
    ask(RewardFunctions([everything, few]), log_metric=metrics.__setitem__, log_extra=print)
    assert metrics == {"seen": 5}
    named = {"prompts", "completions", "completion_ids", "length", "solution"}
    assert seen.keys() == named | {"trainer_state", "log_extra", "log_metric"}
    assert seen["prompts"] == PROMPTS and seen["solution"] == COLUMNS["solution"]


def test_async_functions_run_together():
    arrived = []

    async def meets_the_other(completions):
        arrived.append(1)
        for _ in range(1000):
            if len(arrived) == 2:
                return [1] * len(completions)
            await asyncio.sleep(0.001)
        raise TimeoutError("the other one has not been called yet")

    async def asked_within_a_loop():
        return ask(RewardFunctions([meets_the_other, meets_the_other]))

    assert asyncio.run(asked_within_a_loop()).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize(
    "answer", [(1, 2, 3), np.array([1, 2, 3]), torch.tensor([1.0, 2, 3]), iter([1, np.float32(2), torch.tensor(3)])]
)
def test_kinds_of_numbers(answer):
    assert ask(RewardFunctions(lambda completions: answer)).tolist() == [[1], [2], [3]]
    assert ask(RewardFunctions(lambda completions: [True, False, np.bool_(True)])).tolist() == [[1], [0], [1]]


async def unawaited(completions):
    return [1, 2, 3]


NUMBER = "expected a number or None, got"
FINITE = "expected a finite number, or None for no reward, got"
# What a function returns, and what the message says of it, in a message that also has the remedy.
WRONG_ANSWERS = {
    "too few": ([1, 2], "returned 2 rewards for 3 completions"),
    "too many": ([1] * 5, "returned 5 rewards for 3 completions"),
    "none": ([], "returned 0 rewards for 3 completions"),
    "None": (None, "returned None of type NoneType"),
    "one number": (1.0, "returned 1.0 of type float"),
    "text": ("123", "returned '123' of type str"),
    "bytes": (bytearray(b"123"), r"returned bytearray\(b'123'\) of type bytearray"),
    "dict": ({1: 1, 2: 2, 3: 3}, "returned {1: 1, .* of type dict"),
    "set": ({1, 2, 3}, "returned {1, 2, 3} of type set"),
    "function": (len, "returned <built-in function len> of type builtin"),
    "scalar tensor": (torch.tensor(1.0), "returned 1.0 of type float"),
    "scalar array": (np.array(1.0), r"returned array\(1.\) of type ndarray"),
    "text in a list": (
        [1, "2", 3],
        rf"completion 1: {NUMBER} '2' of type str \(prompt: 'What color is the sea\?'\)",
    ),
    "list in a list": ([1, 2, [3]], rf"completion 2: {NUMBER} \[3\] of type list"),
    "tensor (N, 1)": (torch.ones(3, 1), rf"completion 0: {NUMBER} \[1.0\] of type list"),
    "array (N, 1)": (np.ones((3, 1)), rf"completion 0: {NUMBER} array\(\[1.\]\) of type ndarray"),
    "transposed": (torch.ones(1, 3), "returned 1 rewards for 3 completions"),
    "complex": ([1, 2, 3j], f"completion 2: {NUMBER} 3j of type complex"),
    "dates": (np.array(["2026-01-01"] * 3, dtype="datetime64[D]"), f"completion 0: {NUMBER} .*datetime64"),
    "messages": ([{"reward": 1}] * 3, f"completion 0: {NUMBER} {{'reward': 1}} of type dict"),
    "NaN": ([math.nan, 2, 3], rf"completion 0: {FINITE} nan \(prompt: 'What color is the s"),
    "infinite": ([1, -math.inf, 3], f"completion 1: {FINITE} -inf"),
    "beyond float32": ([1, 2, 1e39], f"completion 2: {FINITE} 1e"),
    "huge integer": ([1, 2, 10**400], f"completion 2: {FINITE} 1000"),
    "NaN in a tensor": (torch.tensor([1, 2, math.nan]), f"completion 2: {FINITE} nan"),
    "NaN in an array": (np.array([1, math.nan, 2], np.float16), rf"completion 1: {FINITE} nan"),
}


@pytest.mark.parametrize(("answer", "message"), WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())
def test_wrong_answers(answer, message):
    def broken(completions):
        return answer

    async def broken_later(completions):
        return answer

    for function in (broken, broken_later):
        with pytest.raises(
            ValueError, match=rf"^reward function '{function.__name__}',? {message}.*; return a list with one number"
        ) as caught:
            ask(RewardFunctions([word_count, function]))
        assert "\n" not in str(caught.value)


class NoNumber:
    shape = ()

    def item(self):
        raise RuntimeError("no storage")


def test_answers_that_raise_when_they_are_read():
    with pytest.raises(ValueError, match=r"completion 0: .*NoNumber.* cannot be read as a number \(no storage\)"):
        ask(RewardFunctions(lambda completions: [NoNumber()] * 3))

    def broken(completions):
        yield 1
        raise KeyError("solution")

    with pytest.raises(RuntimeError, match="'broken' raised KeyError: 'solution'"):
        ask(RewardFunctions(broken))

    def endless(completions):
        while True:
            yield 1

    with pytest.raises(ValueError, match="'endless' returned 400 rewards for 3 completions"):
        ask(RewardFunctions(endless))


def test_coroutines_of_sync_functions_are_awaited():
    @functools.wraps(unawaited)
    def decorated(*args, **kwargs):
        return unawaited(*args, **kwargs)

    assert ask(RewardFunctions([word_count, lambda completions: unawaited(completions), decorated])).tolist() == [
        [3, 1, 1],
        [8, 2, 2],
        [1, 3, 3],
    ]


def greedy(prompts, completions, completion_ids, solution, meta):
    """Changes all that it is given."""
    for given in (prompts, completions, completion_ids):
        given[0][:] = []
        given[1].append(7)
    solution[:] = ["changed"] * 3
    meta[0]["tags"].append("changed")
    meta[1]["array"][:] = 7
    meta[2]["tensor"][:] = 7
    return [0, 0, 0]


@pytest.mark.parametrize("count", [1, 2])
def test_functions_change_nothing_but_their_own(count):
    def batch():
        prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        completions = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in COMPLETIONS]
        meta = [{"tags": ["a"]}, {"array": np.zeros(2)}, {"tensor": torch.zeros(2)}]
        return prompts, completions, [list(ids) for ids in COMPLETION_IDS], {"solution": ["a", "b", "c"], "meta": meta}

    seen = []

    async def witness(**kwargs):
        seen.append({name: kwargs[name] for name in ("prompts", "completions", "completion_ids", "solution", "meta")})
        return [0, 0, 0]

    given = batch()
    RewardFunctions([greedy, witness, greedy][:count])(*given)
    prompts, completions, completion_ids, columns = batch()
    expected = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
    for found in [*seen, {**dict(zip(("prompts", "completions", "completion_ids"), given, strict=False)), **given[3]}]:
        assert repr(found) == repr(expected)


def test_functions_that_raise():
    def broken(completions):
        raise KeyError("solution")

    async def broken_later(completions):
        raise KeyError("solution")

    for function in (broken, broken_later):
        with pytest.raises(RuntimeError, match=f"'{function.__name__}' raised KeyError: 'solution'") as caught:
            ask(RewardFunctions([word_count, function]))
        assert isinstance(caught.value.__cause__, KeyError)


def test_arguments_that_there_are_not():
    with pytest.raises(ValueError, match=r"'<lambda>' takes an argument 'target', which is no column .*'solution'"):
        ask(RewardFunctions(lambda completions, target: [1, 2, 3]))
    with pytest.raises(ValueError, match="column 'completions' has the name of an argument"):
        ask(RewardFunctions(word_count), columns={"completions": COMPLETIONS})


def test_rows_without_any_reward(caplog):
    functions = RewardFunctions([lambda completions: [1, None, None], lambda completions: [None, None, 2]])
    with caplog.at_level(logging.WARNING):
        rewards = ask(functions)
    assert rewards.isnan().tolist() == [[False, True], [True, True], [True, False]]
    (warning,) = caplog.messages
    assert "returned None for 1 of 3 completions" in warning
    assert "What color is the sea?" in warning and "It is green" in warning


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reward_funcs": None}, ValueError, "there is no reward function"),
        ({"reward_funcs": []}, ValueError, "there is no reward function"),
        ({"reward_funcs": [word_count, 3]}, TypeError, "expected functions, models or names of models, got int"),
        ({"reward_funcs": torch.nn.Linear(2, 1)}, TypeError, "Linear is no model of transformers"),
        ({"weights": [1, 2]}, ValueError, "reward_weights: expected one for each of 1 reward functions, got 2"),
        ({"reward_processing_classes": [None, None]}, ValueError, "reward_processing_classes: expected one for each"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RewardFunctions(**{"reward_funcs": word_count, **arguments})
