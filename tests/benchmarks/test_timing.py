"""Times are shown in milliseconds, with three digits."""

import pytest

from benchmarks.timing import milliseconds


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0.00001234, "0.0123"),
        (0.0045678, "4.57"),
        (0.0789, "78.9"),
        (0.19, "190"),
        (1.2345, "1234"),
        (0, "0"),
        (float("nan"), "nan"),
    ],
)
def test_milliseconds(seconds, shown):
    assert milliseconds(seconds) == shown
