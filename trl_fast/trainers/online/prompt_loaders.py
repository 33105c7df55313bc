"""Loaders of prompts, each as often as it gets completions."""

from __future__ import annotations

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler

from trl_fast.data import AnyDataset
from trl_fast.data.repeat_sampler import RepeatSampler, repeat_stream


class PromptLoaders:
    """The part of an online trainer that reads its datasets."""

    def get_train_dataloader(self) -> DataLoader:
        """Rows of a whole generation at a time: each prompt as often as it gets completions, for all its updates."""
        args, dataset = self.args, self.train_dataset
        if isinstance(dataset, IterableDataset):
            dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
            prompts = args.generation_batch_size // args.num_generations
            dataset = repeat_stream(dataset, args.num_generations, prompts, args.generate_every)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        args = self.args
        return RepeatSampler(
            self.train_dataset if dataset is None else dataset,
            mini_repeat_count=args.num_generations,
            batch_size=args.generation_batch_size // args.num_generations,
            repeat_count=args.generate_every,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return RepeatSampler(eval_dataset, mini_repeat_count=self.args.generations("eval"), seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: str | AnyDataset | None = None) -> DataLoader:
        """Each prompt as often as it gets completions in evaluation.

        A stream is read as a whole, so that its order is that of a dataset: prompts are small, and each costs a
        generation.

        Raises:
            ValueError: a batch would not hold all completions of its prompts.
        """
        self.args.check_eval_batch()
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, IterableDataset):
            dataset = list(dataset)
        return super().get_eval_dataloader(dataset)
