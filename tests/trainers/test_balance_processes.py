"""Two processes whose rows are dealt by cost train as one process does, and log the same numbers."""

import random
from itertools import product

import pytest
from accelerate import PartialState
from datasets import Dataset

import trl_fast
from support.ranks import run_on_ranks
from support.training import assert_same_logs, make_trainer
from trl_fast.rollout import Rollout

pytestmark = pytest.mark.processes

# Of very different lengths, so that a deal by cost is another one than that of the rows' order.
LENGTHS = [9, 1, 8, 1, 2, 7, 1, 3, 1, 9, 1, 2, 5, 1, 1, 6]


def rows_of(method):
    words = [[f" blue {i}"] * length for i, length in enumerate(LENGTHS)]
    if method == "SFT":
        columns = {"prompt": "Say", "completion": None}
    elif method == "KTO":
        columns = {"prompt": "Say", "completion": None, "label": None}
    else:
        columns = {"prompt": "Say", "chosen": None, "rejected": " green"}
    found = []
    for i, text in enumerate(map("".join, words)):
        row = {name: text if value is None else value for name, value in columns.items()}
        found.append({**row, "label": i % 3 > 0} if "label" in row else row)
    return Dataset.from_list(found)


def make(method, model_path, folder, batch_size, balance, **settings):
    arguments = {"model": model_path, "train_dataset": rows_of(method)}
    settings |= {"per_device_train_batch_size": batch_size, "balance_batches": balance}
    return make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)


def dealt_rows(trainer):
    """The rows of each micro-batch of this process."""
    return [*trainer.get_train_dataloader().batch_sampler]


def logs(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


CASES = {
    "SFT": ("SFT", {}),
    "DPO": ("DPO", {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, 0.5]}),
    "KTO": ("KTO", {}),
    "KTO without KL": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "Reward": ("Reward", {"center_rewards_coefficient": 0.1}),
}


# Small steps: updates leave weights apart by their rounding, and after steps of 1e-3 a norm of Reward's gradients is
# 5.8e-7 from one process. After these, most weights are the same to the last bit.
LEARNING_RATE = 1e-5

# The others take seconds each.
QUICK = ("SFT",)


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK)]
)
def test_two_processes_train_as_one_whoever_has_which_row(case, model_path, reward_model_path, tmp_path):
    method, settings = CASES[case]
    settings = {"learning_rate": LEARNING_RATE, **settings}
    path = reward_model_path if method == "Reward" else model_path
    widest = "micro_batch" if case == "KTO" else "step"

    def two():
        found = {}
        for balance in (None, widest):
            trainer = make(method, path, tmp_path / "two", 2, balance, ddp_backend="gloo", **settings)
            found[balance] = dealt_rows(trainer), logs(trainer)
        return found

    ranks = run_on_ranks(two)
    one = make(method, path, tmp_path / "one", 4, None, **settings)
    if method == "KTO":  # mismatched completions are those of a micro-batch of one process
        one.train_dataset = make(method, path, tmp_path / "rows", 2, None, **settings).train_dataset
    expected, plain = logs(one), dealt_rows(one)
    for found in ranks:
        assert_same_logs(found[None][1], expected, rel=1e-5, abs=1e-5)
        for balance, (_, got) in found.items():
            for name, step in product(("loss", "grad_norm"), range(len(expected))):
                wanted = pytest.approx(expected[step][name], rel=5e-7, abs=1e-7)
                assert got[step][name] == wanted, (balance, name, step)

    tokens = [sum(len(row[name]) for name in one.token_columns) for row in one.train_dataset]

    def time_of(ranks):
        """Tokens of the process with more of them, of all micro-batches."""
        return sum(max(sum(tokens[row] for row in rows) for rows in together) for together in zip(*ranks, strict=True))

    by_order = time_of([[rows[:2] for rows in plain], [rows[2:] for rows in plain]])
    for balance in ranks[0]:
        assert by_order > time_of([found[balance][0] for found in ranks]), balance


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_an_epoch(model_path, tmp_path):
    def two():
        whole = make("SFT", model_path, tmp_path, 2, "step", ddp_backend="gloo", save_strategy="steps", save_steps=1)
        expected = logs(whole)
        resumed = make("SFT", model_path, tmp_path, 2, "step", ddp_backend="gloo")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        return [log for log in resumed.state.log_history if "loss" in log], expected

    for got, expected in run_on_ranks(two):
        assert_same_logs([dict(sorted(log.items())) for log in got], [dict(sorted(log.items())) for log in expected])


class Scripted:
    """An engine of which a completion's length depends on its prompt, and its tokens on its place and the step too."""

    def sync_weights(self, model, step):
        self.step = step

    def generate(self, prompt_ids, settings):
        first = PartialState().process_index * len(prompt_ids)
        return Rollout(prompt_ids, [self._complete(ids, first + i) for i, ids in enumerate(prompt_ids)])

    def _complete(self, prompt, place):
        rng = random.Random(f"{prompt} {place} {self.step}")
        length = random.Random(str(prompt)).choice((2, 20)) + rng.randint(0, 3)
        return [rng.randrange(6, 300) for _ in range(length)]


def judge(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("GRPO", {}),
        pytest.param("GRPO", {"loss_type": "grpo", "beta": 0.1}, marks=pytest.mark.slow),
        pytest.param("RLOO", {"beta": 0.0}, marks=pytest.mark.slow),
    ],
    ids=["DAPO", "GRPO with a reference", "RLOO"],
)
def test_completions_are_dealt_after_they_are_sampled(method, settings, model_path, tmp_path):
    def run(batch_size, balance, **more):
        rows = Dataset.from_list([{"prompt": f"Say {i}"} for i in range(8)])
        arguments = {"model": model_path, "train_dataset": rows, "reward_funcs": judge, "rollout_engine": Scripted()}
        options = {"num_generations": 4, "max_completion_length": 32, "optim": "sgd", "learning_rate": 0.1, **settings}
        options |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4, **more}
        trainer = make_trainer(
            trl_fast, tmp_path, method=method, arguments=arguments, balance_batches=balance, **options
        )
        found = logs(trainer)
        tokens = [sum(map(len, part.completion_ids)) for part in trainer.generation.slices]
        return found, tokens, sorted(ids for part in trainer.generation.slices for ids in part.completion_ids)

    dealt, kept = (run_on_ranks(run, 2, balance) for balance in ("step", "never"))
    expected, _, completions = run(4, "never")
    for ranks in (dealt, kept):
        assert sorted(ids for rank in ranks for ids in rank[2]) == completions
        for found, _, _ in ranks:
            for got, wanted in zip(found, expected, strict=True):
                for name in ("loss", "grad_norm", "reward", "num_tokens", "completions/mean_length"):
                    assert got[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-7), name
    slowest = [sum(map(max, zip(*(rank[1] for rank in ranks), strict=True))) for ranks in (dealt, kept)]
    assert slowest[0] < 0.9 * slowest[1]
