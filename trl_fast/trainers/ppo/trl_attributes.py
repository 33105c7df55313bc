"""Lists the attributes of TRL's last PPO trainer, and where their values are kept here."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from ..base.trl_attributes import TRLAttribute

_MADE_BEFORE = "what it says was done when the trainer was made"
_SEED_STEP = 100003


def _fixed(read: Any) -> TRLAttribute:
    return TRLAttribute(read=read, fixed=_MADE_BEFORE)


def _local_seed(trainer: Any) -> int:
    return trainer.args.seed + trainer.accelerator.process_index * _SEED_STEP


PPO_ATTRIBUTES = {
    "policy_model": _fixed(lambda trainer: trainer.accelerator.unwrap_model(trainer.model)),
    "is_peft_model": _fixed(lambda trainer: isinstance(trainer.policy_model, PeftModel)),
    "stop_token_id": _fixed(lambda trainer: next(iter(trainer.stop_ids), None)),
    "model_adapter_name": TRLAttribute("args.model_adapter_name", fixed=_MADE_BEFORE),
    "ref_adapter_name": TRLAttribute("args.ref_adapter_name", fixed=_MADE_BEFORE),
    "train_dataset_len": _fixed(lambda trainer: len(trainer.train_dataset)),
    "local_seed": _fixed(_local_seed),
    "local_dataloader_batch_size": TRLAttribute("args.local_batch_size", fixed=_MADE_BEFORE),
    "dataloader": _fixed(lambda trainer: trainer.get_train_dataloader()),
    "eval_dataloader": _fixed(lambda trainer: trainer.get_eval_dataloader()),
    "sample_generations_freq": _fixed(
        lambda trainer: max(1, trainer.args.max_steps // max(trainer.args.num_sample_generations, 1))
    ),
}
