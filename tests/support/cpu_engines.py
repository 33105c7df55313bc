"""Lets accelerate take FSDP and DeepSpeed on CPUs, which it only takes on GPUs: what is computed is the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig, state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils, fully_sharded_data_parallel
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

import trl_fast.cli.launch

CONFIGS = Path(trl_fast.cli.launch.__file__).parent / "accelerate_configs"
_FILES = {"ddp": "multi_gpu"}


def launcher_environment(engine: str, ranks: int, mixed_precision: str = "no") -> dict[str, str]:
    """Returns the variables that `accelerate launch` sets for one of the configurations that trl_fast ships.

    engine: a file's name in trl_fast/cli/accelerate_configs, or "ddp".
    """
    config = CONFIGS / f"{_FILES.get(engine, engine)}.yaml"
    flags = ["--config_file", str(config), "--num_processes", str(ranks), "--mixed_precision", mixed_precision]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*flags, "script"]))
    if args.use_deepspeed:
        # As accelerate's launcher does before it builds the environment.
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(args)[1]
        found["DS_ACCELERATOR"] = "cpu"
    else:
        found = prepare_multi_gpu_env(args)
    if engine == "fsdp1":
        # FSDP1 sends the first rank's weights by an accelerator only; every rank loads its own here.
        found |= {"FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def take_engines_on_cpu() -> None:
    """Makes accelerate's state take the engine that the environment names, as it does where GPUs are."""
    original = state.AcceleratorState.__init__

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type != DistributedType.MULTI_CPU:
            return
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
        elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and kwargs.get("deepspeed_plugin") is not None:
            self.distributed_type = DistributedType.DEEPSPEED
            self.deepspeed_plugins = kwargs["deepspeed_plugin"]
            plugins = self.deepspeed_plugins
            for plugin in plugins.values() if isinstance(plugins, dict) else [plugins]:
                plugin.set_mixed_precision(kwargs.get("mixed_precision") or "no")
            first = next(iter(plugins.values())) if isinstance(plugins, dict) else plugins
            first.select(_from_accelerator_state=True)
            self._mixed_precision = "no"
        state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = initialize
    validate = ParallelismConfig._validate_accelerator

    def validate_as_on_gpus(self: Any, accelerator: Any) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            validate(self, accelerator)
        elif self.total_size not in (1, accelerator.num_processes):
            raise ValueError(f"total_size {self.total_size} does not match num_processes {accelerator.num_processes}")

    ParallelismConfig._validate_accelerator = validate_as_on_gpus
    if os.environ.get("FSDP_VERSION") == "1":
        _let_fsdp1_start()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch  # noqa: F401

        # Would compile an operator for shared memory.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def _let_fsdp1_start() -> None:
    """Lets FSDP1 compute on a CPU: it refuses one, though torch's module for the CPU has all that it calls."""
    original = FullyShardedDataParallel.__init__

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        # "cpu:0", which it does not take for "cpu".
        kwargs.pop("device_id", None)
        original(self, *args, **kwargs)

    def find_device(module_state: Any, *_: Any) -> Any:
        module_state._device_handle = _FSDPDeviceHandle(torch.device("cpu"), torch.cpu)
        return module_state

    FullyShardedDataParallel.__init__ = initialize
    _init_utils._init_device_handle = fully_sharded_data_parallel._init_device_handle = find_device
