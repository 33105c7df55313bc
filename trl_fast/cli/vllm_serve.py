"""Starts vLLM's own server with what the trainers need of it: `trl-fast vllm-serve --model MODEL`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from packaging.version import Version

from trl_fast.console import make_console
from trl_fast.settings.packages import check_package

# From this version on, the endpoints for prompts with images are there only if they are asked for.
_SCALE_OUT_VERSION = Version("0.30.0")
# The trainers' endpoints for weights and caches are those of vLLM's development mode.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


@dataclass
class VLLMServeArguments:
    """Says what the server runs. Flags that are not listed here go to `vllm serve` as they are."""

    model: str = field()
    """Model: a hub name or a folder."""

    revision: str | None = None
    """Branch, tag or commit of a hub model. None: its main branch."""

    tensor_parallel_size: int = 1
    """GPUs that share each layer."""

    data_parallel_size: int = 1
    """Copies of the model that share the requests; of a dense model one is enough."""

    host: str = "0.0.0.0"
    """Address to listen on; 0.0.0.0 answers other machines too."""

    port: int = 8000
    """Port to listen on."""

    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM takes for weights, activations and its cache."""

    dtype: str = "auto"
    """Number format that vLLM computes in; auto is the model's."""

    max_model_len: int | None = None
    """Longest prompt with its completion, in tokens. None: the model's limit."""

    enable_prefix_caching: bool | None = None
    """Keep what was computed of prompts for prompts that begin alike. None: as vLLM decides."""

    enforce_eager: bool | None = False
    """Leave CUDA graphs out."""

    kv_cache_dtype: str = "auto"
    """Number format of the cache; auto is the model's."""

    trust_remote_code: bool = False
    """Allow models and tokenizers that bring Python code of their own."""

    log_level: str = "info"
    """Level of the web server's log: critical, error, warning, info, debug or trace."""

    vllm_model_impl: str = "vllm"
    """Code that runs the model: vllm or transformers."""

    distributed_executor_backend: str | None = None
    """"ray" spreads the workers over several machines. None: processes of this machine."""

    speculative_config: str | None = None
    """JSON of vLLM's speculative decoding. None: none."""


def build_command(arguments: VLLMServeArguments, extra: Sequence[str] = ()) -> list[str]:
    """Returns the command line, with Python in front, that serves a model as the trainers expect it.

    Args:
        arguments: what stands on the command line of `trl-fast vllm-serve`.
        extra: further arguments of `vllm serve`.
    """
    given = {
        "--host": arguments.host,
        "--port": arguments.port,
        "--tensor-parallel-size": arguments.tensor_parallel_size,
        "--data-parallel-size": arguments.data_parallel_size,
        "--gpu-memory-utilization": arguments.gpu_memory_utilization,
        "--dtype": arguments.dtype,
        "--kv-cache-dtype": arguments.kv_cache_dtype,
        "--model-impl": arguments.vllm_model_impl,
        "--uvicorn-log-level": arguments.log_level,
        "--revision": arguments.revision,
        "--max-model-len": arguments.max_model_len,
        "--distributed-executor-backend": arguments.distributed_executor_backend,
        "--speculative-config": arguments.speculative_config,
    }
    switches = {
        "--enable-prefix-caching": arguments.enable_prefix_caching is True,
        "--no-enable-prefix-caching": arguments.enable_prefix_caching is False,
        "--enforce-eager": arguments.enforce_eager,
        "--trust-remote-code": arguments.trust_remote_code,
        "--enable-scale-out": Version(version("vllm")) >= _SCALE_OUT_VERSION,
    }
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", arguments.model),
        *(word for flag, value in given.items() if value is not None for word in (flag, str(value))),
        *(flag for flag, is_set in switches.items() if is_set),
        *("--weight-transfer-config", '{"backend": "nccl"}'),
        # Those of the distribution that is sampled from, and as many as a loss may ask for.
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
        *extra,
    ]


def serve(arguments: VLLMServeArguments, extra: Sequence[str] = ()) -> None:
    """Says which command runs, and becomes it; extra: further arguments of `vllm serve`.

    Raises:
        ImportError: vLLM is not installed.
    """
    check_package("vllm", "vllm", "trl-fast vllm-serve")
    command = build_command(arguments, extra)
    settings = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    own = shlex.join(["vllm", *command[command.index("serve") :]])
    make_console(stderr=True).print(f"Runs {settings} {own}", highlight=False, soft_wrap=True, markup=False)
    os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Reads the flags; returns what starts the server in place of this process."""
    check_package("vllm", "vllm", "trl-fast vllm-serve")
    from .parser import TrlParser

    parser = TrlParser(VLLMServeArguments, prog="trl-fast vllm-serve")
    parsed, extra = parser.parse_args_and_config(arguments, return_remaining_strings=True)

    def run() -> int:
        serve(parsed, extra)
        return 0

    return run
