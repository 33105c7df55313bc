"""Scores the tokens of a batch: the backbone runs on the batch, only scored positions reach the head."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.layer_sizes import experts_per_token, num_experts
from trl_fast.data.packing import TokenBatch
from trl_fast.data.segments import TreeLengths, segments_of, sequence_counts
from trl_fast.ops import HeadOptions, TokenScores, selective_log_softmax_and_entropy
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.linear_logprob import token_logprobs
from trl_fast.ops.linear_token_loss import TokenLoss, token_loss_of_head
from trl_fast.parallel.engines import original_class

from .blank_images import needs_blank_image, reading_images
from .lm_head import HeadParameters, has_float32_head, head_transform
from .loading import backbone, whole_backbone
from .memory_budgets import head_workspace
from .model_changes import changes_of, unbound_forward
from .segment_attention import LENGTHS_KEYWORD, keep_score_caps, row_inputs
from .sharded_head import ReadHead, call_with_whole_head
from .tied_weight import one_gradient_of_tied_weight
from .ulysses import DealtRows, active_group
from .upcast_linear_layers import upcast_linear_layers

logger = logging.getLogger(__name__)

SCORING = "scoring forward"

DEFAULT_HEAD = HeadOptions()


class Reading(Protocol):
    """Takes what a model gives at N scored positions where something else than its tokens' scores is wanted."""

    def of_states(self, model: PreTrainedModel, hidden: torch.Tensor, num_tokens: int) -> Any:
        """Returns what is read of hidden states (N, H); the head is not run yet. num_tokens: those of the batch."""

    def of_logits(self, model: PreTrainedModel, logits: torch.Tensor) -> Any:
        """Returns what is read of a model's own logits (N, V), where its head is not understood."""


