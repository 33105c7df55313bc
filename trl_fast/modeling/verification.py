"""Compares our forward and backward passes with the model's own, on a few short sequences before training.

Scores alone do not tell whether training is right: a state that is handed from a prompt to its branches without its
graph gives the right scores and a wrong gradient. So a gradient is compared too, that of the input embeddings, to
which every path through the layers leads. A model with frozen or quantised weights has it as well. Where there are
images, a gradient of theirs is compared too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from trl_fast.data.images.layout import ImageLayout
from trl_fast.data.packing import TokenBatch, pack_trees
from trl_fast.data.reward_modeling import reward_batch
from trl_fast.data.segments import TreeLengths
from trl_fast.data.token_trees import TokenSequence, Tree, tree_sequences
from trl_fast.parallel.partitions import is_partitioned, whole_in_forward
from trl_fast.settings.batch_layouts import PADDED

from .classifier_head import end_batch, rewards
from .layer_kinds import layer_kinds, mixers_of, shortened_windows
from .loading import backbone
from .scoring import evaluating, score

# How far scores may lie from those of the model's own forward, in nats a token: rounding, not another formula.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
# How far a gradient may lie from that of single sequences, as a share of it.
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}

# Tokens of a prompt and of what continues it; one completion goes on in two ways. Prompts have different lengths, so
# that some are padded where a layer makes a batch of them; one is shorter than convolutions are wide; one completion
# is a single token, as in decoding. Sequences of one length follow each other, so that a pass reads them together.
_SHAPES: tuple[TreeLengths, ...] = ((21, 20, (17, 3, 3)), (16, 5, 1), (2, 15, 4))
# The longest window while they are tried out: all of them cross it, in front of branches and within them.
_WINDOW = 6


@dataclass(frozen=True)
class Verdict:
    """Holds the largest differences that a verification found.

    - `fused_error`: between the fused head and the model's own logits, in nats a token.
    - `packed_error`: between sequences in a row of a layout and the same ones alone; infinite if there was no row.
    - `tolerance`: how large the two may be.
    - `gradient_error`: between the gradients of that row and of the same sequences alone, as a share of them.
    - `gradient_tolerance`: how large that may be.
    - `failure`: why a row cannot be compared, None if it was.
    """

    fused_error: float
    packed_error: float
    tolerance: float
    gradient_error: float = 0.0
    gradient_tolerance: float = GRADIENT_TOLERANCE[torch.float32]
    failure: str | None = None

    @property
    def fused_ok(self) -> bool:
        """Returns whether the fused head agrees with the model's own logits."""
        return self.fused_error <= self.tolerance

    def head_mismatch(self) -> str:
        """Returns what is wrong with a fused head that is not OK."""
        return (
            f"the fused head's log-probs differ from the model's own by up to {self.fused_error:.3g} nats, so its "
            "logits are transformed in a way that its config does not tell"
        )

    @property
    def packed_ok(self) -> bool:
        """Returns whether sequences in one row agree with the same ones alone."""
        scores_agree = self.packed_error <= self.tolerance
        return self.failure is None and scores_agree and self.gradient_error <= self.gradient_tolerance

    def mismatch(self, layout: str) -> str:
        """Returns what is wrong with rows of a layout that are not OK."""
        if self.failure is not None:
            return self.failure
        if not self.packed_error <= self.tolerance:
            return f"its {layout} scores differ from the single ones by {self.packed_error:.3g}"
        return f"the gradient of its {layout} rows differs from that of single sequences by {self.gradient_error:.2g}"


def head_reads_states(model: PreTrainedModel) -> bool:
    """Returns whether a model's head reads what its backbone gives; Electra and RemBERT have a projection between.

    True where the model is scored by its own logits already.
    """
    if not getattr(model, "trl_fast_fused_head", False):
        return True
    width = getattr(model.get_output_embeddings(), "in_features", None)
    with _trying_out(model):
        token = torch.zeros(1, 1, dtype=torch.int64, device=_device_of(model))
        states = backbone(model)(input_ids=token, use_cache=False, return_dict=True).last_hidden_state
    return width in (None, states.shape[-1])


class ImageProbes(NamedTuple):
    """Holds trees with images to try a layout out on, and how the model wants to have images."""

    layout: ImageLayout
    trees: Sequence[Tree]


