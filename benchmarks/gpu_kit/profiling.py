"""Profiles the head's modes: which kernels the time goes into, how many are launched, and where the host waits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from trl_fast.ops import BACKENDS, supports

from ..host_waits import host_waits
from .ceilings import sizes
from .heads import MODES, all_contenders, peaked_problem
from .phase_context import Kit

TOP = 8


def run(kit: Kit) -> None:
    size = sizes(kit)[0]
    problem = peaked_problem(size, kit.device)
    served = supports("linear_logprob", BACKENDS[0], kit.device, torch.bfloat16).ok
    for mode in MODES:
        if kit.late(f"profile of {mode}", 3):
            return
        contenders = dict(all_contenders(problem, mode))
        for name in [name for name in contenders if name.startswith("ours cuda" if served else "ours")]:
            profile_call(kit, f"{mode}: {name}", contenders[name])
        kit.clock.release()


def profile_call(kit: Kit, what: str, call: Callable[[], object]) -> None:
    """Adds facts: the longest kernels with calls and milliseconds, launches, and where the host waited."""
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kit.is_gpu else [])]
    with profile(activities=activities) as profiler:
        call()
        if kit.is_gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    on_device = [e for e in events if e.device_type.name == "CUDA"] if kit.is_gpu else list(events)
    spent = functools.partial(_device_us if kit.is_gpu else _host_us)
    total = sum(map(spent, on_device)) / 1e3
    launches = sum(e.count for e in on_device)
    kit.facts.add(f"profile {what}", device_ms=total, launches=launches)
    for event in sorted(on_device, key=spent, reverse=True)[:TOP]:
        kit.facts.add(f"kernel {what}", kernel=event.key[:160], calls=event.count, ms=spent(event) / 1e3)
    if kit.is_gpu:
        with host_waits() as found:
            call()
        for line in found.report():
            kit.facts.add(f"host wait {what}", wait=line)


def _device_us(event: object) -> float:
    return event.self_device_time_total


def _host_us(event: object) -> float:
    return event.self_cpu_time_total
