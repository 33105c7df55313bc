"""The game of the demo of environments, its tiny model, and the demo itself."""

import pytest

from examples.demo_environment import main
from examples.number_game import GUESSES, NUMBERS, NumberGame, clumsy_plays, games, heed, make_model, make_tokenizer
from trl_fast.rollout.responses import find_response_template, parse_message


def test_halving_what_is_left_always_wins():
    for row in games():
        game = NumberGame()
        assert f"between 1 and {NUMBERS}" in game.reset(**row)
        told = ""
        while told != "found":
            told = game.guess(game.possible[len(game.possible) // 2])
        assert game.get_reward() == 1 and heed([game]) == [0]
        assert game.guess(1) == "The game is over."


def test_guesses_that_were_ruled_out_are_counted():
    game = NumberGame()
    game.reset(number=NUMBERS)
    assert [game.guess(each) for each in (2, 2, 1)] == ["higher"] * GUESSES
    assert game.get_reward() == 0 and heed([game]) == [-2 / 3]


def test_what_is_shown_is_what_the_game_says_and_a_guess_is_few_tokens():
    rows = clumsy_plays(40, seed=2)
    assert rows[:] == clumsy_plays(40, seed=2)[:] and rows[:] != clumsy_plays(40, seed=3)[:]
    tokenizer = make_tokenizer()
    assert find_response_template(tokenizer)
    tokenizer.response_template = find_response_template(tokenizer)
    said = [row["completion"][0] for row in rows]
    calls = [message["tool_calls"][0]["function"] for message in said if message["tool_calls"]]
    assert {call["name"] for call in calls} == {"guess"} and len(calls) < len(said)
    for row, message in zip(rows, said, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], tools=row["tools"], add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*row["prompt"], message], tools=row["tools"])
        ids = whole["input_ids"][len(prompt["input_ids"]) : -1]
        assert whole["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
        read = parse_message(tokenizer, ids, prompt["input_ids"], row["tools"])
        assert [call["function"] for call in read.get("tool_calls", [])] == [
            call["function"] for call in message["tool_calls"] or []
        ]
        assert len(ids) == 4
    assert sum(weight.numel() for weight in make_model(tokenizer, 0).parameters()) < 1e6


@pytest.mark.slow
def test_the_policy_learns_to_listen(tmp_path):
    assert main(["--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "training.png").stat().st_size > 10_000
