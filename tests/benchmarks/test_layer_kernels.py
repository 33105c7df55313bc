"""The benchmark of layers' kernels: every case runs, and its bytes are those of what it reads and writes."""

import json

import pytest
import torch

from benchmarks import layer_kernels as module
from trl_fast.ops.backends import load_extension

ROWS, WIDTH = 70, 512


def cases(dtype):
    assert load_extension().ok
    makers = (module.norm_cases, module.gate_cases, module.rotary_cases, module.embedding_cases)
    return [case for make in makers for case in make(ROWS, WIDTH, dtype)]


@pytest.mark.parametrize("dtype", module.DTYPES, ids=str)
def test_every_case_runs_and_counts_its_bytes(dtype):
    found = {(case.op, case.direction): case for case in cases(dtype)}
    for case in found.values():
        case.run()
    tensor = ROWS * WIDTH * dtype.itemsize
    tensors = {
        ("rms_norm llama", "forward"): 2,
        ("residual_rms_norm", "forward"): 4,
        ("residual_rms_norm", "backward"): 4,
        ("gated_activation silu", "forward"): 3,
        ("gated_activation silu", "backward"): 5,
        ("chunked_gated_activation silu", "backward"): 5,
        ("qk_norm_rotary", "backward"): 3,
    }
    for name, count in tensors.items():
        # Weights, angles and a number a row are small beside the tensors, which are whole.
        assert 0 <= found[name].num_bytes - count * tensor < 1.1 * tensor, name


def test_the_command_writes_every_case(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr(module, "RESULT", tmp_path / "result.json")
    monkeypatch.setattr("sys.argv", ["layer_kernels", "--rows", "70", "--width", "512", "--rounds", "1"])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    written = json.loads((tmp_path / "result.json").read_text())
    assert [(row["op"], row["direction"]) for row in written["measured"]] == [
        (case.op, case.direction) for case in cases(torch.float32)
    ]
    assert all(row["dtypes"][str(dtype)]["seconds"] > 0 for row in written["measured"] for dtype in module.DTYPES)
