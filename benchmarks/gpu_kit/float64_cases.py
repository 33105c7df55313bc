"""Lists what is compared with float64: the ops in every mode, with every transform, output and formula.

A case computes named tensors, values and gradients: by an op on some backend, and by plain PyTorch. Nothing here is
about GPUs: the tests run the same cases on the CPU, in small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from trl_fast.ops import linear_cross_entropy, linear_logprob, linear_token_loss, pair_loss, policy_loss
from trl_fast.ops.head.row_statistics import OUTPUT_BITS
from trl_fast.ops.pair_formulas import PAIR_FORMULAS
from trl_fast.ops.policy_loss import LOSS_TYPES
from trl_fast.ops.selective_log_softmax import selective_log_softmax_and_entropy
from trl_fast.ops.token_scores import TokenScores

Tensors = dict[str, torch.Tensor]

EVERY_OUTPUT = tuple(OUTPUT_BITS)
WITH_ENTROPY = ("logprobs", "entropy")
EVERY_TRANSFORM = {"softcap": 6.0, "temperature": 0.7, "logit_scale": 0.8}
# Below every probability of these problems that counts: the estimate keeps them all, and is exact.
SPARSE = {"head_grad": "sparse", "sparse_threshold": 2.0**-26}
# Which of hidden, weight and bias train; the last has a head on hidden states that do not.
MODES = {
    "trained": ("hidden", "weight", "bias"),
    "frozen": ("hidden",),
    "scoring": (),
    "head alone": ("weight", "bias"),
}


@dataclass(frozen=True)
class HeadProblem:
    """Holds hidden (N, H), weight (V, H), bias (V,), of one dtype; targets (N,), and each token's weight (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    targets: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def random(cls, rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> HeadProblem:
        """Makes a problem: the target of every third row is by far the likeliest; every seventh row does not count."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(vocab, hidden, generator=generator) * hidden**-0.5
        targets = torch.randint(0, vocab, (rows,), generator=generator)
        x = torch.randn(rows, hidden, generator=generator)
        x[::3] += 12 * F.normalize(weight[targets[::3]], dim=1)
        counts = 1 + torch.randn(rows, generator=generator)
        counts[::7] = 0
        bias = torch.randn(vocab, generator=generator) * 0.5
        return cls(*(t.to(device, dtype) for t in (x, weight, bias)), targets.to(device), counts.to(device))

    def leaves(self, mode: str, dtype: torch.dtype | None = None) -> Tensors:
        """Returns hidden, weight and bias, in `dtype` if given, with gradients wanted as the mode says."""
        return {
            name: getattr(self, name).detach().to(dtype or self.hidden.dtype).requires_grad_(name in MODES[mode])
            for name in ("hidden", "weight", "bias")
        }


@dataclass(frozen=True)
class HeadCase:
    """Holds an op of the head in one mode; `options` are keywords of the op, `bias` whether there is one."""

    op: str
    mode: str
    bias: bool = False
    outputs: tuple[str, ...] = ("logprobs",)
    options: dict = field(default_factory=dict)

    @property
    def what(self) -> str:
        """Names the case for people."""
        named = [f"{name}={value}" for name, value in self.options.items() if name != "sparse_threshold"]
        words = [*(["bias"] if self.bias else []), *named, *(name for name in self.outputs if name != "logprobs")]
        return ", ".join([self.op, self.mode, *words])

    def run(self, problem: HeadProblem, backend: str, workspace_bytes: int) -> Tensors:
        """Computes the case by the op."""
        leaves = problem.leaves(self.mode)
        with torch.set_grad_enabled(bool(MODES[self.mode])):
            found = _RUNS[self.op](self, problem, leaves, {"backend": backend, "workspace_bytes": workspace_bytes})
        return _with_gradients(found, leaves)

    def exact(self, problem: HeadProblem) -> Tensors:
        """Computes the case by whole logits in float64."""
        leaves = problem.leaves(self.mode, torch.float64)
        scores, logits = self._exact_scores(problem, leaves)
        found = {name: getattr(scores, name) for name in self.outputs}
        if self.op == "linear_cross_entropy":
            smoothing, z_loss = (self.options.get(name, 0.0) for name in ("label_smoothing", "z_loss"))
            loss = F.cross_entropy(logits, problem.targets, reduction="sum", label_smoothing=smoothing)
            found = {"loss": loss + z_loss * logits.logsumexp(-1).square().sum()}
        else:
            found["loss"] = summed(self, scores, problem.counts)
        return _with_gradients(found, leaves)

    def _exact_scores(self, problem: HeadProblem, leaves: Tensors) -> tuple[TokenScores, torch.Tensor]:
        logits = leaves["hidden"] @ leaves["weight"].T
        if self.bias:
            logits = logits + leaves["bias"]
        logits = logits * self.options.get("logit_scale", 1.0)
        if softcap := self.options.get("softcap"):
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / self.options.get("temperature", 1.0)
        every = logits.log_softmax(-1)
        scores = TokenScores(
            logprobs=every.gather(1, problem.targets[:, None])[:, 0],
            entropy=-(every.exp() * every).sum(-1),
            log_sum_sq_probs=(2 * every).logsumexp(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == problem.targets,
        )
        return scores, logits


def summed(case: HeadCase, scores: TokenScores, counts: torch.Tensor) -> torch.Tensor:
    """Returns the loss of a case: a weighted sum of log-probs, and of entropies where there are some."""
    loss = -(counts * scores.logprobs).sum()
    return loss + 0.3 * (counts * scores.entropy).sum() if "entropy" in case.outputs else loss


def _run_logprob(case: HeadCase, problem: HeadProblem, leaves: Tensors, where: dict) -> Tensors:
    options = {**case.options, **where, "bias": leaves["bias"] if case.bias else None}
    scores = linear_logprob(leaves["hidden"], leaves["weight"], problem.targets, outputs=case.outputs, **options)
    return {**{name: getattr(scores, name) for name in case.outputs}, "loss": summed(case, scores, problem.counts)}


def _run_cross_entropy(case: HeadCase, problem: HeadProblem, leaves: Tensors, where: dict) -> Tensors:
    options = {**case.options, **where, "bias": leaves["bias"] if case.bias else None}
    given = (leaves["hidden"], leaves["weight"], problem.targets)
    return {"loss": linear_cross_entropy(*given, reduction="sum", **options)}


def _run_token_loss(case: HeadCase, problem: HeadProblem, leaves: Tensors, where: dict) -> Tensors:
    options = {**case.options, **where, "bias": leaves["bias"] if case.bias else None}
    if "group_sizes" in options:
        groups, rest = divmod(len(problem.targets), options["group_sizes"])
        options["group_sizes"] = [options["group_sizes"]] * groups + [rest] * (rest > 0)
    found = linear_token_loss(
        *(leaves["hidden"], leaves["weight"], problem.targets),
        lambda scores, rows: summed(case, scores, problem.counts[rows]),
        outputs=case.outputs,
        **options,
    )
    return {**{name: getattr(found.scores, name) for name in case.outputs}, "loss": found.loss}


def _run_selective(case: HeadCase, problem: HeadProblem, leaves: Tensors, where: dict) -> Tensors:
    logits = leaves["hidden"] @ leaves["weight"].T
    found = selective_log_softmax_and_entropy(logits, problem.targets, **case.options, backend=where["backend"])
    scores = TokenScores(*found)
    return {"logprobs": found[0], "entropy": found[1], "loss": summed(case, scores, problem.counts)}


_RUNS = {
    "linear_logprob": _run_logprob,
    "linear_cross_entropy": _run_cross_entropy,
    "linear_token_loss": _run_token_loss,
    "selective_log_softmax": _run_selective,
}


def _with_gradients(found: Tensors, leaves: Tensors) -> Tensors:
    """Returns the results without gradients, and the loss's gradients of the leaves that want and get one."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = ()
    if wanted:
        gradients = torch.autograd.grad(found["loss"], list(wanted.values()), allow_unused=True)
    by_name = {f"gradient of {name}": grad for name, grad in zip(wanted, gradients, strict=True) if grad is not None}
    return {**{name: value.detach() for name, value in found.items()}, **by_name}


