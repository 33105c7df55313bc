"""Images in TRL's batches and hooks: batches as TRL makes them, and runs that go through a subclass's methods."""

import pytest
import torch
import trl

import trl_fast
from support.image_rollouts import SETTINGS, logs_of, picture_prompts, trained
from support.training import assert_same_logs
from trl_fast.trainers.online.trl_images import split_by_row

OURS = {"skip_zero_advantages": False, "keep_groups_together": False}


FAMILIES = ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "llava"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_trls(family, folders, tmp_path, monkeypatch):
    batches = []
    rows = [row for row in picture_prompts() for _ in range(4)][:8]
    for module in (trl, trl_fast):
        trainer = trained(
            module, tmp_path / module.__name__, "GRPO", family, folders(family), monkeypatch, max_steps=0
        )
        trainer.model.train()
        if module is trl_fast:
            trainer.trl_hooks.attach(trainer.loop)
        batches.append(trainer._generate_and_score_completions([dict(row) for row in rows]))
    theirs, ours = batches
    assert ours.keys() == theirs.keys() and "pixel_values" in ours
    for name, values in theirs.items():
        if isinstance(values, torch.Tensor):
            torch.testing.assert_close(
                ours[name], values, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert ours[name] == values, name


def passing(*names):
    """A trainer that overrides methods of TRL's, which change nothing but give new objects on."""

    def method(name):
        def call(self, *args, **kwargs):
            self.called.append(name)
            args = [dict(arg) if hasattr(arg, "keys") else arg for arg in args]
            return getattr(super(made, self), name)(*args, **kwargs)

        return call

    made = type("Passing", (trl_fast.GRPOTrainer,), {name: method(name) for name in names})
    made.called = []
    return made


LOSS = ("_compute_loss", "_get_per_token_logps_and_entropies")
ROLLOUT = ("_generate_and_score_completions", "_tokenize_prompts", "_generate", "_generate_single_turn")
HOOKS = [(*LOSS, *ROLLOUT), *(pytest.param((name,), marks=pytest.mark.slow) for name in (*LOSS, *ROLLOUT))]


@pytest.mark.parametrize("names", HOOKS, ids=["all", *LOSS, *ROLLOUT])
def test_a_subclass_passes_images_on(names, folders, tmp_path, monkeypatch):
    logs = []
    # Batches are put together as in TRL where a method sees them.
    plain = passing("_compute_loss")
    for kind in (plain, passing(*names)):
        how = {"trainer_class": kind, "samples": True, "beta": 0.1, "max_steps": 1, **OURS}
        # One micro-batch: the order within it is drawn in another place.
        how |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        given = (trl_fast, tmp_path / str(len(logs)), "GRPO", "qwen2_5_vl", folders("qwen2_5_vl"), monkeypatch)
        trainer = trained(*given, **how)
        logs.append(logs_of(trainer))
    assert {*names} == {*trainer.called}
    assert_same_logs(logs[1], logs[0])


def test_rows_of_families():
    """Tensors with a row a patch, an image, a tile and a completion."""
    counts = [2, 0, 1]
    grids = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 2]])
    cases = [
        ({"pixel_values": torch.zeros(16, 3), "image_grid_thw": grids}, [12, 0, 4]),
        ({"pixel_values": torch.zeros(3, 3), "image_sizes": torch.zeros(3, 2)}, counts),
        ({"pixel_values": torch.zeros(7, 3), "num_tiles": [5, 0, 2]}, [5, 0, 2]),
        ({"pixel_values": torch.zeros(3, 2, 3, 4, 4)}, counts),
    ]
    for entries, expected in cases:
        found = split_by_row({**entries, "num_images": counts})
        assert [len(part) for part in found["pixel_values"]] == expected
        assert all([len(part) for part in found[name]] == counts for name in found if name.startswith("image_"))
    with pytest.raises(ValueError, match="the batch's pixel_values have 5 rows; expected 3, by num_images"):
        split_by_row({"pixel_values": torch.zeros(5, 3), "num_images": counts})
    assert split_by_row({"pixel_values": torch.zeros(5, 3)}) == {} and SETTINGS