@dataclass(frozen=True)
class ScoringRequest:
    """Asks a call of the model for scores of tokens instead of logits.

    score_positions (N,): flat positions, in rows of row_length tokens, whose hidden states predict targets (N,).
    token_loss, group_sizes: as in `ops.linear_token_loss`, for a loss whose gradient is to be taken while the head's
    logits are there. reads_images: whether the batch has images. reading: what is wanted in the place of scores.
    """

    score_positions: torch.Tensor
    targets: torch.Tensor
    row_length: int
    outputs: tuple[str, ...]
    temperature: float = 1.0
    head: HeadOptions = DEFAULT_HEAD
    token_loss: TokenLoss | None = None
    group_sizes: tuple[int, ...] | None = None
    reads_images: bool = False
    reading: Reading | None = None

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the states (N, D) at the scored positions of (B, T, D), without the virtual tokens of an adapter.

        An adapter such as prompt tuning prepends them to each row.
        """
        own = states[:, states.shape[1] - self.row_length :]
        return own.reshape(-1, own.shape[-1])[self.score_positions]


@dataclass
class ModelScores:
    """Holds token scores, and the load-balancing loss (0-d) of a mixture of experts where it was asked for.

    `loss` (0-d) is that of the request's token_loss, if it had one: only the loss then has a gradient, not the scores.
    """

    tokens: TokenScores
    aux_loss: torch.Tensor | None = None
    loss: torch.Tensor | None = None


@dataclass
class ModelReading:
    """Holds what a `Reading` gave, and the load-balancing loss as in ModelScores."""

    value: Any
    aux_loss: torch.Tensor | None = None


def attach_scoring(model: PreTrainedModel) -> None:
    """Lets `model(..., scoring=ScoringRequest)` return ModelScores; without that keyword nothing changes.

    It is the model's forward that is wrapped, so that whatever wraps the model (autocast, DDP, PEFT) stays in the way.
    Its linear layers get the fastest products that the machine has for their dtype.
    """
    changes = changes_of(model)
    if SCORING in changes:
        return
    upcast_linear_layers(model)
    keep_score_caps(model)
    original = unbound_forward(model)
    change = changes.get_or_add(SCORING, "model(..., scoring=ScoringRequest) returns the scores of tokens")
    change.set(model, "trl_fast_fused_head", True, fixed=False)

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: object, scoring: ScoringRequest | None = None, **kwargs: object
    ) -> object:
        if scoring is None:
            return original(self, *args, **kwargs)
        if not self.trl_fast_fused_head:
            return _score_logits(self, original, scoring, *args, **kwargs)
        with one_gradient_of_tied_weight(self):
            return _score_hidden(self, scoring, *args, **kwargs)

    change.set(model, "forward", types.MethodType(forward, model))


def give_up_fused_head(model: PreTrainedModel, reason: str) -> None:
    """Lets a model be scored by its own logits from now on, and says so with the reason."""
    logger.warning(
        f"{type(model).__name__}: {reason}. Training goes on with the model's own logits, which is slower and takes "
        "more memory."
    )
    changed: Any = model
    changed.trl_fast_fused_head = False


def _score_hidden(
    model: PreTrainedModel, scoring: ScoringRequest, *args: object, **kwargs: object
) -> ModelScores | ModelReading:
    kwargs.pop("labels", None)
    router = kwargs.get("output_router_logits")
    shared = active_group()
    if shared is not None:
        kwargs = shared.deal_tokens(kwargs, LENGTHS_KEYWORD)
    reads_blank = needs_blank_image(model, kwargs)
    whole = scoring.reads_images or reads_blank
    inner = whole_backbone(model) if whole else backbone(model)
    with reading_images(model, blank=reads_blank) if whole else nullcontext():
        output = inner(*args, **{**kwargs, "use_cache": False, "return_dict": True})
    states = output.last_hidden_state
    if shared is not None:
        return _score_dealt(
            model, scoring, DealtRows(shared, scoring.score_positions, scoring.row_length, scoring.group_sizes), states
        )
    found = _read(model, scoring.select(states), scoring, states.shape[:-1].numel())
    if not router:
        return found
    router_logits = getattr(output, "router_logits", None)
    if router_logits:
        found.aux_loss = _aux_loss(model, router_logits, _token_counts(kwargs))
    else:
        _say_no_router(type(model).__name__)
        found.aux_loss = states.new_zeros(())
    return found


def _read(
    model: PreTrainedModel, hidden: torch.Tensor, scoring: ScoringRequest, num_tokens: int
) -> ModelScores | ModelReading:
    """Returns what is asked of the hidden states (N, H) at the scored positions."""
    if scoring.reading is not None:
        return ModelReading(scoring.reading.of_states(model, hidden, num_tokens))
    tokens, loss = _run_head(model, hidden, scoring, num_tokens)
    return ModelScores(tokens, None, loss)


@functools.cache
def _say_no_router(name: str) -> None:
    """Logs once that a router's loss is 0, as in transformers: 5.17 has none of Granite-MoE."""
    logger.warning(f"router_aux_loss_coef: this transformers gives no logits of {name}'s routers, so their loss is 0.")


@torch.compiler.disable
def _score_dealt(
    model: PreTrainedModel, scoring: ScoringRequest, dealt: DealtRows, states: torch.Tensor
) -> ModelScores:
    """Scores the rows that are dealt to this process; returns the scores of all. states: of its tokens (1, T, H)."""
    own = replace(
        scoring,
        targets=scoring.targets[dealt.rows],
        token_loss=dealt.token_loss(scoring.token_loss),
        group_sizes=dealt.group_sizes,
    )
    found = _run_head(model, dealt.hidden(states), own, states.shape[:-1].numel())
    tokens, loss = dealt.told_to_all(*found)
    return ModelScores(tokens, None, loss)


def _run_head(
    model: PreTrainedModel, hidden: torch.Tensor, scoring: ScoringRequest, num_tokens: int
) -> tuple[TokenScores, torch.Tensor | None]:
    """Returns token scores, and the loss if one is asked for, of the hidden states (N, H) at the scored positions.

    num_tokens: those of the batch, scored or not.
    """
    found = call_head(model, functools.partial(read_head, model, scoring, num_tokens), hidden)
    loss = found.pop("loss", None)
    return TokenScores(**found), loss


