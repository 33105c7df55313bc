"""PPO's completions: asked for a few at a time, cut after the first stop token; and rewards that have to be there."""

import pytest
import torch

from trl_fast.rollout import Rollout
from trl_fast.trainers.ppo.experience import Experience
from trl_fast.trainers.ppo.rewards import CompleteRewards
from trl_fast.trainers.ppo.stopping_engine import StoppingEngine


class Engine:
    def __init__(self):
        self.asked, self.with_gradient = [], None

    def sync_weights(self, model, step):
        self.step = step

    def generate(self, prompt_ids, settings):
        self.asked.append(len(prompt_ids))
        self.with_gradient = torch.is_grad_enabled()
        return Rollout(prompt_ids, [[7, 1, 8, 1, *ids] for ids in prompt_ids], [[0.0] * 5] * len(prompt_ids))


@pytest.mark.parametrize(("stop_ids", "expected"), [({1}, [7, 1]), ((), [7, 1, 8, 1, 3])])
def test_a_few_at_a_time_cut_after_the_first_stop_token(stop_ids, expected):
    engine = Engine()
    rollout = StoppingEngine(engine, stop_ids, 2).generate([[3]] * 5, None)
    assert engine.asked == [2, 2, 1] and not engine.with_gradient
    assert rollout == Rollout([[3]] * 5, [expected] * 5)


def test_weights_go_to_the_engine():
    engine = Engine()
    StoppingEngine(engine, (), 2).sync_weights(torch.nn.Identity(), 4)
    assert engine.step == 4


def test_every_completion_needs_a_number():
    def first(completion_ids, **_):
        return [1.0, None]

    def second(completion_ids, **_):
        return [None, 2.0]

    arguments = (["p"] * 2, ["c"] * 2, [[1], [2]], {})
    assert CompleteRewards([first, second])(*arguments).nansum() == 3
    with pytest.raises(ValueError, match="reward_model: first returned None for completion 1; PPO needs a number"):
        CompleteRewards(first)(*arguments)


def test_sources_are_asked_without_gradient():
    seen = []
    CompleteRewards(lambda completion_ids, **_: seen.append(torch.is_grad_enabled()) or [0.0])(["p"], ["c"], [[1]], {})
    assert seen == [False]


def test_selected_experience_keeps_all_of_it():
    experience = Experience.of([[1], [2], [3]], [[4], [5, 6], [7]])
    experience.values = [torch.tensor([float(i)]) for i in range(3)]
    experience.has_end = torch.tensor([True, False, True])
    part = experience.select([2, 1])
    assert isinstance(part, Experience) and part.returns is None
    assert torch.cat(part.values).tolist() == [2.0, 1.0] and part.has_end.tolist() == [True, False]
