"""Trees into batches: what is scored, from where, in which layout."""

import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import find_batch_size, send_to_device
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference as TRLCollator

from support.preferences import random_pairs
from trl_fast.data import (
    LAYOUTS,
    PreferenceCollator,
    TokenBatch,
    Tree,
    pack_trees,
)
from trl_fast.settings.choices import TRUNCATION_MODES

PAD = 0
TREES = [Tree([1, 2, 3], [[4, 5], [6]]), Tree([], [[7, 8], [9]]), Tree([10], [[], [11, 12, 13]])]


def score_table(batch):
    return list(zip(batch.branch.tolist(), batch.offset.tolist(), batch.targets.tolist(), strict=True))


def test_packed_batch_by_hand():
    batch = pack_trees(TREES, "packed", PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 10, 10, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 0, 0, 1, 2, 3]]
    assert batch.attention_mask is None
    assert batch.sequence_lengths == (5, 4, 2, 1, 1, 4)
    # 7 and 9 begin a sequence, so nothing predicts them
    assert batch.score_positions.tolist() == [2, 3, 7, 9, 13, 14, 15]
    assert score_table(batch) == [(0, 0, 4), (0, 1, 5), (1, 0, 6), (2, 1, 8), (5, 0, 11), (5, 1, 12), (5, 2, 13)]
    assert batch.branch_lengths.tolist() == [2, 1, 2, 1, 0, 3]
    assert batch.num_tokens == 17
    assert len(batch) == 6


