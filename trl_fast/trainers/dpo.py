"""DPOTrainer: TRL's constructor and behaviour, on packed batches and the fused head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import TOKEN_COLUMNS, DataCollatorForPreference, TokenBatch, prepare_preference_dataset
from trl_fast.data.collator import REFERENCE_COLUMNS
from trl_fast.losses.dpo import PreferenceTable, dpo_loss, dpo_metrics
from trl_fast.modeling.loading import base_model, disable_dropout, load_causal_lm
from trl_fast.modeling.reference import (
    copy_adapter_as_reference,
    copy_as_reference,
    freeze,
    reference_scope,
    weights_hash,
    with_reference_columns,
)
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.tiled_mlp import tile_mlps

from .base import AnyDataset, BaseTrainer, older_tokenizer_name, router_coefficient
from .callbacks import SyncRefModelCallback
from .dpo_config import DPOConfig


class DPOTrainer(BaseTrainer):
    """Direct Preference Optimization (arXiv 2305.18290) and its relatives.

    Args:
        model: a name, a causal language model, or a PeftModel.
        ref_model: the reference policy, an object or (as older versions allowed) a name; None: the policy as it is
            now, which with PEFT is the same model with its adapter off.
        args: a DPOConfig; TRL's own is accepted too.
        train_dataset, eval_dataset: rows of (prompt,) chosen, rejected, plain or conversational; or tokenized.
            eval_dataset may be a dict of datasets.
        processing_class: the tokenizer; None loads the model's. `tokenizer` is its older name.
        The others are those of transformers.Trainer; `quantization_config` needs a model given by name. Fields of
        DPOConfig that older versions of TRL took here are accepted.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "dpo"
    shares_prompts = True
    config_class = DPOConfig
    token_columns = TOKEN_COLUMNS
    signature_columns = (*TOKEN_COLUMNS, *REFERENCE_COLUMNS)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        args = self.resolve_config(args, model).with_older_arguments(type(self), older)
        self.check_dataset_type(train_dataset, "train_dataset")
        if isinstance(model, torch.nn.Module) and ref_model is model:
            raise ValueError("ref_model is the very object of model; leave it out to use a copy of the policy")
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        self.loss_config = args.loss_config()
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        self.ref_model = self._make_reference(model, ref_model, args, peft_config)
        came_with_adapter = isinstance(model, PeftModel)
        model = self.adapt(model, peft_config, args)
        if came_with_adapter:
            self._prepare_adapters(model, args)
        layout = self.choose_layout(base_model(model), args, _sample_sequences(train_dataset))
        if self.ref_model is not None:
            self._prepare_reference(base_model(model), args)
        self.router_aux_loss_coef = router_coefficient(base_model(model), args.router_aux_loss_coef)
        super_collator = DataCollatorForPreference(
            pad_token_id=processing_class.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of if layout == "padded" else None,
            layout=layout,
        )
        self.start(
            model=model,
            args=args,
            data_collator=data_collator or super_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._place_reference()
        if args.precompute_ref_log_probs:
            self._precompute_all()

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: DPOConfig, name: str
    ) -> AnyDataset:
        return prepare_preference_dataset(
            dataset,
            processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            num_proc=args.dataset_num_proc,
            name=name,
        )

    # ---- the reference

    def _make_reference(
        self,
        model: PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None,
        args: DPOConfig,
        peft_config: PeftConfig | None,
    ) -> PreTrainedModel | None:
        with_adapter = peft_config is not None or isinstance(model, PeftModel)
        if args.sync_ref_model and with_adapter and ref_model is None:
            raise NotImplementedError(
                "sync_ref_model=True needs a reference model of its own, but with PEFT the reference is the same "
                "model without its adapter; give a ref_model or set sync_ref_model=False"
            )
        if isinstance(ref_model, str):
            options = args.ref_model_init_kwargs or {"dtype": model.dtype}
            return freeze(load_causal_lm(ref_model, **options))
        if ref_model is not None:
            return freeze(ref_model)
        if with_adapter or args.reference_free or args.precompute_ref_log_probs:
            return None
        return copy_as_reference(model)

    def _prepare_adapters(self, model: PeftModel, args: DPOConfig) -> None:
        if args.model_adapter_name is not None:
            model.set_adapter(args.model_adapter_name)
        # Training goes on from the adapter that the model came with, so a frozen copy of it is the reference.
        if self.ref_model is None and args.ref_adapter_name is None:
            copy_adapter_as_reference(model)

    def _prepare_reference(self, policy: PreTrainedModel, args: DPOConfig) -> None:
        inner = base_model(self.ref_model)
        attach_scoring(inner)
        inner.trl_fast_fused_head = policy.trl_fast_fused_head
        inner.set_attn_implementation(policy.config.get_text_config()._attn_implementation)
        if args.disable_dropout:
            disable_dropout(inner)
        if args.tiled_mlp is not None:
            tile_mlps(inner, args.tiled_mlp)

    def _place_reference(self) -> None:
        if self.ref_model is None:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError("a separate ref_model with DeepSpeed or FSDP is not supported yet; use PEFT")
        self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

    @torch.no_grad()
    def compute_ref_log_probs(self, batch: TokenBatch) -> torch.Tensor:
        """Log-probs of each sequence (S,) float32 under the reference, summed as the loss sums the policy's."""
        if self.args.reference_free:
            return torch.zeros(len(batch), device=batch.targets.device)
        if "ref_chosen_logps" in batch.extras:
            pair = (batch.extras["ref_chosen_logps"], batch.extras["ref_rejected_logps"])
            return torch.stack(pair, dim=1).flatten()
        model = self.model if self.ref_model is None else self.ref_model
        scope = self.accelerator.unwrap_model(self.model) if self.ref_model is None else None
        with reference_scope(scope, self.args.ref_adapter_name), self.compute_loss_context_manager():
            tokens = self.score(model, batch, ("logprobs",)).tokens
        return _preference_table(batch).sequence_logprobs(tokens.logprobs, self.loss_config.ld_alpha)

    def _precompute_all(self) -> None:
        key = (
            weights_hash(self.accelerator.unwrap_model(self.ref_model or self.model)),
            self.args.ref_adapter_name,
            self.args.max_length,
            self.args.truncation_mode,
            self.loss_config.ld_alpha,
        )
        self._reference_key = key
        self.train_dataset = self._with_reference(self.train_dataset, "train", self.args.train_batch_size)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._with_reference(dataset, name, self.args.eval_batch_size)
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, "eval", self.args.eval_batch_size)

    def _with_reference(self, dataset: AnyDataset, name: str, batch_size: int) -> Dataset:
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"precompute_ref_log_probs=True needs a dataset of known length, but {name} is a stream")

        def compute() -> tuple[list[float], list[float]]:
            size = self.args.precompute_ref_batch_size or batch_size
            # remove_unused_columns works on loaders that Trainer makes; this one is ours.
            rows = dataset.select_columns(list(TOKEN_COLUMNS))
            loader = DataLoader(rows, batch_size=size, collate_fn=self.data_collator)
            scored = []
            for batch in tqdm(self.accelerator.prepare(loader), desc=f"Reference log-probs of {name}"):
                pairs = self.compute_ref_log_probs(batch).view(-1, 2)
                scored.append(self.accelerator.gather_for_metrics(pairs).cpu())
            chosen, rejected = torch.cat(scored).unbind(dim=1)
            return chosen.tolist(), rejected.tolist()

        accelerator = self.accelerator
        return with_reference_columns(
            dataset, self._reference_key, compute, accelerator.is_main_process, accelerator.wait_for_everyone
        )

    # ---- the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: TokenBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """The loss (0-d) of one micro-batch; its metrics wait for the next log."""
        reference, config = self.compute_ref_log_probs(inputs), self.loss_config
        table = _preference_table(inputs)
        # Where the loss is a sum over pairs, each pair's gradient is taken while its logits are there.
        by_pairs = {
            "token_loss": lambda scores, rows: dpo_loss(scores, table, reference, config, rows),
            "group_sizes": inputs.group_sizes,
        }
        options = by_pairs if config.is_sum_over_pairs and inputs.group_sizes else {}
        scored = self.score(model, inputs, config.outputs, **options, **self.router_kwargs)
        loss = scored.loss if options else dpo_loss(scored.tokens, table, reference, config)
        metrics = dpo_metrics(scored.tokens, table, reference, config)
        recorded: dict = {}
        if scored.aux_loss is not None and self.router_aux_loss_coef:
            loss = loss + self.router_aux_loss_coef * scored.aux_loss
            recorded["aux_loss"] = (scored.aux_loss, torch.ones_like(scored.aux_loss))
        recorded["entropy"] = metrics.pop("entropy")
        recorded["num_tokens"] = self.count_tokens(inputs)
        self.record(recorded | metrics)
        return (loss, {}) if return_outputs else loss

    # ---- evaluation

    def prepare_for_evaluation(self, dataset: AnyDataset) -> AnyDataset:
        """A dataset given to `evaluate`, with reference log-probs where those are precomputed.

        Raises:
            ValueError: they were precomputed from a policy that has been trained since.
        """
        dataset = super().prepare_for_evaluation(dataset)
        if not self.args.precompute_ref_log_probs or "ref_chosen_logps" in dataset.column_names:
            return dataset
        if self.ref_model is None and not isinstance(self.model, PeftModel) and self.state.global_step > 0:
            raise ValueError(
                "evaluate(eval_dataset=...): with precompute_ref_log_probs=True the reference was the policy "
                "before training, which is gone; give the dataset to the constructor, or give a ref_model"
            )
        return self._with_reference(dataset, "eval", self.args.eval_batch_size)

    def whole_logits(self, model: torch.nn.Module, inputs: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (2P, T, V) and labels (2P, T), chosen rows before rejected ones."""
        input_ids, attention_mask = _padded_rows(inputs, self.processing_class.pad_token_id)
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits, input_ids


def _preference_table(batch: TokenBatch) -> PreferenceTable:
    return PreferenceTable(batch.branch, batch.offset, batch.branch_lengths)


def _sample_sequences(dataset: AnyDataset) -> list[list[int]]:
    """Two token sequences of the first row, for trying the model out."""
    row = next(iter(dataset))
    return [row["prompt_ids"] + row[column] for column in ("chosen_ids", "rejected_ids")]


def _padded_rows(batch: TokenBatch, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask (S, T) of a batch of any layout, chosen sequences first."""
    rows = batch.sequences()
    rows = [*rows[0::2], *rows[1::2]]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True, padding_value=pad_token_id), mask
