"""A batch answers as the dict of TRL's collator, and what is changed in it is what is trained on."""

import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from trl.trainer import dpo_trainer, kto_trainer, reward_trainer, sft_trainer

import trl_fast.data.packing as packing
from support.preferences import random_pairs
from trl_fast.data import (
    DataCollatorForPreference,
    DataCollatorForReward,
    DataCollatorForUnpairedPreference,
    DictBatch,
    LabelledCollator,
    PreferenceCollator,
    RewardCollator,
    TokenBatch,
    UnpairedCollator,
)
from trl_fast.data.unpaired_preference import MISMATCHED
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS, layouts_for

PAD = 0
PAIRS = [{**row, "ref_chosen_logps": -1.5 - i, "ref_rejected_logps": -2.5} for i, row in enumerate(random_pairs(5))]
LABELLED = [
    {"input_ids": row["prompt_ids"] + row["chosen_ids"], "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"]}
    for row in PAIRS
]
SEVERAL = [{**row, "seq_lengths": [1, len(row["input_ids"]) - 1]} for row in LABELLED]
UNPAIRED = [
    {
        "prompt_ids": row["prompt_ids"],
        "completion_ids": row["chosen_ids"],
        "KL_completion_ids": row["rejected_ids"],
        "label": i % 2 == 0,
        "ref_logps": -1.0 * i,
        "ref_KL_logps": -2.0,
    }
    for i, row in enumerate(PAIRS)
]
WITHOUT_KL = [{name: value for name, value in row.items() if "KL" not in name} for row in UNPAIRED]
REWARDED = [{"chosen_ids": [*row["prompt_ids"], 3], "rejected_ids": [*row["prompt_ids"], 4, 5]} for row in PAIRS]
MARGINS = [{**row, "margin": 0.5 * i} for i, row in enumerate(REWARDED)]
# Our collator, TRL's, rows, and the settings of each.
CASES = {
    "SFT": (LabelledCollator, sft_trainer.DataCollatorForLanguageModeling, LABELLED, {}),
    "SFT without padding": (
        LabelledCollator,
        sft_trainer.DataCollatorForLanguageModeling,
        SEVERAL,
        {"padding_free": True},
    ),
    "DPO": (PreferenceCollator, dpo_trainer.DataCollatorForPreference, PAIRS, {"max_length": 9}),
    "DPO, ends": (
        PreferenceCollator,
        dpo_trainer.DataCollatorForPreference,
        PAIRS,
        {"max_length": 6, "truncation_mode": "keep_end"},
    ),
    "KTO": (UnpairedCollator, kto_trainer.DataCollatorForUnpairedPreference, UNPAIRED, {"max_length": 9}),
    "KTO without KL": (UnpairedCollator, kto_trainer.DataCollatorForUnpairedPreference, WITHOUT_KL, {}),
    "reward": (RewardCollator, reward_trainer.DataCollatorForPreference, REWARDED, {}),
    "reward with margins": (RewardCollator, reward_trainer.DataCollatorForPreference, MARGINS, {}),
}


def cases():
    for name, (ours, *_) in CASES.items():
        for layout in layouts_for(shares_prompts=ours is not LabelledCollator):
            yield pytest.param(name, layout, id=f"{name}-{layout}")


def batch_of(name, layout, multiple=None):
    ours, theirs, rows, settings = CASES[name]
    batch = ours(PAD, layout=layout, pad_to_multiple_of=multiple, **settings)(rows)
    return batch, theirs(PAD, pad_to_multiple_of=multiple, **settings)(rows)


