"""Describes a run in its checkpoints, and tells how another run differs from it."""

from __future__ import annotations

import importlib.metadata
import json
import uuid
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from trl_fast.data import AnyDataset
from trl_fast.modeling.loading import base_model
from trl_fast.parallel.engines import original_class
from trl_fast.parallel.partitions import whole_shape, whole_size

# Rows of the dataset that are hashed, spread over all of it.
_SAMPLED_ROWS = 16
# Settings that change nothing of what is learned, by how their names begin.
_WITHOUT_EFFECT = (
    *("output_dir", "logging_", "log_", "save_", "eval_", "per_device_eval_", "num_generations_eval", "report_to"),
    *("run_name", "project", "trackio_", "hub_", "push_to_hub", "disable_tqdm", "resume_from_checkpoint", "do_"),
    *("load_best_model", "metric_for_best", "greater_is_better", "debug", "skip_memory", "include_", "local_rank"),
    *("dataloader_num", "dataloader_pin", "dataloader_pers", "dataloader_prefetch", "dataset_num_proc", "ddp_"),
    *("enable_jit_checkpoint", "restore_callback", "ignore_data_skip", "num_completions_to_print", "torch_empty"),
    *("num_sample_generations", "batch_eval_metrics", "prediction_loss_only", "use_cpu", "auto_find_batch_size"),
    *("head_backend", "head_workspace", "activation_", "gradient_checkpointing", "trust_remote_code", "model_init"),
    *("vllm_server_", "vllm_group", "vllm_gpu_memory", "accelerator_config", "push_", "warmup_ratio", "run_report"),
)

# Settings that are part of an optimizer's state, and of the schedule's.
_KEPT_BY_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


class RunRecord:
    """Holds what tells one run from another: method, model, data, settings.

    Args:
        trainer: its arguments, model and training data are described as they are now.
        method: the method's name.
        token_columns: the dataset's columns that are hashed, as far as it has them; without any, all are.
    """

    def __init__(self, trainer: Trainer, method: str, token_columns: Sequence[str]) -> None:
        self.run_id = uuid.uuid4().hex
        args = trainer.args
        assert trainer.model is not None and args is not None, "a trainer that has started has both"
        self.values: dict[str, Any] = {
            "method": method,
            "trl_fast": package_version(),
            "model": _describe_model(trainer.accelerator.unwrap_model(trainer.model)),
            "data": _describe_data(trainer.train_dataset, token_columns),
            "settings": {
                **{name: _text(value) for name, value in args.to_dict().items() if _matters(name, value)},
                "processes": _text(args.world_size),
            },
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns the record's entries, as JSON holds them."""
        return {"run": self.run_id, **self.values}

    def find_conflict(self, saved: dict[str, Any], *, same_data: bool) -> str | None:
        """Returns why this run cannot go on from another's checkpoint; None if it can.

        saved: the checkpoint's record. same_data: whether the place in the data is taken from the checkpoint too.
        """
        mine = self.values
        if saved.get("method") != mine["method"]:
            return f"it is one of {saved.get('method')!r}, this run is {mine['method']!r}"
        theirs, ours = saved.get("model") or {}, mine["model"]
        if theirs.get("class") != ours["class"]:
            return f"its model is a {theirs.get('class')}, this run's a {ours['class']}"
        if theirs.get("adapters") != ours["adapters"]:
            return f"its adapters are {_adapters(theirs)}, this run's {_adapters(ours)}"
        if theirs.get("tensors") != ours["tensors"]:
            return (
                f"its {ours['class']} has other weights ({theirs.get('parameters'):,} parameters, this run's has "
                f"{ours['parameters']:,})"
            )
        then, now = (json.loads((record.get("settings") or {}).get("optim", "null")) for record in (saved, mine))
        if then and _family(then) != _family(now) and not saved.get("weights_only"):
            return f"its optimizer is {then!r}, and this run's, {now!r}, cannot read its state; set optim={then!r}"
        if same_data and saved.get("data") != mine["data"]:
            return (
                f"its data were others ({_rows(saved.get('data'))}, this run's {_rows(mine['data'])}), so its place "
                "in them means nothing here; ignore_data_skip=True goes on with these data from their beginning"
            )
        return None

    def changes(self, saved: dict[str, Any]) -> list[str]:
        """Returns settings that were others when a checkpoint was written, as "name=then (now: now)".

        The optimizer's own come back with its state, as in transformers, and the new ones do not count; this is said.
        """
        then, now = saved.get("settings") or {}, self.values["settings"]
        shared = [name for name in now if name in then and then[name] != now[name]]
        kept = () if saved.get("weights_only") else _KEPT_BY_THE_OPTIMIZER
        notes = dict.fromkeys(kept, ", which does not count: the optimizer's state holds the first")
        changes = [f"{name}={then[name]} (now {now[name]}{notes.get(name, '')})" for name in shared]
        if saved.get("trl_fast") != self.values["trl_fast"]:
            changes.append(f"trl_fast {saved.get('trl_fast')} (now {self.values['trl_fast']})")
        return changes


def package_version() -> str:
    """Returns trl_fast's version, or words for one that is not installed."""
    try:
        return importlib.metadata.version("trl_fast")
    except importlib.metadata.PackageNotFoundError:
        return "from its source tree"


def _matters(name: str, value: object) -> bool:
    return not name.startswith(_WITHOUT_EFFECT) and not (isinstance(value, str) and value.startswith("<"))


def _family(optimizer: str) -> str:
    """Returns the name under which optimizers with one kind of state go."""
    return optimizer.removesuffix("_fused")


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _describe_model(model: torch.nn.Module) -> dict[str, Any]:
    inner, digest, count = base_model(cast(PreTrainedModel, model)), blake2b(digest_size=16), 0
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(whole_shape(weight))};".encode())
        count += whole_size(weight)
    adapters: dict[str, str] = {}
    if isinstance(model, PeftModel):
        for name, config in model.peft_config.items():
            options = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
            kept = {key: options.get(key) for key in ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora")}
            adapters[name] = _text(kept)
    return {
        "class": original_class(inner).__name__,
        "parameters": count,
        "tensors": digest.hexdigest(),
        "adapters": adapters,
    }


def _describe_data(dataset: AnyDataset | None, columns: Sequence[str]) -> dict[str, Any]:
    """Describes a dataset by its number of rows and a few of them; a stream by nothing."""
    if not isinstance(dataset, Dataset):
        return {"rows": None, "digest": None}
    known = [name for name in columns if name in dataset.column_names]
    digest = blake2b(digest_size=16)
    for row in _sampled_rows(dataset.select_columns(known) if known else dataset):
        digest.update(_text(row).encode())
    return {"rows": len(dataset), "digest": digest.hexdigest()}


def _sampled_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    last = len(dataset) - 1
    for index in sorted({last * step // (_SAMPLED_ROWS - 1) for step in range(_SAMPLED_ROWS)}):
        yield dataset[index]


def _rows(data: dict[str, Any] | None) -> str:
    rows = (data or {}).get("rows")
    return "a stream" if rows is None else f"{rows:,} rows"


def _adapters(model: dict[str, Any]) -> str:
    found = model.get("adapters") or {}
    return ", ".join(f"{name} {options}" for name, options in found.items()) or "none"
