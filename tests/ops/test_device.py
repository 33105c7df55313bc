"""Checks the facts that code is told about devices, and that a simulated one is gone afterwards."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from trl_fast.ops.device import DeviceFacts, device_facts, has_gpu, simulated_device, some_tiles

CPU = torch.device("cpu")
TILES = [slice(start, start + 2) for start in range(0, 10, 2)]


def test_the_facts_of_this_cpu():
    facts = device_facts(CPU)
    assert facts.kind == "cpu" and not facts.is_cuda and facts.read_memory() is None
    assert facts.multiplies_bf16 == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert list(some_tiles(iter(TILES), CPU)) == TILES


def test_a_simulated_gpu_stands_on_the_cpu_while_it_lasts():
    gpu = DeviceFacts("cuda", True, (9, 0), first_tiles_only=True)
    before = has_gpu()
    with simulated_device(gpu):
        assert device_facts(CPU) is gpu and device_facts(CPU).is_cuda and has_gpu()
        assert list(some_tiles(iter(TILES), CPU)) == [TILES[0], TILES[1], TILES[-1]]
        assert device_facts(torch.device("meta")).kind == "meta"
        with simulated_device(DeviceFacts("cpu", False)):
            assert not device_facts(CPU).is_cuda
        assert device_facts(CPU) is gpu
    assert device_facts(CPU).kind == "cpu" and has_gpu() == before


def test_it_is_gone_after_an_error():
    with pytest.raises(RuntimeError, match="stop"), simulated_device(DeviceFacts("cuda", True)):
        raise RuntimeError("stop")
    assert device_facts(CPU).kind == "cpu"


def test_a_simulation_counts_in_its_own_thread_and_in_its_backward():
    """A planner that runs beside a training leaves the training as it is."""
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(device_facts(CPU))
            return grad

    gpu = DeviceFacts("cuda", True)
    before = has_gpu()
    with ThreadPoolExecutor(1) as other, simulated_device(gpu):
        assert other.submit(device_facts, CPU).result().kind == "cpu"
        assert other.submit(has_gpu).result() == before
        Seen.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [gpu]
