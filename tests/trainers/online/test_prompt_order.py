"""The order of training prompts: the same of a dataset and of a stream."""

from datasets import Dataset

from trl_fast.trainers.online.prompt_order import PromptOrder

ROWS = Dataset.from_list([{"prompt": letter} for letter in "abcde"])


def test_a_dataset_and_a_stream_have_one_order():
    order = PromptOrder(repeats=2, prompts=2, rounds=2, shuffle=False)
    expected = "aabbaabbccddccdd"
    assert "".join(ROWS[index]["prompt"] for index in order.sampler(ROWS)) == expected
    assert "".join(row["prompt"] for row in order.stream(ROWS.to_iterable_dataset())) == expected


def test_shuffled_by_the_seed():
    orders = [list(PromptOrder(1, 1, seed=seed).sampler(ROWS)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == [0, 1, 2, 3, 4]
    streams = [
        [row["prompt"] for row in PromptOrder(1, 1, seed=seed).stream(ROWS.to_iterable_dataset())]
        for seed in (0, 0, 1)
    ]
    assert streams[0] == streams[1] != streams[2]