def head_cases() -> Iterator[HeadCase]:
    """Returns every op in every mode: as it is, and with everything that it can have."""
    for mode in MODES:
        for op in ("linear_logprob", "linear_token_loss"):
            yield HeadCase(op, mode)
            yield HeadCase(op, mode, bias=True, outputs=EVERY_OUTPUT, options=EVERY_TRANSFORM)
            yield HeadCase(op, mode, outputs=WITH_ENTROPY)
        yield HeadCase("linear_cross_entropy", mode)
        smoothed = {**EVERY_TRANSFORM, "label_smoothing": 0.1, "z_loss": 1e-3}
        yield HeadCase("linear_cross_entropy", mode, bias=True, options=smoothed)
        yield HeadCase("linear_token_loss", mode, outputs=WITH_ENTROPY, options={"group_sizes": 4})
    for mode in ("trained", "frozen", "head alone"):
        yield HeadCase("linear_logprob", mode, options=SPARSE)
        yield HeadCase("linear_logprob", mode, bias=True, outputs=WITH_ENTROPY, options={**EVERY_TRANSFORM, **SPARSE})
    yield HeadCase("linear_cross_entropy", "trained", options=SPARSE)
    for mode in ("trained", "scoring"):
        yield HeadCase("selective_log_softmax", mode, outputs=WITH_ENTROPY)
        yield HeadCase("selective_log_softmax", mode, outputs=WITH_ENTROPY, options={"temperature": 0.7})


