"""Bad preference data is refused before training, with the place, the value and the remedy."""

import pytest
from datasets import Dataset

from support.preferences import random_pairs
from support.tokenizer import build_tokenizer
from trl_fast.data import check_head_vocabulary, check_token_ids, longest_sequence, prepare_preference_dataset


def prepare(columns, tokenizer=None, **options):
    dataset = Dataset.from_dict(columns) if isinstance(columns, dict) else Dataset.from_list(columns)
    return prepare_preference_dataset(dataset, tokenizer or build_tokenizer(), **options)


def good_columns():
    return {"prompt": ["The sky is", "The sea is"], "chosen": [" blue", " green"], "rejected": [" red", " black"]}


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"prompt": ["a"], "good": ["b"]},
            r"train dataset has the columns \['prompt', 'good'\].*'chosen'.*rename_column",
        ),
        ({"prompt": ["a"], "chosen": ["b"]}, "expected 'chosen' and 'rejected'"),
        ({**good_columns(), "images": [[], []]}, "'images', but nothing reads images"),
        ({**good_columns(), "image": ["x", "y"]}, "'image', but nothing reads images"),
        ({**good_columns(), "chosen": [1, 2]}, "row 0, column 'chosen': 1 is of type int; expected a string"),
        ({**good_columns(), "rejected": [" x", None]}, "row 1, column 'rejected': None is of type NoneType"),
        ({**good_columns(), "prompt": [3.5, 1.0]}, "row 0, column 'prompt': 3.5 is of type float"),
        ({**good_columns(), "chosen": [["a"], ["b"]]}, r"column 'chosen': \['a'\] is of type list"),
        (
            {**good_columns(), "chosen": ["fine", ""]},
            "row 1, column 'chosen': the completion is empty.*dataset.filter",
        ),
        (
            {**good_columns(), "rejected": [[{"role": "assistant", "content": "x"}]] * 2},
            "row 0: 'chosen' is text, 'rejected' is messages.*all of them",
        ),
        (
            {**good_columns(), "prompt": [[{"role": "user", "content": "x"}]] * 2},
            "row 0: .*'prompt' is messages; expected all of them",
        ),
        ({"prompt": [], "chosen": [], "rejected": []}, "train dataset has no rows"),
    ],
)
def test_bad_columns_and_rows(columns, message):
    with pytest.raises(ValueError, match=message):
        prepare(columns)


def test_bad_rows_of_a_stream_are_refused_when_read():
    stream = Dataset.from_dict({**good_columns(), "chosen": ["x", ""]}).to_iterable_dataset()
    prepared = iter(prepare_preference_dataset(stream, build_tokenizer(), name="eval"))
    next(prepared)
    with pytest.raises(ValueError, match="eval dataset, row 1, column 'chosen': the completion is empty"):
        next(prepared)


def test_bad_rows_are_named_from_worker_processes_too():
    columns = {column: values * 3 for column, values in good_columns().items()}
    columns["rejected"][4] = ""
    with pytest.raises(ValueError, match="row 4, column 'rejected'"):
        prepare(columns, num_proc=2)


def test_empty_list_of_messages():
    chat = [{"role": "assistant", "content": "x"}]
    with pytest.raises(ValueError, match="row 0, column 'rejected': the completion is empty"):
        prepare([{"prompt": [{"role": "user", "content": "q"}], "chosen": chat, "rejected": []}])


def test_conversations_that_share_nothing_have_no_prompt():
    chosen, rejected = ([{"role": "assistant", "content": content}] for content in "ab")
    with pytest.raises(ValueError, match="row 0: .*no leading message in common.*Add a 'prompt' column"):
        prepare([{"chosen": chosen, "rejected": rejected}])


def test_empty_completion_of_a_tokenized_dataset():
    rows = random_pairs(1200)
    rows[1100]["rejected_ids"] = []
    with pytest.raises(ValueError, match="row 1100, column 'rejected_ids': the completion has no tokens"):
        prepare(rows)


def test_identical_completions(caplog):
    rows = random_pairs(1300, longest=12)
    rows = [row for row in rows if row["chosen_ids"] != row["rejected_ids"]][:1200]
    prepare(rows)
    assert not caplog.records
    for index in (3, 7, 20, 500, 1001, 1199):
        rows[index]["rejected_ids"] = list(rows[index]["chosen_ids"])
    prepare(rows)
    (warning,) = [record.message for record in caplog.records]
    assert "'chosen' equals 'rejected' in 6 of 1200 rows (row 3, 7, 20, 500, 1001, …)" in warning
    with pytest.raises(ValueError, match="'chosen' equals 'rejected' in all 6 rows"):
        prepare([row for row in rows if row["chosen_ids"] == row["rejected_ids"]])


