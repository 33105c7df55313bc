"""Reads from a trainer what is known of its run before the first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset
from peft import PeftModel

from trl_fast.data import TokenBatch
from trl_fast.modeling.loading import base_model
from trl_fast.ops import supports
from trl_fast.ops.backends import BACKENDS, choose_backend
from trl_fast.ops.device import device_facts

from ..base.parallelism import processes_of_a_row
from ..checkpoints.run_record import package_version
from .facts import KernelFacts, ModelFacts, RunFacts, StepFacts
from .naming import short_name
from .quantities import size_text
from .resident_memory import ResidentMemory, parameter_count, resident_memory
from .token_counts import count_tokens

# Rows from which the tokens of a batch are told before the first one is there; fewer where rows are long.
_SAMPLED_ROWS, _SAMPLED_TOKENS = 64, 1 << 19
# The op by which losses reach the head.
_HEAD_OP = "linear_token_loss"
# Backends that a device of a kind can have, best first.
_BEST_BACKENDS = {"cpu": ("cpp", "torch")}


def read_models(trainer: Any) -> tuple[ModelFacts, ResidentMemory]:
    """Reads a trainer's models, before they are sharded."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    inner = base_model(model)
    counts = [(parameter_count(weight), weight.requires_grad) for weight in model.parameters()]
    facts = ModelFacts(
        name=short_name(inner.config._name_or_path) or type(inner).__name__,
        parameters=sum(count for count, _ in counts),
        trained=sum(count for count, is_trained in counts if is_trained),
        dtype=_dtype(inner, trainer.args),
        adapter=_adapter(model) if isinstance(model, PeftModel) else None,
    )
    beside = [each for each in (getattr(trainer, name, None) for name in ("ref_model", "value_model")) if each]
    return facts, resident_memory([model, *beside], str(getattr(trainer.args.optim, "value", trainer.args.optim)))


def _adapter(model: PeftModel) -> str:
    name = str(model.active_peft_config.peft_type.value)
    return "LoRA" if name == "LORA" else name


def _dtype(model: Any, args: Any) -> str:
    bits = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    weights = str(model.dtype).removeprefix("torch.") if bits is None else f"{bits}-bit"
    products = "bfloat16" if args.bf16 else "float16" if args.fp16 else weights
    return weights if products == weights else f"{weights} weights, {products} products"


def read_run(trainer: Any, models: tuple[ModelFacts, ResidentMemory]) -> RunFacts:
    """Reads what is known of a run when its first step is about to begin.

    models: what `read_models` found.
    """
    model, resident = models
    return RunFacts(
        version=package_version(),
        method=trainer.method,
        model=model,
        kernels=_kernels(trainer),
        checkpointing=_checkpointing(trainer.args),
        resident=resident,
        is_sharded=bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled),
        forecast=trainer.forecast,
        steps=_steps(trainer),
    )


def _kernels(trainer: Any) -> KernelFacts:
    backend, reason = _backend(trainer)
    rows, batches = _sample_batches(trainer)
    counts = count_tokens(batches)
    return KernelFacts(
        backend=backend,
        backend_reason=reason,
        layout=trainer.layout.name,
        layout_reason=trainer.layout.reason,
        saved=counts.saved,
        counted_rows=rows,
        tokens_a_row=counts.seen / rows if rows else None,
    )


def _backend(trainer: Any) -> tuple[str | None, str]:
    """Returns what serves the head, and what it is or why a better one does not; None if there is no such head."""
    inner = base_model(trainer.accelerator.unwrap_model(trainer.model))
    if inner.get_output_embeddings() is None:
        return None, ""
    device, dtype = trainer.args.device, inner.dtype
    chosen = choose_backend(_HEAD_OP, trainer.args.head_backend, device_facts(device), dtype)
    best = next(name for name in BACKENDS if name in _BEST_BACKENDS.get(device.type, BACKENDS))
    if trainer.args.head_backend is not None:
        return chosen, f"head_backend={chosen!r} asks for it"
    return chosen, supports(_HEAD_OP, chosen if chosen == best else best, device, dtype).reason


def _sample_batches(trainer: Any) -> tuple[int, list[TokenBatch]]:
    """Returns the number of the first rows, and their batches; none of streams and of another collator than ours."""
    dataset, reader = trainer.train_dataset, trainer.batches
    if not isinstance(dataset, Dataset) or reader is None or trainer.data_collator is not reader.collator:
        return 0, []
    columns = [name for name in trainer.signature_columns or trainer.token_columns if name in dataset.column_names]
    rows: list[dict[str, Any]] = []
    tokens = 0
    for row in dataset.select_columns(columns).take(_SAMPLED_ROWS):
        rows.append(row)
        tokens += sum(len(value) for value in row.values() if hasattr(value, "__len__"))
        if tokens > _SAMPLED_TOKENS:
            break
    size, collator = trainer.args.per_device_train_batch_size, reader.collator
    if trainer.images is not None:
        collator = replace(collator, images=None)  # no pixels are made to count tokens
    return len(rows), [collator.collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def _checkpointing(args: Any) -> str:
    if not args.gradient_checkpointing:
        return "activation checkpointing off"
    budget = args.activation_budget
    kept = "what fits is kept" if budget is None else f"{size_text(budget)} kept" if budget else ""
    attention = "attention is kept" if args.keeps_attention else ""
    offloaded = "offloaded to the CPU" if args.activation_offloading else ""
    details = [detail for detail in (attention, kept, offloaded) if detail]
    return "activation checkpointing on" + (f" ({', '.join(details)})" if details else "")


def _steps(trainer: Any) -> StepFacts:
    args, state = trainer.args, trainer.state
    return StepFacts(
        steps=state.max_steps,
        first_step=state.global_step,
        epochs=args.num_train_epochs if args.max_steps <= 0 else None,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size // processes_of_a_row(trainer),
        unit=args.unit,
        mini_batches=getattr(args, "num_mini_batches", 1),
        completions=getattr(args, "num_generations", None),
        new_tokens=getattr(args, trainer.length_setting) if hasattr(trainer, "length_setting") else None,
    )
