"""Processes make equal numbers of forwards, whatever their own completions and prompts are."""

import torch
from accelerate import PartialState

from support.models import tiny_model
from support.ranks import run_on_ranks
from trl_fast.rollout.engine import SamplingSettings
from trl_fast.rollout.samples import Samples
from trl_fast.rollout.transformers_engine import TransformersEngine
from trl_fast.trainers.online.micro_batches import UpdateMaker


def test_processes_score_equally_often():
    def score():
        rank, calls = PartialState(cpu=True).process_index, []
        samples = Samples.of([[5, 6]] * 3, [[7], [8, 9], [10, 11, 12]])

        def count(batch):
            calls.append(len(batch.targets))
            return torch.arange(len(batch.targets)) + 1.0

        updates = UpdateMaker("packed", 2, None, torch.device("cpu"))
        found = updates.score(samples, count, [[0], [1], [2]] if rank else [[1, 2]])
        return calls, [values.tolist() for values in found]

    (first, found), (second, other) = run_on_ranks(score)
    assert first == [5, 5, 5] and second == [1, 2, 3]
    assert found == [[0.0], [1.0, 2.0], [3.0, 4.0, 5.0]]
    assert other == [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]]


def test_prompts_are_shared_by_all_processes_or_none():
    model = tiny_model("llama")
    engine = TransformersEngine(model, [1], 0)
    config = engine._generation_config(model, SamplingSettings(max_completion_length=4))

    def shares():
        rank = PartialState(cpu=True).process_index
        cases = [([[5, 6]] * 2, [[5, 6], [7, 8]]), ([[5, 6], [6]], [[5], [6]]), ([[5, 6]] * 2, [[5]] * 2)]
        return [
            tuple(
                engine._shares_prompts([(tuple(ids), ()) for ids in case[rank]], model, config, together)
                for together in (True, False)
            )
            for case in cases
        ]

    assert run_on_ranks(shares) == [
        [(True, True), (False, False), (False, True)],
        [(True, False), (False, False), (False, False)],
    ]
