"""Puts the planned run beside others: other systems' steps, and the same with one setting changed."""

from __future__ import annotations

from dataclasses import dataclass

from trl_fast.settings.batch_layouts import layouts_for

from .fake_models import choose_layout, meta_model
from .memory_sizes import gib
from .memory_timeline import GRADIENTS, OPTIMIZER, REFERENCE, WEIGHTS, Peak
from .peak_estimates import Longest, estimate, longest_context
from .planned_methods import PlannedModels
from .planned_optimizers import keeps_averages
from .roofline.work import Work
from .sharding import SHARINGS, resident, sharing_of
from .step_times import planned_work
from .training_setup import COMPARED_METHODS, FULL_LOGITS, TRL, TrainingSetup

TRL_STEP = "TRL 1.16"
FULL_LOGITS_STEP = "full logits"
# What these are, for the reader of the table.
SYSTEMS_NOTE = (
    "TRL 1.16: padded rows, tiles of logits, float32 sums of gradients. full logits: padded rows, log_softmax over "
    "the logits of every position, the usual step before fused heads."
)
_LORA = {"lora_r": 16, "lora_target_modules": "all-linear"}
_QLORA = {**_LORA, "quantization": "4bit", "nested_quantization": True}
_ALL_WEIGHTS = {"lora_r": None, "quantization": None}


@dataclass(frozen=True)
class Row:
    """Holds a setup's peak and work at the planned length, and with a limit the longest length that fits."""

    name: str
    peak: Peak
    longest: Longest | None = None
    work: Work | None = None


def systems(setup: TrainingSetup) -> list[tuple[str, TrainingSetup]]:
    """Lists the same run by other systems, with what they have too: checkpointing, adapters, activation offloading."""
    if setup.method not in COMPARED_METHODS:
        return [("this plan", setup)]
    theirs = setup.but(system=TRL, tiled_mlp=None, batch_layout="auto", fused_head=True, head_grad="exact")
    found = [("this plan", setup), (TRL_STEP, theirs)]
    if setup.activation_offloading:
        theirs = theirs.but(activation_offloading=False)
        found.append((f"{TRL_STEP}, no activation_offloading", theirs))
    if setup.method != "reward":
        found.append((FULL_LOGITS_STEP, theirs.but(system=FULL_LOGITS)))
    return found


def switches(setup: TrainingSetup, tile_tokens: int) -> list[tuple[str, TrainingSetup]]:
    """Lists the setup itself, and with each setting that buys or costs memory changed.

    tile_tokens: tokens of a tile, where the MLP of the setup runs whole.
    """
    tiled = None if setup.tiled_mlp is not None else tile_tokens
    changes: list[dict] = [
        {"gradient_checkpointing": not setup.gradient_checkpointing},
        *([{"activation_budget_bytes": 0}] if setup.activation_budget != 0 else []),
        {"fused_layers": False if setup.fused_layers else "auto"},
        {"tiled_mlp": tiled},
        {"activation_offloading": not setup.activation_offloading},
    ]
    if tiled is not None and not setup.activation_offloading:
        changes.append({"tiled_mlp": tiled, "activation_offloading": True})
    changes += _adapter_changes(setup)
    layouts = layouts_for(shares_prompts=setup.method != "sft")
    # "auto" is one of them.
    present = choose_layout(meta_model(setup), setup, setup.max_length)
    changes += [{"batch_layout": name} for name in layouts if name != present]
    if setup.method != "reward":
        # The sparse gradient is for a CPU only.
        changes += [{"fused_head": False}, *([{"head_grad": "sparse"}] if setup.device == "cpu" else [])]
    if setup.method == "dpo":
        changes += [{"precompute_ref_log_probs": not setup.precompute_ref_log_probs}]
    changes += _engine_changes(setup)
    changes += [{"dtype": "float32" if setup.dtype == "bfloat16" else "bfloat16"}]
    return [("this plan", setup), *((_name(change), setup.but(**change)) for change in changes)]


def _engine_changes(setup: TrainingSetup) -> list[dict]:
    """Lists the other engines that have ranks train on rows of their own; and fewer micro-batches, larger ones."""
    if setup.num_gpus == 1:
        return []
    found: list[dict] = [{"engine": name} for name in ("ddp", "zero2", "zero3", "fsdp2") if name != setup.engine]
    count = setup.gradient_accumulation_steps
    if sharing_of(setup).accumulates_whole and count > 1:
        size = setup.per_device_train_batch_size * count
        found.append({"per_device_train_batch_size": size, "gradient_accumulation_steps": 1})
    return found


def _adapter_changes(setup: TrainingSetup) -> list[dict]:
    if setup.lora_r is None:
        return [_LORA, _QLORA]
    return [_ALL_WEIGHTS, {"quantization": None if setup.quantization else "4bit", "nested_quantization": True}]


def _name(change: dict) -> str:
    named = {"all weights trained": _ALL_WEIGHTS, "LoRA r=16, all-linear": _LORA, "QLoRA r=16, all-linear": _QLORA}
    named |= {"the model's own logits": {"fused_head": False}}
    for name, known in named.items():
        if change == known:
            return name
    if "quantization" in change:
        return "load_in_4bit=True" if change["quantization"] else "weights not quantized"
    if "engine" in change:
        return f"accelerate_config={SHARINGS[change['engine']].config}"
    return ", ".join(f"{name}={value}" for name, value in change.items())


def compare(name: str, setup: TrainingSetup, max_length: int, limit: int | None, *, with_work: bool = False) -> Row:
    """Simulates one setup. limit: bytes for tensors; with_work: count its work too."""
    peak = estimate(setup, max_length)
    longest = None if limit is None else longest_context(setup, limit, max_length)
    return Row(name, peak, longest, planned_work(setup, max_length, limit) if with_work else None)


def check_resident(setup: TrainingSetup, models: PlannedModels, limit: int) -> None:
    """Makes sure that what is there whatever the length fits, adapters and all.

    Raises:
        ValueError: the weights, gradients and optimizer take more than `limit` bytes; with their sizes.
    """
    own = [weight for model in models.trained for weight in model.parameters()]
    trained = sum(weight.nbytes for weight in own if weight.requires_grad)
    reference = [] if models.reference is None else models.reference.parameters()
    averages = 2 * trained if keeps_averages(setup.optim) else 0
    whole = {WEIGHTS: sum(weight.nbytes for weight in own), REFERENCE: sum(weight.nbytes for weight in reference)}
    parts = resident({**whole, GRADIENTS: trained, OPTIMIZER: averages}, setup)
    if sum(parts.values()) > limit:
        shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        remedies = ["a larger GPU", "more of them (num_gpus)"]
        remedies += [] if setup.dtype != "float32" else ["dtype=bfloat16"]
        remedies += ["use_peft=True"] if setup.lora_r is None else [] if setup.quantization else ["load_in_4bit=True"]
        raise ValueError(
            f"does not fit at any length: {gib(limit)} GiB cannot hold what is there all the time, "
            f"{gib(sum(parts.values()))} GiB ({shown}); take {', '.join(remedies[:-1])} or {remedies[-1]}"
        )
