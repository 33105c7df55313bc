"""engine_of tells engines apart by what accelerate says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, ParallelismConfig

from trl_fast.parallel.engines import Engine, engine_of


def accelerator(kind: DistributedType, processes: int = 2, parallelism: ParallelismConfig | None = None, **state):
    return SimpleNamespace(
        distributed_type=kind,
        num_processes=processes,
        parallelism_config=parallelism,
        state=SimpleNamespace(**state),
    )


def fsdp(version: int):
    return accelerator(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=version))


def deepspeed(stage: int):
    return accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=stage))


@pytest.mark.parametrize(
    ("made", "engine"),
    [
        (accelerator(DistributedType.NO, processes=1), Engine.ONE),
        (accelerator(DistributedType.MULTI_CPU), Engine.DDP),
        (accelerator(DistributedType.MULTI_GPU), Engine.DDP),
        (accelerator(DistributedType.MULTI_GPU, parallelism=ParallelismConfig(tp_size=2)), Engine.TP),
        (fsdp(1), Engine.FSDP1),
        (fsdp(2), Engine.FSDP2),
        (deepspeed(0), Engine.ZERO0),
        (deepspeed(2), Engine.ZERO2),
        (deepspeed(3), Engine.ZERO3),
    ],
)
def test_engines_are_told_apart(made, engine):
    assert engine_of(made) is engine


def test_an_engine_without_a_name_is_refused():
    with pytest.raises(NotImplementedError, match="distributed_type=MEGATRON_LM"):
        engine_of(accelerator(DistributedType.MEGATRON_LM))


def test_every_engine_has_its_needs():
    for engine in Engine:
        assert engine.needs.wraps_frozen <= engine.needs.shards_weights, engine
    assert [engine for engine in Engine if engine.is_fsdp] == [Engine.FSDP1, Engine.FSDP2]
    assert [engine for engine in Engine if engine.is_deepspeed] == [Engine(f"DeepSpeed ZeRO-{n}") for n in range(4)]
