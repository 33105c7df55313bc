"""The loop of the online methods: what is called in which order, and with what."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from trl_fast.losses.advantages import Advantages
from trl_fast.rollout import RewardFunctions, Rollout, SamplingSettings
from trl_fast.rollout.samples import Samples
from trl_fast.trainers.online.rollout_loop import RolloutLoop

ROWS = [{"prompt": f"p{i}", "prompt_ids": [i + 1], "shade": i} for i in range(2)]


class Calls(list):
    """Notes calls by name; stands for the parts of a loop and for the method."""

    model, group_size, rollout_func = torch.nn.Identity(), None, None
    state = SimpleNamespace(global_step=3)

    def sync_weights(self, model, step):
        self.append(f"sync {step}")

    def generate(self, prompt_ids, settings):
        self.append("generate")
        return Rollout(prompt_ids, [[5, 6], [7]])

    def read(self, prompts, rollout):
        return [f"text {len(ids)}" for ids in rollout.completion_ids]

    def log_column(self, name, values):
        pass

    log_metric = log_column

    def check_columns(self, count):
        pass

    def record_lengths(self, rollout, mask, *, is_training):
        self.append("lengths")
        return torch.tensor([True, False])

    def record_outcome(self, prompts, completions, rewards, found, group):
        self.append(("outcome", prompts, completions, rewards.tolist(), group))

    @contextmanager
    def guard(self):
        self.append("guarded")
        yield
        self.append("released")

    def compute_advantages(self, samples, rewards):
        self.append("advantages")
        return Advantages(10 * rewards[:, 0], rewards[:, 0], torch.zeros(0))

    def add_contexts(self, samples, rows, rewards):
        self.append(("contexts", [row["shade"] for row in rows], rewards.tolist()))

    def deal(self, samples):
        self.append(f"deal {len(samples)}")
        return samples

    def add_logprobs(self, samples):
        self.append(("logprobs", samples.advantages.tolist()))


def accelerator(process=0):
    """Of two processes: the other one's rewards are 100 more."""

    def gather(values):
        others = (values + 100) if values.ndim else values
        return torch.cat(
            [values.reshape(-1, *values.shape[1:]), others.reshape(-1, *values.shape[1:])][:: 1 - 2 * process]
        )

    @contextmanager
    def autocast():
        yield

    return SimpleNamespace(
        device=torch.device("cpu"), gather=gather, process_index=process, num_processes=2, autocast=autocast
    )


def make(calls, **options):
    def lengths(completion_ids, shade, **_):
        calls.append("rewards")
        return [float(len(ids) + value) for ids, value in zip(completion_ids, shade, strict=True)]

    options = {"accelerator": accelerator(), **options}
    return RolloutLoop(
        engine=calls,
        rewards=RewardFunctions(lengths),
        reader=calls,
        metrics=calls,
        rescue=calls,
        settings=lambda: SamplingSettings(4),
        vocab_size=9,
        **options,
    )


def test_rollout_rewards_advantages_update():
    calls = Calls()
    assert make(calls).run(ROWS, calls, update=lambda samples: calls.append("update") or "made") == "made"
    outcome = ("outcome", ["p0", "p1"], ["text 2", "text 1"], [[2.0], [2.0], [102.0], [102.0]], 4)
    contexts = ("contexts", [0, 1], [2.0, 2.0, 102.0, 102.0])
    assert calls == [
        *("guarded", "sync 3", "generate", "rewards", "released"),
        *("lengths", "advantages", outcome, contexts, "deal 2", ("logprobs", [20.0, 20.0]), "update"),
    ]


def test_each_process_gets_the_advantages_of_its_own_completions():
    calls = Calls()
    samples = make(calls, accelerator=accelerator(process=1)).run(ROWS, calls, update=lambda samples: samples)
    assert samples.advantages.tolist() == [20.0, 20.0]
    assert samples.generation_tokens == 3.0


def test_what_was_cut_off_is_excluded_only_where_that_is_asked_for():
    for excludes in (False, True):
        calls = Calls()
        samples = make(calls, excludes_cut_off=lambda answer=excludes: answer).run(
            ROWS, calls, update=lambda samples: samples
        )
        assert samples.excluded.tolist() == [excludes, False]
        assert samples.lengths.tolist() == [0.0 if excludes else 2.0, 1.0]


def test_a_rollout_func_takes_the_engines_place():
    calls, seen = Calls(), {}

    def judge(completion_ids, topic, difficulty, **_):
        seen.update(topic=topic, difficulty=difficulty)
        return [0.0] * len(completion_ids)

    output = {
        "prompt_ids": [[1], [2]],
        "completion_ids": [[3], [4]],
        "logprobs": [[-1.0], [None]],
        "env_mask": [[1], [0]],
    }

    def roll_out(prompts, method):
        assert prompts == ["p0", "p1"] and method is calls
        return {**output, "topic": ["a", "b"], "difficulty": 3}

    loop, calls.rollout_func = make(calls), roll_out
    loop.rewards = RewardFunctions(judge)
    samples = loop.run(ROWS, calls, update=lambda samples: samples)
    assert "generate" not in calls and "sync 3" in calls
    assert seen == {"topic": ["a", "b"], "difficulty": [3, 3]}
    assert samples.mask[1].tolist() == [0.0] and samples.sampling_logprobs[1].isnan().all()


def test_prompts_tokens_are_for_rewards_only_where_that_is_asked_for():
    def known(prompt_ids=None, **_):
        return [0.0 if prompt_ids is None else float(ids[0]) for ids in prompt_ids or ROWS]

    for wanted, expected in ((False, [0.0, 0.0]), (True, [1.0, 2.0])):
        calls = Calls()
        loop = make(calls, prompt_ids_for_rewards=wanted)
        loop.rewards = RewardFunctions(known)
        loop.run(ROWS, calls, update=lambda samples: samples)
        (outcome,) = (call for call in calls if call[0] == "outcome")
        assert [row[0] for row in outcome[3][:2]] == expected


def test_samples_are_of_the_methods_class():
    class Own(Samples):
        pass

    calls = Calls()
    assert isinstance(make(calls, samples_class=Own).run(ROWS, calls, update=lambda samples: samples), Own)


def test_a_rollout_that_does_not_fit_is_refused_before_rewards():
    calls = Calls()
    calls.generate = lambda prompt_ids, settings: Rollout(prompt_ids, [[5, 9], [7]])
    with pytest.raises(ValueError, match="completion_ids for the prompt 'p0' have a token outside of the 9 entries"):
        make(calls).run(ROWS, calls, update=lambda samples: samples)
    assert "rewards" not in calls
