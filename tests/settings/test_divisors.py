"""Numbers that would work, named where one does not divide another."""

import pytest

import trl_fast
from trl_fast.settings.divisors import divisors, either, least_count, multiples_around


def test_numbers():
    assert divisors(12, 2) == [2, 3, 4, 6, 12] and divisors(7) == [1, 7]
    assert multiples_around(10, 4) == [8, 12] and multiples_around(3, 4) == [4]
    assert least_count(8, 4) == 2 and least_count(6, 4) == 3 and least_count(5, 1) == 5
    assert either([2]) == "2" and either([2, 4]) == "2 or 4" and either([1, 2, 4]) == "1, 2 or 4"
    assert either(divisors(840, 2)) == "2, 3, 4, 5, 6, 7, …, 420 or 840"


REFUSED = [
    (
        {"num_generations": 8, "per_device_train_batch_size": 3, "steps_per_generation": 4},
        "num_generations=8 does not divide the 12 completions of a generation (per_device_train_batch_size * "
        "processes = 3 * 1, times steps_per_generation=4); use per_device_train_batch_size=2, or "
        "num_generations=2, 3, 4, 6 or 12",
    ),
    (
        {"num_generations": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "; use per_device_train_batch_size=6, or num_generations=2 or 4",
    ),
    (
        {"num_generations": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        "; use per_device_train_batch_size=2",
    ),
    (
        {"num_generations": 6, "per_device_train_batch_size": 4, "generation_batch_size": 16},
        "; use generation_batch_size=12 or 24, or num_generations=2, 4, 8 or 16",
    ),
    (
        {"num_generations": 2, "per_device_train_batch_size": 4, "generation_batch_size": 10},
        "generation_batch_size=10 is no multiple of per_device_train_batch_size * processes = 4 * 1; set it to 8 or",
    ),
    (
        {"num_generations": 2, "per_device_train_batch_size": 4, "generation_batch_size": 3},
        "generation_batch_size=3 is no multiple of per_device_train_batch_size * processes = 4 * 1; set it to 4, or",
    ),
    (
        {"num_generations": 4, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 6},
        "num_generations_eval=4 does not divide the 6 completions of an evaluation batch "
        "(per_device_eval_batch_size=6 * 1 processes); use num_generations_eval=1, 2, 3 or 6, or "
        "per_device_eval_batch_size=4",
    ),
    (
        {"generation_kwargs": dict},
        "generation_kwargs: expected a dict of the sampler's arguments, got <class 'dict'> of type type",
    ),
]


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_batches_that_do_not_hold_whole_groups(settings, message, method, tmp_path):
    config = getattr(trl_fast, f"{method}Config")
    with pytest.raises(ValueError) as caught:
        config(str(tmp_path), bf16=False, **settings)
    assert message in str(caught.value)


def test_the_numbers_that_are_named_work(tmp_path):
    for settings in (
        {"num_generations": 8, "per_device_train_batch_size": 2, "steps_per_generation": 4},
        {"num_generations": 6, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
        {"num_generations": 6, "per_device_train_batch_size": 4, "generation_batch_size": 24},
    ):
        trl_fast.GRPOConfig(str(tmp_path), bf16=False, **settings)
