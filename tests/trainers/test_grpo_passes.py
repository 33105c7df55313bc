"""GRPO computes nothing for nothing: neither log-probabilities of the policy that just sampled, nor a prompt twice."""

import pytest
import torch
import trl

import trl_fast
import trl_fast.rollout.samples as samples
from support.rollouts import FixedRollout, brevity, color_prompts
from support.training import make_trainer


def make(module, folder, model_path, tokenizer, **settings):
    arguments = {
        "model": model_path,
        "reward_funcs": brevity,
        "train_dataset": color_prompts(),
        "rollout_func": FixedRollout(tokenizer),
    }
    settings = {"num_generations": 4, "max_completion_length": 8, "max_steps": 1, **settings}
    return make_trainer(module, folder, method="GRPO", arguments=arguments, **settings)


def passes_without_gradient(trainer, name):
    """Counts calls of a trainer's method, outside of gradients, during training."""
    counted, method = [], getattr(trainer, name)

    def count(*args, **kwargs):
        if not torch.is_grad_enabled():
            counted.append(None)
        return method(*args, **kwargs)

    setattr(trainer, name, count)
    trainer.train()
    return len(counted)


@pytest.mark.parametrize(
    ("settings", "passes"), [({}, 0), ({"steps_per_generation": 1}, 0), ({"num_iterations": 2}, 2)]
)
def test_the_policy_that_just_sampled_is_not_asked_again(settings, passes, model_path, tokenizer, tmp_path):
    how = (tmp_path, model_path, tokenizer)
    # Two chunks of four, where it is another policy that is updated.
    assert passes_without_gradient(make(trl_fast, *how, **settings), "score") == passes
    theirs = passes_without_gradient(make(trl, *how, **settings), "_get_per_token_logps_and_entropies")
    assert (theirs > 0) == (passes > 0)


@pytest.mark.parametrize("together", [True, False])
def test_an_update_has_each_prompt_once(together, model_path, tokenizer, tmp_path, monkeypatch):
    batches, pack = [], samples.pack_trees
    monkeypatch.setattr(samples, "pack_trees", lambda trees, *a, **k: batches.append(trees) or pack(trees, *a, **k))
    settings = {"keep_groups_together": together, "skip_zero_advantages": False, "per_device_train_batch_size": 8}
    make(trl_fast, tmp_path, model_path, tokenizer, **settings).train()
    prompts = [[tuple(tree.prompt_ids) for tree in trees] for trees in batches]
    assert [sum(len(tree.branches) for tree in trees) for trees in batches] == [8, 8]
    assert all(len(set(batch)) == len(batch) for batch in prompts)
    # Four groups of four; where they are not kept together, some are in both micro-batches.
    assert (sum(map(len, prompts)) == 4) == together