def test_every_prompt_too_long():
    with pytest.raises(ValueError, match="train dataset is empty: .*max_length=1 tokens or more.*Raise max_length"):
        prepare(good_columns(), max_length=1)


def test_unknown_truncation_mode():
    with pytest.raises(ValueError, match="truncation_mode='middle' is unknown; expected one of keep_start, keep_end"):
        prepare(good_columns(), truncation_mode="middle")


def test_tokenizer_without_eos_or_pad():
    chat = {
        "prompt": [[{"role": "user", "content": "q"}]],
        "chosen": [[{"role": "assistant", "content": "a"}]],
        "rejected": [[{"role": "assistant", "content": "b"}]],
    }
    without_eos = build_tokenizer(eos_token=None)
    with pytest.raises(ValueError, match="eos_token=None, but completions given as text"):
        prepare(good_columns(), without_eos)
    assert len(prepare(chat, without_eos)) == 1
    assert len(prepare(good_columns(), build_tokenizer(pad_token=None))) == 2
    with pytest.raises(ValueError, match="pad_token=None and eos_token=None.*Set processing_class.pad_token"):
        prepare(chat, build_tokenizer(eos_token=None, pad_token=None))


def test_token_ids_outside_the_head():
    rows = random_pairs(1200, vocab_size=50)
    dataset = Dataset.from_list(rows)
    largest = check_token_ids(dataset, 50)
    assert largest == max(max(ids) for row in rows for ids in row.values())
    for column, token in (("prompt_ids", 50), ("rejected_ids", 77), ("chosen_ids", -1)):
        bad = [dict(row) for row in rows]
        bad[1050][column] = [4, token]
        with pytest.raises(ValueError, match=f"row 1050, column '{column}': token id {token} .* 50 entries.*resize"):
            check_token_ids(Dataset.from_list(bad), 50)


def test_token_ids_of_selected_rows():
    rows = random_pairs(10, vocab_size=50)
    rows[7]["chosen_ids"] = [99]
    dataset = Dataset.from_list(rows)
    assert check_token_ids(dataset.select([0, 1, 2]), 50) < 50
    with pytest.raises(ValueError, match="row 1, column 'chosen_ids': token id 99"):
        check_token_ids(dataset.select([3, 7]), 50)


def test_head_smaller_than_the_tokenizer(caplog):
    tokenizer = build_tokenizer()
    size = len(tokenizer)
    check_head_vocabulary(tokenizer, size)
    check_head_vocabulary(tokenizer, size + 100)
    message = rf"has {size} tokens, the model's head only vocab_size={size - 1}.*resize_token_embeddings\({size}\)"
    with pytest.raises(ValueError, match=message):
        check_head_vocabulary(tokenizer, size - 1, largest_id=5)


def test_special_tokens_beyond_the_head_that_no_datum_holds(caplog):
    tokenizer = build_tokenizer()
    head = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    check_head_vocabulary(tokenizer, head, largest_id=head - 1)
    assert f"has {head + 1} tokens, the model's head only vocab_size={head}" in caplog.records[0].message
    for largest_id in (None, head):
        with pytest.raises(ValueError, match="resize_token_embeddings"):
            check_head_vocabulary(tokenizer, head, largest_id)
    tokenizer.pad_token = "<|image|>"
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        check_head_vocabulary(tokenizer, head, largest_id=head - 1)
    plain = build_tokenizer()
    plain.add_tokens(["ordinary"])
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        check_head_vocabulary(plain, head, largest_id=head - 1)


def test_longest_sequence():
    rows = {"prompt_ids": [[1, 2], [], [1]], "chosen_ids": [[3], [3, 4, 5], [3]], "rejected_ids": [[4, 5], [6], [7]]}
    assert longest_sequence(Dataset.from_dict(rows)) == 4
    assert longest_sequence(Dataset.from_dict(rows), ("chosen_ids", "rejected_ids")) == 3
    packed = {"input_ids": [[1, 2, 3, 4, 5], [1]], "seq_lengths": [[2, 3], [1]]}
    assert longest_sequence(Dataset.from_dict(packed), ("input_ids",)) == 3
    assert longest_sequence(Dataset.from_dict({"input_ids": [[1, 2], [1, 2, 3]]}), ("input_ids",)) == 3
