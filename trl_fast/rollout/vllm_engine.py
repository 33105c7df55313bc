"""Generates completions by vLLM, in a server or in this process, with the log-probabilities of its sampling.

vLLM is optional: `pip install 'trl-fast[vllm]'`. Requests are those of TRL 1.16.0's client. `make test-vllm` runs this
with vLLM 0.31 itself on a CPU; weights over NCCL and sleeping need a GPU, and were tried against stand-ins only.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections import deque
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.modeling.loading import base_model, is_quantized
from trl_fast.parallel.agreement import decided_by_first, together
from trl_fast.parallel.gathering import is_sharded
from trl_fast.settings.packages import install_command
from trl_fast.settings.server_url import ServerURL, server_url

from .engine import Rollout, SamplingSettings, check_prompts, end_token_ids
from .images import PromptImages
from .vllm_images import multi_modal_data, placed_features
from .vllm_server import VLLMServer
from .vllm_weights import open_weights
from .weights import merged_weights, weight_metadata

logger = logging.getLogger(__name__)

# The log-probabilities of the distribution that is sampled from, not of the model's raw logits.
_LOGPROBS_MODE = "processed_logprobs"


@dataclass(frozen=True)
class Run:
    """Holds a prompt that comes `count` times in a row, and its pictures."""

    ids: list[int]
    count: int
    pictures: tuple[Image.Image, ...] = ()


# For each prompt the pictures by their digests.
Pictures = list[list[tuple[str, Image.Image]]]


class _VLLMEngine:
    """Provides what both ways of running vLLM share.

    Args:
        end_ids: tokens that end a completion, besides those that vLLM reads from the model's files.
        max_positions: the longest prompt with its completion, in tokens; None if there is no limit.
        regex: what completions have to match; None is anything.
        image_token_id: the token that stands for a part of an image; None: prompts have none.
    """

    def __init__(
        self, end_ids: set[int], max_positions: int | None, regex: str | None, image_token_id: int | None = None
    ) -> None:
        self.end_ids, self.image_token_id = sorted(end_ids), image_token_id
        self.max_positions = max_positions
        self.regex = regex
        self._step: int | None = None

    def sync_weights(self, model: torch.nn.Module, step: int) -> None:
        """Loads the policy's weights, an adapter merged in, unless those of `step` are loaded."""
        if step != self._step:
            # Half loaded weights are of no step.
            self._step = None
            self._load(model)
            self._step = step

    def _load(self, model: torch.nn.Module) -> None:
        raise NotImplementedError

    def _parameters(self, settings: SamplingSettings) -> dict[str, Any]:
        """Returns the arguments of vLLM's SamplingParams but `n`."""
        parameters = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p or 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "max_tokens": settings.max_completion_length,
            "stop_token_ids": self.end_ids,
            **(settings.generation_kwargs or {}),
            # Only that of the sampled token.
            "logprobs": 0,
        }
        parameters.pop("n", None)
        if self.regex is not None:
            parameters["structured_outputs"] = {"regex": self.regex}
        return parameters