# ---- losses over vectors of tokens


@dataclass(frozen=True)
class LossCase:
    """Holds a loss of log-probs; `run` takes a backend and the dtype of its vectors."""

    op: str
    what: str
    run: Callable[[str, torch.dtype], Tensors]

    def exact(self) -> Tensors:
        """Computes the case by autograd in float64."""
        return self.run("torch", torch.float64)


def loss_cases(device: torch.device, sequences: int = 16, longest: int = 3000) -> Iterator[LossCase]:
    """Yields every formula of pair_loss, and every term of policy_loss on and off policy, with a reference or none."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (sequences,), generator=generator)
    lengths[1], branch = 0, torch.arange(sequences)
    branch = branch.repeat_interleave(lengths)
    logprobs = -0.1 * torch.rand(len(branch), generator=generator)
    sums = torch.zeros(sequences).index_add(0, branch, logprobs)
    ref_sums = sums + 3 * torch.randn(sequences, generator=generator)
    old, ref = (logprobs + size * torch.randn(len(branch), generator=generator) for size in (0.4, 0.7))
    advantages = torch.randn(sequences, generator=generator)
    weights = 1 / (lengths.clamp(min=1) * sequences)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device)
    lengths, branch = lengths.to(device), branch.to(device)

    def in_dtype(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return vector.to(device, dtype)

    def pairs(loss_type: str) -> Callable[[str, torch.dtype], Tensors]:
        def run(backend: str, dtype: torch.dtype) -> Tensors:
            leaf = in_dtype(logprobs, dtype).requires_grad_()
            numbers = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": 0.15, "discopop_tau": 0.4}
            found = pair_loss(leaf, cu_seqlens, in_dtype(ref_sums, dtype), lengths, **numbers, backend=backend)
            losses = found._asdict()
            total = found.losses.sum() + 0.01 * found.sequence_logprobs.sum()
            return _with_gradients({**losses, "loss": total}, {"logprobs": leaf})

        return run

    def policy(loss_type: str, off_policy: bool, reference: bool) -> Callable[[str, torch.dtype], Tensors]:
        def run(backend: str, dtype: torch.dtype) -> Tensors:
            leaf = in_dtype(logprobs, dtype).requires_grad_()
            given = (leaf, in_dtype(old, dtype) if off_policy else None, in_dtype(advantages, dtype), branch)
            options = {"ref_logprobs": in_dtype(ref, dtype), "beta": 0.2} if reference else {}
            found = policy_loss(*given, in_dtype(weights, dtype), loss_type=loss_type, **options, backend=backend)
            values = {name: value for name, value in found._asdict().items() if value is not None}
            return _with_gradients(values, {"logprobs": leaf})

        return run

    for loss_type in PAIR_FORMULAS:
        yield LossCase("pair_loss", f"pair_loss, {loss_type}", pairs(loss_type))
    for loss_type in LOSS_TYPES:
        for off_policy in (True, False):
            for reference in (True, False):
                words = (loss_type, "off policy" if off_policy else "on policy", "KL" if reference else "no reference")
                what = ", ".join(("policy_loss", *words))
                yield LossCase("policy_loss", what, policy(loss_type, off_policy, reference))
