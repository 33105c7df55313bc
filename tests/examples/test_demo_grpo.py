"""GRPO with a real model and a real task: the demo is its own judge."""

import pytest

from examples.demo_grpo import main


@pytest.mark.slow
def test_held_out_answers_get_better(tmp_path):
    assert main(["--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "training.png").stat().st_size > 10_000
