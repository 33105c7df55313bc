"""Names numbers that would work where one does not divide another."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Of many, those at both ends are shown.
_SHOWN = 8


def divisors(number: int, least: int = 1) -> list[int]:
    """Returns the numbers from `least` on that divide a number, in order."""
    return [divisor for divisor in range(least, number + 1) if number % divisor == 0]


def multiples_around(number: int, factor: int) -> list[int]:
    """Returns the multiples of a factor, none of them 0, next to a number that is none: below and above."""
    below = number // factor * factor
    return [multiple for multiple in (below, below + factor) if multiple]


def least_count(whole: int, times: int) -> int:
    """Returns the least number that, so many times, is a multiple of `whole`."""
    return whole // math.gcd(whole, times)


def either(numbers: Sequence[int]) -> str:
    """Returns numbers as text, "2, 4 or 8", the middle of many left out."""
    shown = [str(number) for number in numbers]
    if len(shown) > _SHOWN:
        shown = [*shown[: _SHOWN - 2], "…", *shown[-2:]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
