"""Host time of layers: every contender runs what its name says, forward and backward."""

import pytest
import torch

from benchmarks.host_time import CONTENDERS, layers, main, measure, ops_in_python
from support.seen_operators import SeenOperators
from trl_fast.ops.layers import rms_norm


@pytest.mark.parametrize("layer", [*layers()], ids=lambda layer: layer.name)
def test_contenders_compute_the_same(layer):
    given = [torch.randn(shape, requires_grad=True) for shape in layer.shapes]

    def results(run):
        made = run(*given)
        outs = [made] if isinstance(made, torch.Tensor) else [*made]
        return *outs, *torch.autograd.grad(outs, given, [torch.full_like(out, 0.5) for out in outs])

    torch.testing.assert_close(results(layer.fused), results(layer.plain))
    assert measure(layer, calls=1, rounds=1).keys() == CONTENDERS.keys()


def test_ops_run_in_python_when_asked():
    names = []
    for _ in range(2):
        with SeenOperators() as seen:
            rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
        names.append("trl_fast::rms_norm" in seen.names)
        if len(names) == 1:
            with ops_in_python(), SeenOperators() as seen:
                rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
            assert "trl_fast::rms_norm" in seen.names
    assert names == [False, False]


def test_the_table_is_printed(capsys):
    main(["--calls", "1", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "host time of a call" in printed and "norm" in printed