@torch.compiler.disable
def call_head(model: PreTrainedModel, read: ReadHead, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what `read` makes of hidden states (N, H) and of the head, which is whole while it runs.

    Not compiled: a head has kernels of its own, and chooses them by what is installed and free.
    """
    if has_float32_head(model) and hidden.dtype != torch.float32:
        with torch.autocast(hidden.device.type, enabled=False):
            return call_head(model, read, hidden.float())
    # Copies of all layers' float32 weights, which autocast would keep until the gradient of the head is there.
    torch.clear_autocast_cache()
    return call_with_whole_head(model, read, hidden)


def read_head(
    model: PreTrainedModel,
    scoring: ScoringRequest,
    num_tokens: int,
    hidden: torch.Tensor,
    head: HeadParameters,
) -> dict[str, torch.Tensor]:
    """Returns the fields of TokenScores that the request asks for, and its loss, of hidden states (N, H)."""
    weight, bias, shard, source = head
    softcap, logit_scale = head_transform(model.config)
    transform = LogitTransform.of(temperature=scoring.temperature, softcap=softcap, logit_scale=logit_scale)
    tensors = (hidden.to(weight.device), weight, scoring.targets.to(weight.device), bias)
    options = with_workspace(scoring.head, model, head, hidden, num_tokens)
    given = (*tensors, transform, scoring.outputs, options)
    if scoring.token_loss is None:
        return token_logprobs(*given, shard, source).present()
    given_loss = (scoring.token_loss, scoring.group_sizes)
    loss, tokens = token_loss_of_head(*given, *given_loss, shard=shard, source=source)
    return {"loss": loss, **tokens.present()}


def with_workspace(
    options: HeadOptions, model: PreTrainedModel, head: HeadParameters, hidden: torch.Tensor, num_tokens: int
) -> HeadOptions:
    """Returns the user's settings of the head, with a size of its workspace for hidden states (N, H) if they lack one.

    num_tokens: those of the batch, scored or not.
    """
    if options.workspace_bytes is not None:
        return options
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    size = head_workspace(model, head.weight, dtype, len(hidden), num_tokens, head.shard)
    return replace(options, workspace_bytes=size)


def _with_loss(tokens: TokenScores, scoring: ScoringRequest) -> tuple[TokenScores, torch.Tensor | None]:
    """Returns differentiable scores, or the loss of all of them and the scores without gradient."""
    if scoring.token_loss is None:
        return tokens, None
    loss = scoring.token_loss(tokens, torch.arange(len(tokens.logprobs), device=tokens.logprobs.device))
    return tokens.detach(), loss


def _token_counts(kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns how often each token (B, T) counts in a router's loss: padding 0 times, others once for each sequence.

    So the loss is that of the padded layout in every layout.
    """
    trees: tuple[TreeLengths, ...] | None = kwargs.get(LENGTHS_KEYWORD)
    mask: torch.Tensor | None = kwargs.get("attention_mask")
    if trees is None:
        return mask
    assert mask is not None, "a row of trees comes with a mask"
    counts, lengths = sequence_counts(trees), [segment.length for segment in segments_of(trees)]
    return copy_to_device(torch.tensor(counts).repeat_interleave(torch.tensor(lengths))[None], mask.device)


def _aux_loss(model: PreTrainedModel, router_logits: tuple, counts: torch.Tensor | None) -> torch.Tensor:
    """Computes the load-balancing loss of the family, which stands in the class's module; the mask weighs tokens."""
    config = model.config.get_text_config()
    experts: Any = num_experts(config)
    function: Any = getattr(sys.modules[original_class(model).__module__], "load_balancing_loss_func", None)
    if function is None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        # As wide as the logits: some routers also send tokens to no expert (LongCat Flash, ZAYA).
        function, experts = load_balancing_loss_func, router_logits[0].shape[-1]
    arguments = {"num_experts": experts, "top_k": experts_per_token(config), "attention_mask": counts}
    if "num_keys" in inspect.signature(function).parameters:
        # Doge finds an expert by two keys (product-key retrieval).
        arguments["num_keys"] = math.isqrt(experts)
    return function(router_logits, **arguments)


def _score_logits(
    model: PreTrainedModel, forward: Callable, scoring: ScoringRequest, *args: object, **kwargs: object
) -> ModelScores | ModelReading:
    """Scores the model's own logits at the scored positions: the slow path, for heads that we do not understand."""
    # The model hands its mask on to the layers and to the router's loss, which need different ones of a row.
    counts = {"attention_mask": _token_counts(kwargs)} if kwargs.get("output_router_logits") else {}
    with ExitStack() as contexts:
        if counts:
            contexts.enter_context(_layers_given(model, attention_mask=kwargs.get("attention_mask")))
        contexts.enter_context(reading_images(model, blank=needs_blank_image(model, kwargs)))
        output = forward(model, *args, **{**kwargs, **counts, "use_cache": False, "labels": None})
    logits = scoring.select(output.logits)
    if scoring.reading is not None:
        return ModelReading(scoring.reading.of_logits(model, logits), getattr(output, "aux_loss", None))
    tokens, loss = score_logits(logits, scoring)
    return ModelScores(tokens, getattr(output, "aux_loss", None), loss)


def score_logits(logits: torch.Tensor, scoring: ScoringRequest) -> tuple[TokenScores, torch.Tensor | None]:
    """Returns token scores, and the loss if one is asked for, of a model's own logits (N, V) at these positions."""
    logprobs, entropy = selective_log_softmax_and_entropy(
        logits, scoring.targets, temperature=scoring.temperature, backend=scoring.head.backend
    )
    with torch.no_grad():
        tempered = logits.float() / scoring.temperature
        tokens = TokenScores(
            logprobs=logprobs,
            entropy=entropy,
            log_sum_sq_probs=torch.logsumexp(2 * tempered.log_softmax(-1), -1),
            mean_logits=tempered.mean(-1),
            is_top1=tempered.argmax(-1) == scoring.targets,
        )
    return _with_loss(tokens, scoring)


@contextmanager
def _layers_given(model: PreTrainedModel, **keywords: object) -> Iterator[None]:
    """Gives the layers under the head these keywords within the context, whatever the model hands them."""
    hook = backbone(model).register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, **keywords}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def model_inputs(batch: TokenBatch) -> dict[str, object]:
    """Returns the keywords under which a model's forward takes a batch."""
    inputs: dict[str, object] = {"input_ids": batch.input_ids, **(batch.images or {})}
    if batch.tree_lengths is None:
        inputs["attention_mask"] = batch.attention_mask
        # A model counts the positions of padded rows with images itself.
        return inputs if batch.images else {**inputs, "position_ids": batch.position_ids}
    if batch.image_runs:
        inputs["image_runs"] = batch.image_runs
    return {**inputs, "position_ids": batch.position_ids, **row_inputs(batch.tree_lengths, batch.input_ids)}