def verify(
    model: PreTrainedModel, sequences: list[list[int]], *, layout: str | None, images: ImageProbes | None = None
) -> Verdict:
    """Compares our scores of a few short sequences with the model's own logits; in a row of `layout` too, unless None.

    images: trees with images that are compared beside those of the sequences; None: there are none.

    TRL trusts the config to tell what a head does to its logits; a model with a transform that nobody knew is then
    silently trained on another policy. The same goes for architectures that mix the sequences of a row.
    """
    device = _device_of(model)
    trees = probe_trees(sequences, model.config.get_text_config(), images.trees if images else ())
    kind = images.layout if images else None
    alone = _alone(trees, 0, device, kind)
    row = None if layout is None else pack_trees(trees, layout, 0, image_layout=kind).to(device)

    def read(batch: TokenBatch) -> torch.Tensor:
        return score(model, batch).tokens.logprobs

    with _trying_out(model):
        own = torch.cat([_own_logprobs(model, batch) for batch in alone])
        found = _compare(model, alone, row, read)
    fused_error = (found.alone - own).abs().max().item()
    return _verdict(model, fused_error, found, scale=1.0)


def verify_rewards(
    model: PreTrainedModel, sequences: list[list[int]], *, layout: str | None, images: ImageProbes | None = None
) -> Verdict:
    """Compares our rewards of a few short sequences, in a row of `layout`, with those of the same ones alone.

    Differences are shares of the largest reward. images: as in `verify`.

    Raises:
        ValueError: the model's output is not one number a sequence.
    """
    device, config = _device_of(model), model.config.get_text_config()
    kind, pad = images.layout if images else None, config.pad_token_id
    pairs = [[*tree_sequences(tree)][:2] for tree in probe_trees(sequences, config, images.trees if images else ())]
    # The last token may be the pad token, which transformers' classifiers do not read.
    alone = [end_batch(batch, pad).to(device) for batch in _unpadded([*itertools.chain(*pairs)], pad, kind)]
    row = None
    if layout is not None:
        ids, shown = [(first.ids, second.ids) for first, second in pairs], [first.images for first, _ in pairs]
        row = reward_batch(ids, layout, pad, images=shown, image_layout=kind).to(device)

    def read(batch: TokenBatch) -> torch.Tensor:
        return rewards(model, batch)

    with _trying_out(model):
        logits = model(input_ids=alone[0].input_ids[:1], use_cache=False).logits
        if logits.shape != (1, 1):
            raise ValueError(
                f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for one sequence; expected "
                "(1, 1), as AutoModelForSequenceClassification gives with num_labels=1"
            )
        found = _compare(model, alone, row, read)
    return _verdict(model, 0.0, found, scale=found.alone.abs().max().clamp(min=1e-6).item())


def probe_trees(sequences: list[list[int]], config: object, others: Sequence[Tree] = ()) -> list[Tree]:
    """Returns short trees of the tokens of some sequences, in their order, over and over; then the others.

    config: says how many positions a model has; trees that are longer are left out.
    """
    longest = getattr(config, "max_position_embeddings", None) or float("inf")
    tokens = itertools.cycle([token for ids in sequences for token in ids])
    trees = [*(_tree_of(shape, tokens) for shape in _SHAPES), *others]
    return [tree for tree in trees if max(len(each.ids) for each in tree_sequences(tree)) <= longest]


def _tree_of(shape: TreeLengths, tokens: Iterator[int]) -> Tree:
    """Returns a tree of the next tokens."""
    length, *children = shape
    assert isinstance(length, int), "a tree begins with the length of its first segment"
    ids = list(itertools.islice(tokens, length))
    return Tree(
        ids, [_tree_of(c, tokens) if isinstance(c, tuple) else [*itertools.islice(tokens, c)] for c in children]
    )


def _alone(
    trees: list[Tree], pad_token_id: int, device: torch.device, kind: ImageLayout | None = None
) -> list[TokenBatch]:
    """Returns batches of the sequences of some trees, in order, which have no padding."""
    sequences = [each for tree in trees for each in tree_sequences(tree)]
    return [batch.to(device) for batch in _unpadded(sequences, pad_token_id, kind)]


