"""The measurements that claims about memory rest on."""

import pytest
import torch

from benchmarks.memory import MIB, measure_peak
from benchmarks.timing import Contender, race
from trl_fast.ops import linear_logprob


def test_peak_counts_what_is_alive_at_once():
    def freed_between():
        for _ in range(3):
            torch.empty(MIB, dtype=torch.uint8)

    def kept():
        return [torch.empty(MIB, dtype=torch.uint8) for _ in range(3)]

    before = torch.empty(5 * MIB, dtype=torch.uint8)
    assert measure_peak(freed_between).peak_bytes == pytest.approx(MIB, rel=0.01)
    assert measure_peak(kept).peak_bytes == pytest.approx(3 * MIB, rel=0.01)
    assert measure_peak(lambda: before.add_(1)).peak_bytes < 0.01 * MIB


def test_peak_sees_inside_custom_ops_and_names_what_ran():
    logits = torch.randn(64, 4096)
    measured = measure_peak(lambda: linear_logprob(logits[:, :64], torch.randn(8192, 64), torch.zeros(64, dtype=int)))
    assert measured.peak_bytes > 64 * 8192 * 4
    assert "trl_fast::linear_scores" in measured.operators


def test_buffers_of_products_are_told_from_tensors():
    """With AMX, oneDNN takes 365,568 bytes for this product and gives them back; its result is there after it."""
    a, b = torch.randn(192, 256, dtype=torch.bfloat16), torch.randn(256, 704, dtype=torch.bfloat16)

    def products():
        freed = torch.empty(MIB, dtype=torch.uint8)
        del freed
        return a @ b, a @ b

    results = 2 * 192 * 704 * 2
    assert measure_peak(lambda: a @ b).bytes_beside_products == results / 2
    measured = measure_peak(products)
    assert measured.bytes_beside_products == MIB and measured.peak_bytes >= MIB
    assert measure_peak(lambda: [*products(), torch.empty(MIB, dtype=torch.uint8)]).bytes_beside_products == (
        MIB + results
    )


def test_a_race_runs_everybody_and_spares_the_slow():
    runs = {"quick": 0, "slow": 0}

    def run(name):
        runs[name] += 1

    quick, slow = (Contender(name, lambda name=name: run(name)) for name in runs)
    race([quick, slow], rounds=3, patience=1.0, device=torch.device("cpu"), title="")
    assert runs == {"quick": 4, "slow": 4} and len(quick.seconds) == 3
    race([slow], rounds=3, patience=-1.0, device=torch.device("cpu"), title="")
    assert runs["slow"] == 5