def test_padded_batch_by_hand():
    batch = pack_trees(TREES[:2], "padded", 99, pad_to_multiple_of=4)
    row_padding = [99, 99, 99]
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5, *row_padding],
        [1, 2, 3, 6, 99, *row_padding],
        [7, 8, 99, 99, 99, *row_padding],
        [9, 99, 99, 99, 99, *row_padding],
    ]
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 4, 2, 1]
    assert batch.position_ids.tolist() == [list(range(8))] * 4
    assert batch.sequence_lengths is None
    assert batch.score_positions.tolist() == [2, 3, 8 + 2, 16]


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 3, 7, 12, 100])
def test_layouts_score_the_same_tokens_from_the_same_places(max_length, truncation_mode):
    rows = random_pairs(20, seed=1, empty_prompts=True)
    trees = [Tree(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]
    packed, padded = (pack_trees(trees, layout, PAD, max_length, truncation_mode) for layout in ("packed", "padded"))
    for name in ("targets", "branch", "offset", "branch_lengths"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
    assert packed.num_tokens == padded.num_tokens == padded.attention_mask.sum() == packed.input_ids.numel()
    for batch in (packed, padded):
        flat = batch.input_ids.flatten()
        assert torch.equal(flat[batch.score_positions + 1], batch.targets)
    for name in ("input_ids", "position_ids"):
        at_predictors = [getattr(batch, name).flatten()[batch.score_positions] for batch in (packed, padded)]
        assert torch.equal(*at_predictors), name
    assert all(dtype == torch.int64 for dtype in {t.dtype for t in vars(padded).values() if torch.is_tensor(t)})


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 2, 5, 9, 13])
@pytest.mark.parametrize("pad_to_multiple_of", [None, 8, 9])
def test_collator_equals_trls(max_length, truncation_mode, pad_to_multiple_of):
    rows = random_pairs(15, seed=4, empty_prompts=True)
    options = dict(
        pad_token_id=PAD,
        max_length=max_length,
        truncation_mode=truncation_mode,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    expected = TRLCollator(**options)(rows)
    batch = PreferenceCollator(**options).collate(rows)
    order = torch.arange(2 * len(rows)).view(2, -1).T.flatten()  # TRL: all chosen rows, then all rejected
    assert torch.equal(batch.input_ids, expected["input_ids"][order])
    assert torch.equal(batch.attention_mask, expected["attention_mask"][order])
    completion_mask = expected["completion_mask"][order]
    assert torch.equal(batch.branch_lengths, completion_mask.sum(dim=1))
    scored = torch.zeros_like(completion_mask).flatten()
    scored[batch.score_positions + 1] = 1
    scored = scored.view_as(completion_mask)
    assert torch.equal(scored[:, 1:], completion_mask[:, 1:])
    assert scored[:, 0].sum() == 0
    assert batch.num_tokens == expected["attention_mask"].sum()


def test_bad_arguments():
    with pytest.raises(ValueError, match="layout='ragged' is unknown; expected one of shared_prefix, packed, padded"):
        pack_trees(TREES, "ragged", PAD)
    with pytest.raises(ValueError, match="truncation_mode='middle' is unknown"):
        pack_trees(TREES, "packed", PAD, max_length=3, truncation_mode="middle")
    with pytest.raises(ValueError, match="max_length=0 leaves no token"):
        pack_trees(TREES, "packed", PAD, max_length=0)
    with pytest.raises(ValueError, match="pad_to_multiple_of=8 .* packed layout"):
        pack_trees(TREES, "packed", PAD, pad_to_multiple_of=8)


def test_no_trees_make_an_empty_batch():
    for layout in ("packed", "padded"):
        batch = pack_trees([], layout, PAD)
        assert len(batch) == batch.num_tokens == len(batch.targets) == 0


def test_reference_logprobs_ride_along():
    rows = [{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5} for row in random_pairs(3)]
    batch = PreferenceCollator(PAD).collate(rows)
    assert batch.extras["ref_chosen_logps"].tolist() == [-1.5] * 3
    assert batch["ref_rejected_logps"].dtype == torch.float32


def test_fields_answer_by_name_as_the_trainer_asks_for_them():
    packed = pack_trees(TREES, "packed", PAD)
    assert "input_ids" in packed
    assert packed["input_ids"].numel() == 17
    assert "attention_mask" not in packed
    assert "labels" not in packed
    assert packed.get("return_loss") is None
    with pytest.raises(KeyError, match="labels"):
        packed["labels"]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_moves_with_all_its_tensors(layout):
    rows = [{**row, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for row in random_pairs(3)]
    batch = PreferenceCollator(PAD, layout=layout).collate(rows)
    for moved in (batch.to("meta"), batch.to("meta", non_blocking=True), send_to_device(batch, "meta")):
        assert isinstance(moved, TokenBatch)
        tensors = [value for value in vars(moved).values() if torch.is_tensor(value)] + list(moved.extras.values())
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert len(tensors) == (10 if layout == "padded" else 9)
        assert moved.sequence_lengths == batch.sequence_lengths
    assert batch.input_ids.device.type == "cpu"


def test_survives_worker_processes_and_pinning(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = PreferenceCollator(PAD, layout="packed").collate(random_pairs(3))
    assert isinstance(batch.pin_memory(), TokenBatch)
    assert len(pinned) == 7
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.score_positions, batch.score_positions)
    loader = DataLoader(
        random_pairs(4), batch_size=2, collate_fn=PreferenceCollator(PAD).collate, num_workers=1, pin_memory=False
    )
    assert [len(batch) for batch in loader] == [4, 4]


def test_accelerates_loader_hands_batches_on():
    rows = random_pairs(5)
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(
        DataLoader(rows, batch_size=2, collate_fn=PreferenceCollator(PAD, layout="packed").collate)
    )
    batches = list(loader)
    assert [type(batch) for batch in batches] == [TokenBatch] * 3
    assert [len(batch) // 2 for batch in batches] == [2, 2, 1]
    # the last, short batch is known by the sampler's counts, not by looking into the batch
    assert accelerator.gradient_state.remainder in (-1, 1)
    gathered = [accelerator.gather_for_metrics(torch.arange(len(batch) // 2)) for batch in loader]
    assert torch.cat(gathered).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("process", [0, 1])
def test_processes_get_even_batches(process):
    loader = prepare_data_loader(
        DataLoader(random_pairs(5), batch_size=2, collate_fn=PreferenceCollator(PAD).collate),
        num_processes=2,
        process_index=process,
        put_on_device=False,
    )
    assert [len(batch) for batch in loader] == [4, 4]


def test_accelerates_dispatcher_refuses_it_aloud():
    """Slicing a batch for other processes cannot work; it must fail, not hand everyone the whole batch."""
    with pytest.raises(TypeError, match="TokenBatch"):
        find_batch_size(pack_trees(TREES, "packed", PAD))


def shared_trees():
    return [
        Tree(list(range(100, 120)), [[1, 2, 3], [4], [5, 6]]),
        Tree([7, 8], [[9], [10, 11]]),
        Tree(list(range(200, 216)), [[12, 13]]),
        Tree([], [[14, 15], [16]]),
    ]


def test_a_shared_prompt_stands_once_before_its_branches():
    batch = pack_trees(shared_trees(), "shared_prefix", 0)
    assert batch.tree_lengths == ((20, 3, 1, 2), (3,), (4,), (18,), (2,), (1,))
    assert batch.sequence_lengths is None and batch.attention_mask is None
    assert batch.input_ids.tolist() == [
        [*range(100, 120), 1, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8, 10, 11, *range(200, 216), 12, 13, 14, 15, 16]
    ]
    assert batch.position_ids[0, :33].tolist() == [*range(20), 20, 21, 22, 20, 20, 21, 0, 1, 2, 0, 1, 2, 3]
    # The first token of each branch is predicted by the prompt's last position.
    assert batch.score_positions[:6].tolist() == [19, 20, 21, 19, 19, 24]
    assert batch.num_tokens == sum(20 + n for n in (3, 1, 2)) + 3 + 4 + 18 + 2 + 1


@pytest.mark.parametrize("max_length", [None, 21, 20, 3])
@pytest.mark.parametrize("mode", TRUNCATION_MODES)
def test_all_layouts_score_the_same_tokens_from_the_same_context(max_length, mode):
    batches = [pack_trees(shared_trees(), layout, 0, max_length, mode) for layout in LAYOUTS]
    for batch in batches[1:]:
        for name in ("targets", "branch", "offset", "branch_lengths"):
            assert torch.equal(getattr(batch, name), getattr(batches[0], name)), name
        assert (batch.num_tokens, batch.group_sizes) == (batches[0].num_tokens, batches[0].group_sizes)
        predictors = [b.input_ids.flatten()[b.score_positions] for b in (batch, batches[0])]
        assert torch.equal(*predictors)
        positions = [b.position_ids.flatten()[b.score_positions] for b in (batch, batches[0])]
        assert torch.equal(*positions)