def assert_same_entries(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


@pytest.fixture(autouse=True)
def _short_prompts_are_shared(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)


@pytest.mark.parametrize("multiple", [None, 4])
@pytest.mark.parametrize("name, layout", list(cases()))
def test_the_entries_are_those_of_trls_collator(name, layout, multiple):
    batch, expected = batch_of(name, layout, multiple)
    assert_same_entries(batch.copy(), expected)
    assert list(batch) == list(batch.keys()) == list(expected) and len(batch) == len(expected)
    assert "input_ids" in batch and "pixel_values" not in batch
    assert not batch.is_read and batch.token_batch() is batch.token_batch()
    assert_same_entries({**batch}, expected)
    assert batch.is_read
    assert_same_entries(dict(batch.items()), expected)


@pytest.mark.parametrize("name, layout", list(cases()))
def test_what_was_read_scores_the_same_tokens(name, layout):
    batch, _ = batch_of(name, layout)
    own = batch.token_batch()
    assert batch["input_ids"] is batch["input_ids"]
    read = batch.token_batch()
    assert isinstance(read, TokenBatch) and read is not own
    extras = {name for name in own.extras if isinstance(own.extras[name], torch.Tensor)} - {"labels"}
    for name in ("targets", "branch", "offset", "branch_lengths"):
        if "reward_positions" not in extras:
            assert torch.equal(getattr(read, name), getattr(own, name)), name
    assert read.num_tokens == own.num_tokens and (not own.group_sizes or read.group_sizes == own.group_sizes)
    for name in extras - {"reward_positions"}:
        assert torch.equal(read.extras[name], own.extras[name])
    for batch in (read, own):
        flat = batch.input_ids.flatten()
        assert BATCH_LAYOUTS[layout].shares_prompts or torch.equal(flat[batch.score_positions + 1], batch.targets)


def scored(batch):
    return [*zip(batch.branch.tolist(), batch.targets.tolist(), strict=True)]


def test_what_is_changed_counts():
    """Masked labels, masked completions, other tokens, entries that are put in and taken out."""
    batch = LabelledCollator(PAD, "packed")([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    batch["labels"][0, 2] = -100
    assert scored(batch.token_batch()) == [(0, 6), (1, 9)]
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 9, 4)
    assert scored(batch.token_batch()) == [(0, 6), (1, 4)]
    labels = batch.pop("labels")
    assert "labels" not in batch and batch.get("labels") is None and batch.pop("labels", 3) == 3
    with pytest.raises(ValueError, match=r"but the loss reads 'labels' too"):
        batch.token_batch()
    batch.update(labels=labels, weights=torch.ones(2))
    with pytest.raises(ValueError, match="'weights', which the loss does not read; take them out in compute_loss"):
        batch.token_batch()
    del batch["weights"]
    assert batch.setdefault("use_cache", False) is False
    assert scored(batch.token_batch()) == [(0, 6), (1, 4)]
    assert set(batch | {"more": 1}) == {"input_ids", "labels", "attention_mask", "use_cache", "more"}


def test_completions_with_holes():
    pairs = PreferenceCollator(PAD, layout="shared_prefix")(
        [{"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}]
    )
    pairs["completion_mask"][0, 3] = 0
    batch = pairs.token_batch()
    assert scored(batch) == [(0, 3), (0, 5), (1, 6)] and batch.group_sizes == (3,)
    assert batch.offset.tolist() == [0, 1, 0] and batch.branch_lengths.tolist() == [2, 1]
    unpaired = UnpairedCollator(PAD)(UNPAIRED)
    unpaired["KL_completion_mask"].zero_()
    assert len(unpaired.token_batch().extras[MISMATCHED].targets) == 0


@pytest.mark.parametrize("read", [False, True])
def test_moves_with_all_its_tensors(read):
    batch = PreferenceCollator(PAD, layout="shared_prefix")(PAIRS)
    if read:
        batch["extra"] = 3
    assert batch.to("cpu") is batch
    for moved in (batch.to("meta"), send_to_device(batch, "meta", non_blocking=True)):
        assert isinstance(moved, DictBatch) and moved.is_read == read and moved.device.type == "meta"
        if read:
            assert {value.device.type for value in moved.values() if torch.is_tensor(value)} == {"meta"}
            assert moved["extra"] == 3
        else:
            assert moved.token_batch().targets.device.type == "meta"


def test_survives_worker_processes_and_pinning(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = PreferenceCollator(PAD, layout="packed")(PAIRS)
    assert isinstance(batch.pin_memory(), DictBatch) and len(pinned) == 9
    again = pickle.loads(pickle.dumps(batch))
    assert_same_entries(again.copy(), batch.copy())
    loader = DataLoader(PAIRS, batch_size=3, collate_fn=PreferenceCollator(PAD, layout="packed"), num_workers=1)
    assert [len(batch["input_ids"]) for batch in loader] == [6, 4]


@pytest.mark.parametrize(
    "ours, theirs, rows, settings",
    [
        (DataCollatorForPreference, dpo_trainer.DataCollatorForPreference, PAIRS, (0, 9, "keep_end", 4, "pt")),
        (DataCollatorForUnpairedPreference, kto_trainer.DataCollatorForUnpairedPreference, UNPAIRED, (0, 9, 4, "pt")),
        (DataCollatorForReward, reward_trainer.DataCollatorForPreference, MARGINS, (0, 4, "pt")),
    ],
)
def test_the_public_collators_take_trls_arguments_and_return_a_dict(ours, theirs, rows, settings):
    for given in ((PAD,), settings):
        batch = ours(*given)(rows)
        assert type(batch) is dict
        assert_same_entries(batch, theirs(*given)(rows))
    with pytest.raises(ValueError, match="return_tensors='np'"):
        ours(PAD)(rows, return_tensors="np")


def test_a_subclass_of_a_public_collator_adds_entries():
    class Weighted(DataCollatorForPreference):
        def torch_call(self, examples):
            return {**super().torch_call(examples), "weights": torch.ones(len(examples))}

    assert len(Weighted(PAD)(PAIRS)["weights"]) == 5
