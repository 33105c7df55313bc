"""Gives new weights to a running `vllm serve`: over NCCL from a CUDA device, through files from any other.

vLLM takes weights over NCCL only from GPU to GPU. TRL has no other way, so it cannot train beside a server from a CPU,
from Apple's GPUs, or where server and trainer share one GPU.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from .vllm_server import START_COMMAND, VLLMServer

# Name, dtype such as bfloat16, and shape of each weight.
Metadata = list[tuple[str, str, list[int]]]

# Weights are collected up to this size before they are written to a file of their own.
_FILE_BYTES = 1 << 30


class ServerWeights(Protocol):
    """Describes a way by which a server gets weights."""

    def send(self, metadata: Metadata, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Gives the server weights, and has it forget what it computed with the ones before.

        metadata: of each weight, in the order of `weights`; weights: names and tensors of any shape.
        """


def open_weights(server: VLLMServer, device: torch.device, port: int) -> ServerWeights:
    """Opens the way for weights from `device` to a server; port: of the NCCL group, where there is one.

    Raises:
        ConnectionError: the server does not answer.
        RuntimeError: it takes no weights.
    """
    return NCCLWeights(server, device, port) if device.type == "cuda" else WeightFiles(server)


class NCCLWeights:
    """Sends weights through an NCCL group: the trainer is rank 0, the server's workers follow.

    Raises:
        ConnectionError: the server does not answer.
        RuntimeError: it takes no weights over NCCL.
    """

    def __init__(self, server: VLLMServer, device: torch.device, port: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        from vllm.utils.network_utils import get_ip

        self.server = server
        if server.config().get("weight_transfer_config") is None:
            raise RuntimeError(
                f"the vLLM server at {server.base_url} takes no weights; start it with `{START_COMMAND}`"
            )
        workers = server.ask("GET", "/get_world_size").read(int, "world_size")
        info = {
            "master_address": get_ip(),
            "master_port": port,
            "rank_offset": 1,
            "world_size": workers + 1,
            "packed": True,
        }
        if device.index is not None:
            torch.cuda.set_device(device)
        self.group = self._beside("/init_weight_transfer_engine", {"init_info": info}, lambda: trainer_init(info))
        atexit.register(self._leave)

    def send(self, metadata: Metadata, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Sends weights (any shapes), as `ServerWeights` says."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        names, dtypes, shapes = (list(column) for column in zip(*metadata, strict=True))
        info = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        self.server.ask("POST", "/start_weight_update", json={})
        self._beside(
            "/update_weights",
            {"update_info": info},
            lambda: packed_nccl_broadcast_producer(
                iterator=weights, group=self.group, src=0, post_iter_func=lambda item: item[1]
            ),
        )
        self.server.ask("POST", "/finish_weight_update", json={})
        self.server.ask("POST", "/reset_prefix_cache")

    def _beside(self, path: str, body: dict[str, Any], act: Any) -> Any:
        """Does something while the server, in the request, waits for just that."""
        with ThreadPoolExecutor(max_workers=1) as executor:
            request = executor.submit(self.server.ask, "POST", path, json=body)
            done = act()
            request.result()
        return done

    def _leave(self) -> None:
        """Closes the group; its socket would keep the server waiting."""
        self.group.group.store = None
        self.group.group.socket = None


class WeightFiles:
    """Writes weights to files that the server reads: it has to see the folder of temporary files (TMPDIR)."""

    def __init__(self, server: VLLMServer) -> None:
        self.server = server

    def send(self, metadata: Metadata, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Writes weights (any shapes), and has the server read them, as `ServerWeights` says.

        Raises:
            RuntimeError: the server cannot read them, or has no endpoints for it.
        """
        with tempfile.TemporaryDirectory(prefix="trl_fast_weights_") as folder:
            _write(Path(folder), weights)
            reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            hint = f"it gets weights through files in {folder}: start it with VLLM_SERVER_DEV_MODE=1"
            try:
                self.server.ask("POST", "/collective_rpc", json=reload, hint=hint)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{error}; the server has to run on a machine that sees {folder} (TMPDIR)"
                ) from error
        self.server.ask("POST", "/reset_prefix_cache")


def _write(folder: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Writes weights to files of about _FILE_BYTES, so that no more of them are held at once."""
    waiting: dict[str, torch.Tensor] = {}
    size = written = 0
    for name, weight in weights:
        # safetensors refuses tensors that share memory, as views of a fused weight do.
        waiting[name] = weight.detach().to("cpu", copy=True).contiguous()
        size += weight.nbytes
        if size >= _FILE_BYTES:
            save_file(waiting, folder / f"model-{written:05d}.safetensors")
            waiting, size, written = {}, 0, written + 1
    if waiting:
        save_file(waiting, folder / f"model-{written:05d}.safetensors")