def _unpadded(sequences: Sequence[TokenSequence], pad_token_id: int, kind: ImageLayout | None) -> Iterator[TokenBatch]:
    """Yields batches of sequences that follow each other and have one length; one with images stands alone."""

    def length_and_place(numbered: tuple[int, TokenSequence]) -> tuple[int, int]:
        number, sequence = numbered
        return len(sequence.ids), number if sequence.images else -1

    for _, alike in itertools.groupby(enumerate(sequences), key=length_and_place):
        trees = [Tree(each.ids[: each.start], [each.ids[each.start :]], each.images) for _, each in alike]
        yield pack_trees(trees, PADDED, pad_token_id, image_layout=kind)


@contextmanager
def _trying_out(model: PreTrainedModel) -> Iterator[None]:
    with evaluating(model), whole_in_forward(model), shortened_windows(model, _WINDOW):
        yield


def _verdict(model: PreTrainedModel, fused_error: float, found: _Comparison, scale: float) -> Verdict:
    return Verdict(
        fused_error,
        found.packed_error / scale,
        TOLERANCE.get(model.dtype, 2e-3),
        found.gradient_error,
        _gradient_tolerance(model),
        found.failure,
    )


def _gradient_tolerance(model: PreTrainedModel) -> float:
    return GRADIENT_TOLERANCE.get(model.dtype, GRADIENT_TOLERANCE[torch.float32])


def _device_of(model: PreTrainedModel) -> torch.device:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.device


def _own_logprobs(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, **(batch.images or {}), use_cache=False).logits.float().flatten(0, 1)
    return logits[batch.score_positions].log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)


# ---- a row beside single sequences


class _Comparison(NamedTuple):
    """Holds what single sequences give (N,), and how far a row of them lies from that."""

    alone: torch.Tensor
    packed_error: float = float("inf")
    gradient_error: float = 0.0
    failure: str | None = None


class _Reading(NamedTuple):
    """Holds what is read of a batch.

    - `values` (N,): scores or rewards.
    - `embeddings` (B · T, H): the gradient of a weighted sum of them in the input embeddings; None where it cannot be
      taken.
    - `vectors`: the gradients of some parameters.
    - `images`: the gradients of the batch's images, summed over their first dimension.
    """

    values: torch.Tensor
    embeddings: torch.Tensor | None = None
    vectors: tuple[torch.Tensor, ...] = ()
    images: tuple[torch.Tensor, ...] = ()


def _compare(
    model: PreTrainedModel,
    alone: list[TokenBatch],
    row: TokenBatch | None,
    read: Callable[[TokenBatch], torch.Tensor],
) -> _Comparison:
    """Compares what `read` finds in a row with what it finds in batches of its sequences."""
    if row is None:
        return _Comparison(torch.cat([read(batch) for batch in alone]))
    found: list[_Reading] = []
    for batch in alone:
        found.append(_read_with_gradient(model, batch, read, sum(len(each.values) for each in found)))
    values = torch.cat([each.values for each in found])
    if any((kind.window or 0) > _WINDOW // 2 for kind in layer_kinds(model)):
        with shortened_windows(model, _WINDOW // 2):
            if torch.equal(read(alone[0]), found[0].values):
                return _Comparison(
                    values, failure="its windows cannot be shortened, to be tried out on short sequences"
                )
    together = _read_with_gradient(model, row, read, 0)
    return _Comparison(
        values,
        packed_error=(together.values - values).abs().max().item(),
        gradient_error=_gradient_error(alone, found, row, together, _gradient_tolerance(model)),
    )


def _read_with_gradient(
    model: PreTrainedModel, batch: TokenBatch, read: Callable[[TokenBatch], torch.Tensor], start: int
) -> _Reading:
    """Reads a batch, and takes a gradient if it can be taken. Nothing is added to any parameter's `.grad`.

    start: the number of the batch's first value among all, which says how it is weighted.
    """
    if any(map(is_partitioned, model.parameters())):
        # Weights are whole in forward alone.
        return _Reading(read(batch))
    vectors = [weight for module in mixers_of(model) for weight in module.parameters() if _is_compared(weight)]
    batch, images = _images_as_leaves(batch)
    with torch.enable_grad(), _alone_trainable(model, vectors), _embeddings_as_leaf(model) as leaves:
        values = read(batch)
        numbers = torch.arange(start, start + len(values), device=values.device)
        # Different for each value, without a pattern, all positive.
        weights = 0.5 + numbers * 0.618 % 1
        inputs = [*leaves, *images, *vectors]
        try:
            gradients = torch.autograd.grad((values * weights).sum(), inputs, allow_unused=True)
        except RuntimeError:
            # Some kernels of quantised layers have no backward pass: such a model trains in no layout.
            return _Reading(values.detach())
    given = iter([g if g is not None else torch.zeros_like(x) for g, x in zip(gradients, inputs, strict=True)])
    embeddings = [next(given).flatten(0, 1).float() for _ in leaves]
    of_images = tuple(next(given).sum(0) for _ in images)
    return _Reading(values.detach(), embeddings[0] if embeddings else None, (*given,), of_images)


def _images_as_leaves(batch: TokenBatch) -> tuple[TokenBatch, list[torch.Tensor]]:
    """Returns a batch with images of which a gradient can be taken, and their tensors."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in (batch.images or {}).items()
        if tensor.is_floating_point()
    }
    return (replace(batch, images={**(batch.images or {}), **leaves}) if leaves else batch), [*leaves.values()]


def _is_compared(weight: torch.nn.Parameter) -> bool:
    """Returns whether a parameter of a layer's mixer is compared: a small one that trains, such as sinks or decays."""
    return weight.requires_grad and weight.ndim != 2


@contextmanager
def _alone_trainable(model: PreTrainedModel, weights: list[torch.nn.Parameter]) -> Iterator[None]:
    """Lets only some of the parameters that train do so within the context, so that others cost no memory."""
    kept = {id(weight) for weight in weights}
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in kept]
    for weight in others:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in others:
            weight.requires_grad_(True)


@contextmanager
def _embeddings_as_leaf(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Yields a list that receives the input embeddings of a forward pass, of which a gradient can be taken."""
    leaves: list[torch.Tensor] = []

    def keep(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        # Some models scale their embeddings in place, which a leaf does not allow.
        return leaves[-1].clone()

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield leaves
    finally:
        hook.remove()


def _gradient_error(
    alone: list[TokenBatch], found: list[_Reading], row: TokenBatch, together: _Reading, tolerance: float
) -> float:
    """Returns how far a row's gradients lie from the sums of those of single sequences, as a share of them.

    Tokens that several sequences share are held apart from the others: where a prompt's state loses its graph, only
    theirs are wrong.
    """
    if together.embeddings is None or any(each.embeddings is None for each in found):
        return 0.0
    places = torch.cat(_places(row))
    parts = [each.embeddings[torch.cat(_places(batch))] for batch, each in zip(alone, found, strict=True)]  # type: ignore[index]
    expected = torch.zeros_like(together.embeddings).index_add_(0, places, torch.cat(parts))
    is_shared = torch.bincount(places, minlength=len(expected)) > 1
    pairs = [(together.embeddings[chosen], expected[chosen]) for chosen in (is_shared, ~is_shared)]
    vectors = [*zip(together.vectors, _sums([each.vectors for each in found]), strict=True)]
    images = [*zip(together.images, _sums([each.images for each in found if each.images]), strict=True)]
    errors = [error for each in (pairs, vectors, images) for error in _relative_errors(each, tolerance)]
    return torch.tensor(errors).max().item()


def _sums(gradients: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Returns the sum of each of some tensors over sequences."""
    return [torch.stack(each).sum(0) for each in zip(*gradients, strict=True)]


def _places(batch: TokenBatch) -> list[torch.Tensor]:
    """Returns where the tokens of each sequence stand among the flat positions of a batch."""
    positions = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device)
    return batch.by_sequence(positions.view_as(batch.input_ids))


def _relative_errors(pairs: list[tuple[torch.Tensor, torch.Tensor]], least: float) -> list[float]:
    """Returns how far tensors lie from the expected ones, as shares of those.

    least: the share of all expected ones that is the least scale. Gradients of some parameters are zero in truth and
    rounding in fact.
    """
    total = sum(expected.norm().item() ** 2 for _, expected in pairs) ** 0.5
    return [
        (got - expected).norm().item() / max(expected.norm().item(), least * total, 1e-30) for got, expected in pairs
    ]
