import pytest
from datasets import disable_progress_bars, enable_progress_bars

from trl_fast.data import tokenization


@pytest.fixture(autouse=True)
def _quiet_and_fresh(monkeypatch):
    """No progress bars, and the warning that a process gives once not given yet."""
    monkeypatch.setattr(tokenization, "_warned_of_prompt_tail", False)
    disable_progress_bars()
    yield
    enable_progress_bars()