def score(model: Callable[..., ModelScores], batch: TokenBatch, **options: Any) -> ModelScores:
    """Scores the tokens of a batch. `model` had `attach_scoring`, and may be wrapped since (PEFT, DDP, autocast).

    options: those of `scoring_inputs`.
    """
    return model(**scoring_inputs(batch, **options))


def scoring_inputs(
    batch: TokenBatch,
    *,
    outputs: tuple[str, ...] = ("logprobs",),
    temperature: float = 1.0,
    head: HeadOptions = DEFAULT_HEAD,
    token_loss: TokenLoss | None = None,
    group_sizes: tuple[int, ...] | None = None,
    **model_kwargs: object,
) -> dict[str, object]:
    """Returns the keywords with which a model scores the tokens of a batch.

    outputs, temperature, token_loss and group_sizes are those of `ops.linear_logprob` and `ops.linear_token_loss`;
    head: the user's settings of the head; `model_kwargs` go to the model's forward, over those of the batch.
    """
    options = (outputs, temperature, head, token_loss, group_sizes, batch.images is not None)
    request = ScoringRequest(batch.score_positions, batch.targets, batch.input_ids.shape[1], *options)
    return {**model_inputs(batch), "scoring": request, **model_kwargs}


def read_model(
    model: Callable[..., ModelReading], batch: TokenBatch, reading: Reading, **model_kwargs: object
) -> ModelReading:
    """Returns what `reading` makes of a model at a batch's scored positions; `model` is as in `score`.

    model_kwargs: go to the model's forward, over those of the batch.
    """
    given = (batch.score_positions, batch.targets, batch.input_ids.shape[1], ())
    request = ScoringRequest(*given, reads_images=batch.images is not None, reading=reading)
    return model(**{**model_inputs(batch), "scoring": request, **model_kwargs})


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switches to evaluation mode without gradients within the context; each module then gets its mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # The model's own way comes first: it gives layers the hub's kernels for training back.
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode
