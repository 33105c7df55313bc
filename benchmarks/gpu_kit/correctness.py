"""Checks every op on every backend that serves here against float64: values and gradients, smallest shapes first.

Then rows without padding, tiled MLPs and offloaded activations against the padded layout, attention, merged and in
parts, against float64, and one head whose logits are more than 2³¹.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_fast.data import TokenBatch, Tree, pack_trees
from trl_fast.data.segments import num_tokens, segments_of, sequences_of
from trl_fast.kernels.linear_scores import Tiles
from trl_fast.modeling.activation_offloading import offload_activations
from trl_fast.modeling.attention.flex import FlexAttention
from trl_fast.modeling.attention.row_attention import AttentionSpec, RowMask
from trl_fast.modeling.attention.tree_attention import attend, attention_spec
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.ops import BACKENDS, linear_logprob, linear_token_loss, supports
from trl_fast.ops.attention_merge import merge_attention
from trl_fast.ops.head.cutlass_scores import CutlassTiles
from trl_fast.ops.head.fused_kernel import (
    FUSED_KERNELS,
    SlicedWeight,
    empty_packed,
    fused_tiles,
    score_rows_fused,
    tiles_of,
)
from trl_fast.ops.head.kept_logits import KeptLogits
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.row_statistics import ENTROPY, ENTROPY_ROW, LOGPROB_ROW
from trl_fast.ops.head.sweep import finish_scores, new_state
from trl_fast.ops.layers import gated_activation, qk_norm_rotary, residual_rms_norm, rms_norm, rotary
from trl_fast.settings.batch_layouts import PACKED, PADDED, SHARED_PREFIX

from ..head_size import Size
from .float64_cases import HeadProblem, Tensors, head_cases, loss_cases
from .heads import peaked_problem
from .phase_context import Kit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative error in the 2-norm of a gradient: some units in the last place of the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Losses of sums of thousands of float32 log-probs.
LOSS_TOLERANCE = 1e-3


class Checked(NamedTuple):
    """Holds a comparison's name, its error, and the error that is allowed."""

    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


# Those whose kernels take long to compile.
_COMPILED_AHEAD = {"layers", "losses", "merged attention", "FlexAttention"}


def run(kit: Kit, names: Sequence[str] = ()) -> None:
    """Runs checks of this module: all, or those of these names."""
    report_checks(kit, checks(kit.device, kit.tiny, names))


def prepare(device: torch.device, tiny: bool, names: Sequence[str] = ()) -> None:
    """Lets kernels be compiled while earlier phases have the GPU, by checks in small; what is wrong is found later."""
    if device.type == "cuda" and not tiny:
        for name, check in checks(device, True, names).items():
            deque(to_the_end(name, check) if name in _COMPILED_AHEAD else (), maxlen=0)


def checks(device: torch.device, tiny: bool, names: Sequence[str]) -> dict[str, Callable[[], Iterator[Checked]]]:
    """Returns the checks for a device by their names, of all or of these names."""
    sizes = {"rows": 22, "hidden": 16, "vocab": 301} if tiny else {}
    every = {
        "heads": functools.partial(check_heads, device, **sizes),
        "fused scores": functools.partial(check_fused_scores, device),
        "many logits": functools.partial(check_many_logits, device, tiny),
        "layers": functools.partial(check_layers, device, scale=1 if tiny else 8),
        "losses": functools.partial(check_losses, device, longest=40 if tiny else 3000),
        "merged attention": functools.partial(check_merged_attention, device, scale=1 if tiny else 64),
        "attention": functools.partial(check_attention, device, scale=1 if tiny else 8),
        "layouts": functools.partial(check_layouts, device),
    }
    if device.type == "cuda":
        every["FlexAttention"] = functools.partial(check_flex_attention, device)
    return {name: check for name, check in every.items() if not names or name in names}


def report_checks(kit: Kit, checks: dict[str, Callable[[], Iterator[Checked]]]) -> None:
    """Runs checks by their names until it is late; adds a fact a failure, and a count a check."""
    for name, check in checks.items():
        passed: Counter[bool] = Counter()
        for found in to_the_end(name, check):
            passed[found.ok] += 1
            if not found.ok:
                kit.facts.add(f"WRONG {found.what}", error=found.error, allowed=found.allowed)
            if kit.late(f"the rest of {name}"):
                break
        kit.facts.add(f"check {name}", right=passed[True], wrong=passed[False])


def to_the_end(name: str, check: Callable[[], Iterator[Checked]]) -> Iterator[Checked]:
    """Yields what a check finds; the last entry is what it raised, if it did."""
    try:
        yield from check()
    except Exception as raised:
        yield Checked(f"{name}: {type(raised).__name__}: {raised}", float("inf"), 0.0)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Computes the relative error in the 2-norm; NaN counts as infinite."""
    exact = exact.double()
    found = ((got.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()
    return float("inf") if found != found else found


def compare(what: str, run: Callable[[], Tensors], exact: Callable[[], Tensors], tolerance: float) -> Checked:
    """Returns the largest of the errors, and whose it is; infinite if something raised."""
    try:
        got, wanted = run(), exact()
        errors = {name: relative_error(got[name], value) for name, value in wanted.items()}
    except Exception as raised:
        return Checked(f"{what}: {type(raised).__name__}: {raised}", float("inf"), tolerance)
    worst = max(errors, key=errors.__getitem__)
    return Checked(f"{what}: {worst}", errors[worst], tolerance)


def backends_for(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Returns the backends that serve an op here."""
    return [backend for backend in BACKENDS if supports(op, backend, device, dtype).ok]


def check_heads(device: torch.device, rows: int = 300, hidden: int = 128, vocab: int = 32003) -> Iterator[Checked]:
    """Checks every op of the head in every mode, on every backend and in every dtype."""
    for dtype in DTYPES:
        problem = HeadProblem.random(rows, hidden, vocab, dtype, device)
        for case in head_cases():
            if device.type != "cpu" and case.options.get("head_grad") == "sparse":
                continue
            exact = functools.cache(functools.partial(case.exact, problem))
            for backend in backends_for(case.op, device, dtype):
                # A few row blocks.
                run = functools.partial(case.run, problem, backend, rows * vocab * 4 // 3)
                what = f"{case.what}, {backend}, {dtype}".replace("torch.", "")
                yield compare(what, run, exact, TOLERANCE[dtype])


# A layer's op on heads (B, heads, T, D) and a weight (D,), with angles (cos, sin) of (1, T, D).
LAYERS: dict[str, Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]] = {
    "rms_norm": lambda x, w, angles, **way: rms_norm(x, w, 1e-6, cast="gemma", **way),
    "residual_rms_norm": lambda x, w, angles, **way: residual_rms_norm(x[:1], x[1:], w, 1e-6, **way),
    "gated_activation": lambda x, w, angles, **way: gated_activation(x * w, x, "gelu", **way),
    "rotary": lambda x, w, angles, **way: rotary(x[:, :2] * w, x[:, 2:], *angles, **way),
    "qk_norm_rotary": lambda x, w, angles, **way: qk_norm_rotary(x[:, :2], x[:, 2:], w, w, 1e-6, *angles, **way),
}


def check_layers(device: torch.device, scale: int = 8) -> Iterator[Checked]:
    """Checks the ops of a layer, results and gradients, on every backend and in every dtype."""
    for (op, function), dtype, width in itertools.product(LAYERS.items(), DTYPES, (64, 14)):
        generator = torch.Generator().manual_seed(0)
        sizes = ((2, 4, 16 * scale + 3, width), (width,), (1, 16 * scale + 3, width), (1, 16 * scale + 3, width))
        given = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
        exact = functools.partial(_layer, function, [tensor.double() for tensor in given], "torch")
        for backend in backends_for(op, device, dtype):
            run = functools.partial(_layer, function, given, backend)
            yield compare(f"{op}, {backend}, {dtype}, {width}".replace("torch.", ""), run, exact, TOLERANCE[dtype])


def _layer(function: Callable[..., Any], given: list[torch.Tensor], backend: str) -> Tensors:
    x, weight, *angles = (tensor.detach().clone() for tensor in given)
    out = function(x.requires_grad_(), weight.requires_grad_(), angles, backend=backend)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [torch.linspace(-1, 1, part.numel()).view(part.shape).to(part) for part in outs]
    torch.autograd.backward(outs, upstream)
    results = {f"result {i}": part.detach() for i, part in enumerate(outs)}
    return {**results, "gradient of x": x.grad, "gradient of the weight": weight.grad}


def check_losses(device: torch.device, longest: int = 3000) -> Iterator[Checked]:
    """Checks the losses over vectors of tokens on every backend and in every dtype."""
    for case in loss_cases(device, longest=longest):
        for backend in backends_for(case.op, device, torch.float32):
            run = functools.partial(case.run, backend, torch.float32)
            yield compare(f"{case.what}, {backend}", run, case.exact, LOSS_TOLERANCE)


def check_merged_attention(device: torch.device, scale: int = 64) -> Iterator[Checked]:
    """Checks attention over two sets of keys on every backend and in every dtype, rows of packs and others.

    Every third token has no second set; a log-sum-exp of -∞ in either set leaves the other's output.
    """
    tokens = 16 * scale + 3
    for dtype, (width, heads) in itertools.product(DTYPES, ((64, 4), (96, 2), (13, 3), (128, 1), (256, 2))):
        generator = torch.Generator().manual_seed(0)
        place = torch.full((tokens,), -1, dtype=torch.int32)
        chosen = torch.arange(tokens)[torch.arange(tokens) % 3 > 0]
        place[chosen] = torch.randperm(len(chosen), generator=generator).int()
        outs = [torch.randn(heads, n, width, generator=generator).to(dtype) for n in (tokens, len(chosen))]
        lses = [3 * torch.randn(heads, n, generator=generator) for n in (tokens, len(chosen))]
        lses[0][0, chosen[:7]] = lses[1][0, place[chosen[7:]].long()[:7]] = float("-inf")
        # Heads first, as some kernels give them.
        given = [outs[0].transpose(0, 1), lses[0], outs[1].transpose(0, 1), lses[1], place]
        given = [tensor.to(device) for tensor in given]
        exact = functools.partial(_merged_exactly, *given)
        for backend in backends_for("attention_merge", device, dtype):
            run = functools.partial(_merged, backend, *given)
            what = f"merged attention, {backend}, {dtype}, {heads} heads of {width}".replace("torch.", "")
            yield compare(what, run, exact, TOLERANCE[dtype])


def _merged(backend: str, *given: torch.Tensor) -> Tensors:
    return dict(zip(("out", "lse"), merge_attention(*given, backend=backend), strict=True))


def _merged_exactly(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, place: torch.Tensor
) -> Tensors:
    index = place.clamp(min=0).long()
    second = other_lse[:, index].masked_fill(place < 0, float("-inf"))
    both = torch.stack((lse, second)).double()
    shares = both.softmax(0).transpose(1, 2)[..., None]
    return {"out": shares[0] * out.double() + shares[1] * other[index].double(), "lse": both.logsumexp(0)}


def check_attention(device: torch.device, scale: int = 8) -> Iterator[Checked]:
    """Checks attention of a row of trees against whole masked scores in float64, over widths and groupings.

    Without and with a sliding window, sinks, and runs of image tokens.
    """
    nested = (16 * scale, (9 * scale, 7, (5 * scale, 3)), 11 * scale)
    in_prompt = ((1, 7 * scale), (7 * scale, 7 * scale + 1), (9 * scale, 16 * scale))
    rows = (
        RowMask(((5, 3, 4),)),
        RowMask(((7, 2, 0, 3), (0, 4, 2), (6,))),
        RowMask((tuple(length * scale for length in (16, 9, 7)), (3 * scale, 21 * scale))),
        RowMask((nested, (4, 3))),
        RowMask((nested, (4, 3)), 6 * scale),
        RowMask(((40 * scale,), (16 * scale, 0, 2)), 16 * scale),
        RowMask(((5, 3, 4), (3,)), 2),
        RowMask((nested, (4, 3)), None, in_prompt),
        RowMask((nested, (4, 3)), 3 * scale, in_prompt),
        RowMask((nested, (4, 3)), 3 * scale, in_prompt, whole_runs=True),
    )
    for row in rows:
        for width, heads, groups in ((64, 4, 2), (80, 2, 2), (128, 4, 1), (256, 2, 1)):
            for dtype in DTYPES:
                what = f"attention of {row}, {heads}/{groups} heads of {width}, {dtype}"
                tokens = sum(map(num_tokens, row.trees))
                generator = torch.Generator().manual_seed(0)
                shapes = ((heads, tokens, width), (groups, tokens, width), (groups, tokens, width))
                given = [torch.randn(1, *shape, generator=generator).to(device, dtype) for shape in shapes]
                if width != 80:
                    given.append(torch.linspace(-1, 2, heads, device=device))
                upstream = torch.randn(1, *shapes[0], generator=generator).to(device, dtype)
                ours, masked = (functools.partial(attention, row) for attention in (_in_parts, _masked_attention))
                run = functools.partial(_attend, ours, given, upstream)
                exact = functools.partial(_attend, masked, [t.double() for t in given], upstream)
                yield compare(what.replace("torch.", ""), run, exact, TOLERANCE[dtype])


class FlexCase(NamedTuple):
    """Holds what FlexAttention is compiled for: heads, their widths, a dtype and a cap of the scores."""

    heads: tuple[int, int]
    width: int
    value_width: int
    dtype: torch.dtype
    softcap: float | None

    def __str__(self) -> str:
        heads, groups = self.heads
        widths = f"{self.width}/{self.value_width}"
        cap = "" if self.softcap is None else f", scores capped at {self.softcap:g}"
        return f"FlexAttention, {heads}/{groups} heads of {widths}, {self.dtype}{cap}".replace("torch.", "")


# Gemma 4's global layers, Gemma 2 and DeepSeek's latent attention; a model in float32.
FLEX_CASES = (
    FlexCase((8, 1), 512, 512, torch.bfloat16, None),
    FlexCase((8, 4), 256, 256, torch.bfloat16, 50.0),
    FlexCase((4, 4), 192, 128, torch.float16, None),
    FlexCase((14, 2), 64, 64, torch.float32, None),
)
# Rows of all lengths, one with images; the last one nests.
FLEX_ROWS = (
    RowMask(((700, 120, 90), (33, 20)), runs=((40, 300), (310, 650))),
    RowMask(((512,),)),
    RowMask(((1500, 40, (300, 20, 10)), (200, (5, 3, 100), 7))),
)


def check_flex_attention(device: torch.device) -> Iterator[Checked]:
    """Checks FlexAttention, compiled for a GPU, against whole masked scores, and that it is compiled once."""
    for case in FLEX_CASES:
        before = None
        for row in FLEX_ROWS:
            generator = torch.Generator().manual_seed(0)
            tokens = sum(map(num_tokens, row.trees))
            sizes = [(case.heads[0], case.width), (case.heads[1], case.width), (case.heads[1], case.value_width)]
            made = (torch.randn(1, tokens, *size, generator=generator).transpose(1, 2) for size in sizes)
            given = [states.to(device, case.dtype) for states in made]
            spec = AttentionSpec(row, case.width**-0.5, case.softcap)
            serves, reason = FlexAttention.supports(given[0], given[2], spec)
            if not serves:
                yield Checked(f"{case}: {reason}", float("inf"), 0.0)
                break
            upstream = torch.randn(1, case.heads[0], tokens, case.value_width, generator=generator)
            flex = functools.partial(_flex_output, spec=spec)
            exact = functools.partial(_masked_attention, row, softcap=case.softcap)
            yield compare(
                f"{case}, {row}",
                functools.partial(_attend, flex, given, upstream.to(device)),
                functools.partial(_attend, exact, [t.double() for t in given], upstream.to(device)),
                TOLERANCE[case.dtype],
            )
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            yield Checked(f"{case}, {row}: compiled once more", 0.0 if before in (None, compiled) else 1.0, 0.0)
            before = compiled


def _flex_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    return FlexAttention.attention(query, key, value, spec)[0]


def _attend(attention: Callable[..., torch.Tensor], given: list[torch.Tensor], upstream: torch.Tensor) -> Tensors:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    out = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    names = ("query", "key", "value", "sinks")[: len(leaves)]
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def _in_parts(
    row: RowMask,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return attend(query, key, value, attention_spec(query, row), sinks)


def _masked_attention(
    row: RowMask,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes attention by the scores of all pairs of tokens, with those masked that do not see each other."""
    segments = segments_of(row.trees)
    sees = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool)
    for sequence in sequences_of(row.trees):
        tokens = [torch.arange(segments[number].start, segments[number].end) for number in sequence]
        places, order = torch.cat(tokens), torch.arange(sum(map(len, tokens)))
        behind = order[:, None] - order
        sees[places[:, None], places] = (behind >= 0) & (behind < (row.window or len(order)))
    for start, end in row.runs:
        run = sees[start:end, start:end]
        run |= torch.ones_like(run) if row.whole_runs else torch.ones_like(run).triu()
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees.to(query.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(1, -1, scores.shape[2], 1)], dim=-1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value


def random_model(device: torch.device, dtype: torch.dtype, hidden: int = 256) -> torch.nn.Module:
    """Returns a random model with grouped-query heads of 64 channels, ready to be scored."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4, vocab_size=1000)
    heads = dict(num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=1 << 15)).to(device, dtype)
    attach_scoring(model)
    return model


def some_pairs() -> list[Tree]:
    """Returns pairs whose lengths are all different."""
    return [Tree([*range(5, 30 + i)], [[*range(40, 90 + 9 * i)], [*range(200, 230 + i)]]) for i in range(4)]


def score_and_backward(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Returns the log-probs of a batch; the gradients of a loss of them are the model's."""
    model.zero_grad()
    logprobs = score(model, batch).tokens.logprobs
    logprobs.square().mean().backward()
    return logprobs


def score_and_gradient(model: torch.nn.Module, layout: str, device: torch.device, trees: list[Tree]) -> Tensors:
    """Returns the log-probs of some pairs, and all gradients as one vector."""
    logprobs = score_and_backward(model, pack_trees(trees, layout, 0).to(device))
    gradients = torch.cat([weight.grad.double().flatten() for weight in model.parameters()])
    return {"log-probs": logprobs.detach().double(), "gradients": gradients}


def check_layouts(device: torch.device) -> Iterator[Checked]:
    """Checks a small random model in rows without padding, then its MLPs in tiles, then offloaded activations.

    In float32 a GPU has no flash kernel: attention of these short rows is by plain PyTorch.
    """
    pairs = some_pairs()
    for dtype in (torch.float32, torch.bfloat16):
        model, name = random_model(device, dtype), str(dtype).removeprefix("torch.")
        padded = score_and_gradient(model, PADDED, device, pairs)
        use_segment_attention(model)
        changes = {"as it is": lambda: None, "tiled MLPs": lambda model=model: tile_mlps(model, 128)}
        for change, apply in changes.items():
            apply()
            for layout in (PACKED, SHARED_PREFIX):
                got = score_and_gradient(model, layout, device, pairs)
                for what, exact in padded.items():
                    error = relative_error(got[what], exact)
                    yield Checked(f"{what} in {layout}, {change}, {name}", error, TOLERANCE[dtype])
        kept = score_and_gradient(model, SHARED_PREFIX, device, pairs)
        offload_activations(model)
        offloaded = score_and_gradient(model, SHARED_PREFIX, device, pairs)
        for what, exact in kept.items():
            yield Checked(f"{what}, activations offloaded, {name}", relative_error(offloaded[what], exact), 0.0)


def check_fused_scores(device: torch.device, vocab: int = 32003, rows: int = 300) -> Iterator[Checked]:
    """Checks log-probs and entropies of the fused kernels, which sum in float32, and that keeping changes no bit."""
    if fused_tiles("triton", 128, torch.bfloat16, device) is None:
        return
    for kernel, dtype in itertools.product(FUSED_KERNELS, (torch.bfloat16, torch.float16)):
        problem = HeadProblem.random(rows, 128, vocab, dtype, device)
        tiles, _ = tiles_of(kernel, device)
        for transform in (LogitTransform(), LogitTransform(0.8, 5.0, 1.5)):
            if tiles is not None and (tiles.capped or not transform.softcap):
                yield from _check_fused(problem, transform, tiles, f"{kernel}, {dtype}")


def _check_fused(
    problem: HeadProblem, transform: LogitTransform, tiles: Tiles | CutlassTiles, label: str
) -> Iterator[Checked]:
    """Checks the fused kernel's log-probs and entropies against float64, without room for logits and with."""
    (rows, _), vocab, device = problem.hidden.shape, len(problem.weight), problem.hidden.device
    room = empty_packed(rows, vocab, device, tiles.columns)
    if transform.softcap:
        room = KeptLogits(torch.empty(room.values.shape, device=device), None, vocab)
    found = []
    for keep in (None, room):
        state = new_state(rows, device)
        given = (problem.hidden, SlicedWeight.whole(problem.weight), problem.targets, None, transform)
        score_rows_fused(*given, ENTROPY, state, keep, tiles, 1 << 30)
        found.append(finish_scores(state, ENTROPY, vocab, torch.float32))
    u, _ = transform.apply(problem.hidden.double() @ problem.weight.double().T, None)
    logp = u.log_softmax(-1)
    chosen, entropy = logp.gather(1, problem.targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(-1)
    for name, row, exact in (("log-probs", LOGPROB_ROW, chosen), ("entropies", ENTROPY_ROW, entropy)):
        what = f"fused scores, {name}, {label}{', capped' if transform.softcap else ''}".replace("torch.", "")
        yield Checked(what, relative_error(found[0][row], exact), TOLERANCE[torch.float32])
        yield Checked(f"{what}, kept", relative_error(found[1][row], found[0][row].double()), 0.0)


def check_many_logits(device: torch.device, tiny: bool) -> Iterator[Checked]:
    """Checks a head with N·V > 2³¹, where offsets of 32 bits wrap: some rows against float64, gradients too."""
    size = Size(24, 32, 700) if tiny else Size(18000, 256, 131072)
    problem = peaked_problem(size, device).for_mode("trained")
    rows = torch.linspace(0, size.rows - 1, 16, device=device).long()
    exact = (problem.hidden[rows].double() @ problem.weight.double().T).log_softmax(-1)
    exact = exact.gather(1, problem.targets[rows, None])[:, 0].detach()
    # bfloat16 logits, which only a CPU has, are off by more.
    tolerance = TOLERANCE[torch.float32 if device.type == "cuda" else torch.bfloat16]
    for backend in backends_for("linear_logprob", device, torch.bfloat16):
        if backend == "torch" and not tiny:
            continue
        given = (problem.hidden, problem.weight, problem.targets)
        scores = linear_logprob(*given, backend=backend).logprobs
        yield Checked(f"{size}, log-probs, {backend}", relative_error(scores[rows].detach(), exact), tolerance)
        by_op = torch.autograd.grad((scores * problem.upstream).sum(), given[:2])
        loss = linear_token_loss(*given, lambda s, r: (s.logprobs * problem.upstream[r]).sum(), backend=backend).loss
        by_token = torch.autograd.grad(loss, given[:2])
        for name, one, two in zip(("hidden", "weight"), by_op, by_token, strict=True):
            what = f"{size}, gradient of {name}, linear_logprob against linear_token_loss, {backend}"
            yield Checked(what, relative_error(one, two), TOLERANCE[torch.bfloat16])
