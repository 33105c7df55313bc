"""The pictures of the demo of images, its tiny model, and the demo itself with a few steps."""

import numpy as np
import pytest

from examples.demo_pictures import main
from examples.picture_tasks import (
    COLORS,
    COUNTS,
    QUESTIONS,
    accuracy,
    make_model,
    make_processor,
    preference_pairs,
    questions,
    ranked_answers,
)


def test_pictures_show_what_the_answers_say():
    for row in questions(12, seed=3):
        pixels = np.asarray(row["images"][0], dtype=float)
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        shown = np.abs(pixels - ground).max(-1) > 60
        if row["answer"] in COLORS:
            near = {name: np.abs(pixels[shown].mean(0) - value).sum() for name, value in COLORS.items()}
            assert min(near, key=near.get) == row["answer"]
        else:
            # Squares of 4 to 7 pixels on a side, one in a cell of 8 × 8.
            cells = shown.reshape(4, 8, 4, 8).sum((1, 3))
            assert (cells >= 14).sum() == COUNTS.index(row["answer"]) + 1


def test_the_seed_decides_and_pairs_hold_the_models_mistakes():
    data = questions(10, seed=1)
    assert data[:]["answer"] == questions(10, seed=1)[:]["answer"] != questions(10, seed=2)[:]["answer"]
    processor = make_processor()
    ranked = ranked_answers(make_model(processor, 0), processor, data)
    for row, pair, answers in zip(data, preference_pairs(data, ranked), ranked, strict=True):
        assert sorted(answers) == sorted(QUESTIONS[row["prompt"][0]["content"]])
        assert pair["chosen"][0]["content"] == row["answer"] != pair["rejected"][0]["content"]
        assert pair["rejected"][0]["content"] in answers[:2]
    right = accuracy(data, [[row["answer"]] for row in data])
    assert right == dict.fromkeys(QUESTIONS, 1.0)


def test_the_demo_runs_from_end_to_end(tmp_path, capsys):
    """With too few steps to learn: the exit status says so."""
    words = ["--pictures", "16", "--held_out", "8", "--epochs", "1", "--output_dir", str(tmp_path)]
    assert main(words) in (0, 1)
    assert "right answers" in capsys.readouterr().out
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert (tmp_path / "dpo" / "processor_config.json").is_file()


@pytest.mark.slow
def test_held_out_answers_get_better(tmp_path):
    assert main(["--output_dir", str(tmp_path)]) == 0
