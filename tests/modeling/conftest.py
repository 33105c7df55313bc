import random

import pytest

from trl_fast.data import Tree


@pytest.fixture
def trees():
    """Pairs whose lengths are all different."""
    rng = random.Random(0)
    return [
        Tree(
            [rng.randrange(3, 340) for _ in range(n)],
            [[rng.randrange(3, 340) for _ in range(m)] for m in (n % 4 + 1, 5)],
        )
        for n in (1, 4, 7)
    ]