class VLLMServerEngine(_VLLMEngine):
    """Samples from a `vllm serve`, which the main process talks to for all processes.

    Args:
        url, timeout: as in `VLLMServer`.
        group_port: port of the NCCL group that weights are sent through.
        device: the device that trains. From a CUDA device weights go over NCCL, from others through files.
        The others are those of _VLLMEngine.

    Raises:
        ImportError: vLLM is not installed.
        ConnectionError: the server does not answer.
        RuntimeError: it does not take weights.
    """

    def __init__(
        self,
        url: ServerURL,
        *,
        device: torch.device,
        end_ids: set[int],
        max_positions: int | None = None,
        timeout: float = 240.0,
        group_port: int = 51216,
        regex: str | None = None,
        image_token_id: int | None = None,
    ) -> None:
        super().__init__(end_ids, max_positions, regex, image_token_id)
        _import_vllm()
        self._metadata: list[tuple[str, str, list[int]]] | None = None
        self.state = PartialState()

        def join() -> None:
            self.server = VLLMServer(url, timeout=timeout)
            self.weights = open_weights(self.server, device, group_port)
            mode = (self.server.config().get("model_config") or {}).get("logprobs_mode")
            if mode != _LOGPROBS_MODE:
                logger.warning(
                    f"The vLLM server runs with --logprobs-mode {mode}, so its log-probs are not those that it "
                    f"samples by; importance sampling is biased. Restart it with --logprobs-mode {_LOGPROBS_MODE}."
                )

        decided_by_first(join)

    # The main process has one request for the prompts of all.
    asks_together = True

    def generate(
        self, prompt_ids: list[list[int]], settings: SamplingSettings, images: PromptImages | None = None
    ) -> Rollout:
        """Samples one completion for each prompt, with log-probabilities. All processes call this together.

        images: of each prompt, in the order of their tokens.

        Raises:
            ValueError: a prompt is empty or too long, or the server cannot tell where its images stand.
            ConnectionError: the server does not answer.
            RuntimeError: it refuses the request.
        """

        def check() -> None:
            if prompt_ids:  # a process may have none left where others go on
                check_prompts(prompt_ids, settings.max_completion_length, self.max_positions)

        together(check)
        counts = gather_object([len(prompt_ids)])
        everyone = gather_object(prompt_ids)
        pictures = gather_object(_pictures(prompt_ids, images)) if self.image_token_id is not None else None
        ids, logprobs = decided_by_first(lambda: self._complete(_runs(everyone, pictures), settings))
        first = sum(counts[: self.state.process_index])
        mine = slice(first, first + len(prompt_ids))
        return Rollout(prompt_ids, ids[mine], logprobs[mine])

    def _complete(self, runs: list[Run], settings: SamplingSettings) -> tuple[list[list[int]], list[list[float]]]:
        """Returns the completions of all runs in order; a request takes runs of one length only."""
        parameters = self._parameters(settings)
        by_run: dict[int, tuple[list, list]] = {}
        for count in sorted({run.count for run in runs}):
            places = [place for place, run in enumerate(runs) if run.count == count]
            ids, logprobs = self._ask([runs[place] for place in places], count, parameters)
            for index, place in enumerate(places):
                part = slice(index * count, (index + 1) * count)
                by_run[place] = (ids[part], logprobs[part])
        ids, logprobs = zip(*(by_run[place] for place in range(len(runs))), strict=True)
        return sum(ids, []), sum(logprobs, [])

    def _ask(
        self, runs: list[Run], count: int, parameters: dict[str, Any]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Returns `count` completions of each run's prompt, those of one prompt together, and their log-probs."""
        prompts = [run.ids for run in runs]
        if not any(run.pictures for run in runs):
            return self.server.complete(prompts, count, parameters)
        assert self.image_token_id is not None, "pictures are gathered where there is one"
        features = [
            placed_features(found, run.ids, self.image_token_id) if found else None
            for run, found in zip(runs, self.server.image_features([run.pictures for run in runs]), strict=True)
        ]
        return self.server.complete_with_images(prompts, features, count, parameters)

    def _load(self, model: torch.nn.Module) -> None:
        if self._metadata is None:
            self._metadata = weight_metadata(model)
        metadata, weights = self._metadata, merged_weights(model)

        def send() -> None:
            try:
                self.weights.send(metadata, weights)
            finally:
                # The others take part in gathering sharded weights to the end, whatever became of the request.
                deque(weights, maxlen=0)

        if not self.state.is_main_process and is_sharded(model):
            deque(weights, maxlen=0)
        decided_by_first(send)


class VLLMColocatedEngine(_VLLMEngine):
    """Samples from a vLLM in this process, on the device that also trains; each process has its own.

    Args:
        model: name or folder that vLLM reads the architecture and the first weights from.
        device: the device that trains, and that vLLM samples on.
        sleeps: whether vLLM's memory is freed after each generation; its weights are then loaded before the next.
        llm_arguments: further arguments of `vllm.LLM`.
        The others are those of _VLLMEngine.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        device: torch.device,
        end_ids: set[int],
        max_positions: int | None = None,
        sleeps: bool = False,
        regex: str | None = None,
        image_token_id: int | None = None,
        **llm_arguments: Any,
    ) -> None:
        super().__init__(end_ids, max_positions, regex, image_token_id)
        self.vllm = _import_vllm()
        self.sleeps = sleeps
        # On a CPU vLLM keeps weights packed for its products, so that they cannot be written where they are.
        self.repacks_weights = device.type == "cpu"
        state = PartialState()
        _set_rendezvous(state)
        self.llm = self.vllm.LLM(
            model=model,
            enable_sleep_mode=sleeps,
            # It joins the processes that there are instead of starting its own.
            distributed_executor_backend="external_launcher",
            # Processes must sample different completions.
            seed=state.process_index,
            # vLLM's default makes it reserve memory for far longer batches than those here.
            max_num_batched_tokens=4096,
            logprobs_mode=_LOGPROBS_MODE,
            **llm_arguments,
        )
        self._sleep()
        state.wait_for_everyone()

    def generate(
        self, prompt_ids: list[list[int]], settings: SamplingSettings, images: PromptImages | None = None
    ) -> Rollout:
        """Samples one completion for each prompt, with log-probabilities.

        images: of each prompt, in the order of their tokens.

        Raises:
            ValueError: a prompt is empty or too long.
            RuntimeError: the engine sleeps without weights; `sync_weights` comes first.
        """
        check_prompts(prompt_ids, settings.max_completion_length, self.max_positions)
        if self.sleeps:
            if self._step is None:
                raise RuntimeError("vLLM sleeps without weights; call sync_weights before generate")
            self.llm.wake_up(tags=["kv_cache"])
        parameters = self._parameters(settings)
        if isinstance(parameters.get("structured_outputs"), dict):
            structured = importlib.import_module("vllm.sampling_params").StructuredOutputsParams
            parameters["structured_outputs"] = structured(**parameters["structured_outputs"])
        runs = _runs(prompt_ids, _pictures(prompt_ids, images))
        outputs = self.llm.generate(
            [{"prompt_token_ids": run.ids, **multi_modal_data(run.pictures)} for run in runs],
            sampling_params=[self.vllm.SamplingParams(**parameters, n=run.count) for run in runs],
            use_tqdm=False,
        )
        self._sleep()
        completions = [completion for output in outputs for completion in output.outputs]
        return Rollout(
            prompt_ids,
            [list(completion.token_ids) for completion in completions],
            [
                [step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs, strict=True)]
                for completion in completions
            ],
        )

    def _load(self, model: torch.nn.Module) -> None:
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        if self.repacks_weights:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        else:
            loader = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
            for name, weight in merged_weights(model):
                loader.load_weights([(name, weight)])
        self.llm.reset_prefix_cache()

    def _sleep(self) -> None:
        if self.sleeps:
            # Level 2 gives up the weights too.
            self.llm.sleep(level=2)
            self._step = None


def make_vllm_engine(
    model: PreTrainedModel | PeftModel,
    accelerator: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    image_token_id: int | None = None,
) -> VLLMServerEngine | VLLMColocatedEngine:
    """Returns the engine that the `vllm_*` fields of an online method's config ask for.

    image_token_id: as in _VLLMEngine.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the model is quantised.
        NotImplementedError: a colocated engine over several GPUs.
        ConnectionError, RuntimeError: as in VLLMServerEngine.
    """
    _import_vllm()
    inner = base_model(model)
    if is_quantized(inner):
        raise ValueError("use_vllm=True cannot be used with a model in 4 or 8 bits, whose weights vLLM cannot load")
    limit = args.vllm_max_model_length or getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    common = {
        "device": accelerator.device,
        "end_ids": end_token_ids(inner, tokenizer),
        "max_positions": limit,
        "regex": args.vllm_structured_outputs_regex,
        "image_token_id": image_token_id,
    }
    if args.vllm_mode == "server":
        return VLLMServerEngine(
            server_url(args),
            timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            **common,
        )
    if args.vllm_tensor_parallel_size != 1:
        raise NotImplementedError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}: a colocated vLLM runs on one GPU only; use "
            "vllm_mode='server' and give `vllm serve` --tensor-parallel-size"
        )
    return VLLMColocatedEngine(
        cast("str", inner.name_or_path),
        # By itself vLLM takes weights in float32 for bfloat16: right where the policy computes so too.
        dtype="float32" if inner.dtype == torch.float32 and not (args.bf16 or args.fp16) else "auto",
        sleeps=args.vllm_enable_sleep_mode,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_len=args.vllm_max_model_length,
        max_num_seqs=args.completions_at_a_time,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
        **common,
    )


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(f"use_vllm=True needs vLLM: {install_command('vllm')}") from error


def _set_rendezvous(state: PartialState) -> None:
    """Sets what vLLM reads to find the other processes; what a launcher set stays."""
    os.environ["RANK"] = str(state.process_index)
    os.environ["LOCAL_RANK"] = str(state.local_process_index)
    os.environ["WORLD_SIZE"] = str(state.num_processes)
    os.environ.setdefault("MASTER_ADDR", "localhost")
    if os.environ.get("MASTER_PORT", "0") == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def _pictures(prompt_ids: list[list[int]], images: PromptImages | None) -> Pictures:
    """Returns the pictures of each prompt with their digests."""
    if images is None:
        return [[] for _ in prompt_ids]
    return [[(image.digest, image.picture) for image in own] for own in images]


def _runs(prompt_ids: list[list[int]], pictures: Pictures | None) -> list[Run]:
    """Returns equal prompts in a row as one, with their number; pictures: of each prompt, None: they have none."""

    def key(place: int) -> tuple[list[int], list[str]]:
        return prompt_ids[place], [digest for digest, _ in pictures[place]] if pictures else []

    runs = []
    for (ids, _), found in groupby(range(len(prompt_ids)), key=key):
        places = [*found]
        runs.append(Run(ids, len(places), tuple(each for _, each in pictures[places[0]]) if pictures else ()))
    return runs
