"""GRPOTrainer in environments, against TRL 1.16.0's for the same turns, and as a person uses it."""

import copy
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest
import trl
from datasets import Dataset

import trl_fast
import trl_fast.data.packing as packing
from support import vllm
from support.environments import Judged, Sums, Visits, Words, questions_with_start
from support.models import save_tiny_model
from support.tokenizer import EOS
from support.tools import ADD, ANSWER, ToolPolicy, tool_tokenizer
from support.training import assert_same_logs, make_trainer
from support.vllm import install_fake_vllm
from trl_fast.rollout.responses import RESPONSE_TEMPLATES

SETTINGS = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 90,
    "max_steps": 2,
}
# With these the metrics are TRL's to the last digit.
OURS = {"skip_zero_advantages": False, "keep_groups_together": False}
FAILURES = "environments/failure_frequency"
# In the place of a scripted policy: the model itself samples.
GENERATES = "generates"


@pytest.fixture(scope="module")
def tool_model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-environments"), tool_tokenizer())


def make(module, folder, model_path, *, seen=None, **settings):
    """A trainer whose turns come from a ToolPolicy; what its reward function saw goes to `seen`."""

    def talk(prompts, completions, completion_ids, environments, **columns):
        if seen is not None:
            states = [copy.deepcopy(vars(each)) for each in environments]
            seen.append((prompts, completions, states, columns.get("start")))
        return [3.0 * len(said) - len(ids) / 5 for said, ids in zip(completions, completion_ids, strict=True)]

    tokenizer = tool_tokenizer()
    if module is trl:
        # TRL knows chat templates by their text.
        tokenizer.response_template = next(iter(RESPONSE_TEMPLATES.values()))
    policy = settings.pop("policy", None) or ToolPolicy(tokenizer)
    given = {"reward_funcs": talk, "environment_factory": Sums, "train_dataset": questions_with_start()}
    names = ("tools", "train_dataset", "eval_dataset", "environment_factory", "reward_funcs", "rollout_func")
    given |= {name: settings.pop(name) for name in names if name in settings}
    arguments = {"model": model_path, "processing_class": tokenizer, **given}
    if module is not trl and policy is not GENERATES:
        arguments["rollout_engine"] = policy
    trainer = make_trainer(module, folder, method="GRPO", arguments=arguments, **{**SETTINGS, **settings})
    if module is trl:
        trainer._generate_single_turn = lambda prompt_ids, *_, **__: (policy.turns(prompt_ids), None)
    return trainer


def gone() -> str:
    """Goes."""
    return "nowhere"


CASES = {
    "one kind, evaluated": {"eval_dataset": questions_with_start(2), "per_device_eval_batch_size": 8},
    "several kinds and tools": {
        "environment_factory": {"sums": Sums, "words": Words, "judged": Judged, "more": Sums},
        "train_dataset": questions_with_start(8, kinds=("sums", "words", "judged", "more")),
        "tools": [gone],
        "per_device_train_batch_size": 16,
        "num_iterations": 2,
    },
    "no dataset, no reward functions": {
        "environment_factory": Visits,
        "train_dataset": None,
        "reward_funcs": None,
        "max_steps": 3,
        "beta": 0.1,
    },
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_it_does_what_trl_does(settings, tool_model_path, tmp_path, monkeypatch):
    # Whatever prompts and completions begin alike with is shared.
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    logs, seen, failures = {}, {trl: [], trl_fast: []}, []
    for module in (trl, trl_fast):
        ours = OURS if module is trl_fast else {}
        trainer = make(module, tmp_path / module.__name__, tool_model_path, seen=seen[module], **ours, **settings)
        trainer.train()
        if "eval_dataset" in settings:
            trainer.evaluate()
        logs[module] = [{k: v for k, v in log.items() if k != "step_time"} for log in trainer.state.log_history]
        failures += [log.pop(name, None) for log in logs[module] for name in (FAILURES, "eval_" + FAILURES)]
    assert seen[trl_fast] == seen[trl]
    assert logs[trl][0]["tools/call_frequency"] > 0 and logs[trl][0]["tools/failure_frequency"] > 0
    assert_same_logs(logs[trl_fast], logs[trl])
    assert set(failures) == {None, 0.0}


def test_rows_need_no_prompt_and_the_policy_itself_generates(tool_model_path, tmp_path):
    seen, settings = [], {"max_completion_length": 8, "num_iterations": 2}
    kinds = {"visits": Visits, "words": Words}
    rows = questions_with_start(4, kinds=tuple(kinds)).remove_columns("prompt")
    settings |= {"train_dataset": rows, "eval_dataset": rows.select([1]), "environment_factory": kinds}
    trainer = make(trl_fast, tmp_path, tool_model_path, seen=seen, policy=GENERATES, **settings)
    trainer.train()
    trainer.evaluate()
    prompts, _, states, _ = seen[-1]
    assert {prompt[0]["content"] for prompt in prompts} == {" Say w1."} and len(states) == 4
    first = {prompt[0]["content"]: state.get("given") for prompt, state in zip(seen[0][0], seen[0][2], strict=True)}
    assert first["Visit 1."].keys() == {"start"}


def test_equal_texts_of_reset_leave_one_prompt(tool_model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)

    class Dice(Sums):
        rolled = 0

        def reset(self, **row):
            Dice.rolled += 1
            self.total = Dice.rolled // 5
            return f" Rolled {self.total}."

    trainer = make(trl_fast, tmp_path, tool_model_path, environment_factory=Dice)
    samples = trainer.make_samples([dict(trainer.train_dataset[0])] * 8)
    prompts = [trainer.tokenizer.decode(ids).rpartition("Rolled ")[2][0] for ids in samples.prompt_ids]
    assert prompts == ["0"] * 4 + ["1"] * 4
    alike = samples.select(range(4)).batch("shared_prefix", 0)
    own = [len(ids) for ids in samples.completion_ids[:4]]
    assert alike.input_ids.numel() <= len(samples.prompt_ids[0]) + sum(own)
    assert len(trainer.environments) == 8 and trainer.environments[7].total == 1


class Moody(Sums):
    """Fails in a row's own way, but never in all completions of a prompt."""

    places = 0

    def reset(self, start, **row):
        super().reset(start=start)
        Moody.places += 1
        self.fails = {1: "reset", 6: "hang", 11: "reward"}.get(Moody.places)
        if self.fails == "reset":
            raise ConnectionError("no server")

    def add(self, a: int, b: int) -> int:
        """
        Adds.

        Args:
            a: A number.
            b: Another.
        """
        if self.fails == "hang":
            time.sleep(2)
        return super().add(a, b)

    def get_reward(self):
        if self.fails == "reward":
            raise KeyError("score")
        return float(self.total)


class Adder(ToolPolicy):
    """Adds as often as the prompt was read, then answers."""

    def _turn(self, prompt):
        self.seen[tuple(prompt)] += 1
        text = ADD if self.tokenizer.decode(prompt).count("tool_call") < 2 * (self.seen[tuple(prompt)] % 4) else ANSWER
        return self.tokenizer(text=text)["input_ids"]


def test_one_that_fails_costs_its_completion_and_not_the_run(tool_model_path, tmp_path, caplog):
    Moody.places, seen = 0, []

    def spread(environments, log_extra, **_):
        seen.append(environments)
        log_extra("total", [each.total for each in environments])
        return [each.total + index / 8 for index, each in enumerate(environments)]

    given = {"environment_factory": Moody, "reward_funcs": spread, "tool_timeout": 0.2, "log_completions": True}
    policy = Adder(tool_tokenizer())
    trainer = make(trl_fast, tmp_path, tool_model_path, policy=policy, per_device_train_batch_size=12, **given)
    samples = trainer.make_samples([dict(trainer.train_dataset[i // 4]) for i in range(12)])
    failed = samples.excluded.nonzero().flatten().tolist()
    assert failed == [0, 5, 10] and len(seen[0]) == 10
    assert (samples.advantages[failed] == 0).all() and (samples.lengths[failed] == 0).all()
    for group in samples.advantages.view(3, 4):
        assert group.count_nonzero() == 3 and abs(group.sum()) < 1e-4
    log = trainer.completions_log.logs["extra"]["total"]
    assert [value is None for value in log] == [index in (0, 5) for index in range(12)]
    Moody.places = 0
    trainer.train()
    assert [log[FAILURES] for log in trainer.state.log_history[:2]] == [0.25, 0]
    told = [message for message in caplog.messages if "is not learned from" in message]
    assert len(told) == 3


def test_where_all_fail_the_last_step_is_saved(tool_model_path, tmp_path):
    class Gone(Sums):
        resets = 0

        def reset(self, **row):
            Gone.resets += 1
            if Gone.resets > 8:
                raise ConnectionError("the server went away")

    trainer = make(trl_fast, tmp_path, tool_model_path, environment_factory=Gone, save_strategy="steps", max_steps=3)
    with pytest.raises(RuntimeError, match="all 8 environments .* the first: ConnectionError: the server went away"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()


class Locked(Sums):
    """Cannot be pickled or copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_run_goes_on_from_a_checkpoint_within_a_generation(tool_model_path, tmp_path):
    settings = {
        "environment_factory": Locked,
        "reward_funcs": None,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 5,
        **OURS,
    }
    logs = []
    for resumed in (None, tmp_path / "checkpoint-5"):
        trainer = make(trl_fast, tmp_path, tool_model_path, **settings)
        trainer.train(resume_from_checkpoint=resumed)
        logs.append({k: v for k, v in trainer.state.log_history[-2].items() if k != "step_time"})
    assert_same_logs(logs[1:], logs[:1], rel=0, abs=0)


def test_a_text_of_reset_that_is_too_long_costs_its_completion(tool_model_path, tmp_path, caplog):
    class Pages(Sums):
        opened = 0

        def reset(self, **row):
            Pages.opened += 1
            self.total = Pages.opened
            return "word " * 300 if Pages.opened in (2, 7) else None

    settings = {"environment_factory": Pages, "max_completion_length": 8, "max_steps": 1}
    trainer = make(trl_fast, tmp_path, tool_model_path, policy=GENERATES, **settings)
    trainer.train()
    assert trainer.state.log_history[0][FAILURES] == 0.25
    assert "failed in reset() (ValueError: its text makes a prompt of" in caplog.text


# How many environments each of them finds: one a completion, once they are reset.
HOOKS = {"_generate_and_score_completions": 0, "_calculate_rewards": 8, "_tokenize_prompts": 8, "_generate": 8}


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_subclass_overrides_of_trl_finds_the_environments(name, tool_model_path, tmp_path):
    called = []

    def method(self, *given):
        called.append(len(self.environments or ()))
        return getattr(super(Own, self), name)(*given)

    Own = type("Own", (trl_fast.GRPOTrainer,), {name: method, "__module__": "user"})
    logs = {}
    for kind in (trl_fast.GRPOTrainer, Own):
        module = SimpleNamespace(GRPOConfig=trl_fast.GRPOConfig, GRPOTrainer=kind)
        settings = {"environment_factory": {"sums": Sums, "words": Words}, "tools": [gone], "max_steps": 1}
        rows = questions_with_start(8, kinds=("sums", "words"))
        reward = {"reward_funcs": lambda environments, **_: [float(len(vars(each))) for each in environments]}
        trainer = make(module, tmp_path, tool_model_path, train_dataset=rows, **settings, **reward, **OURS)
        trainer.train()
        history = trainer.state.log_history
        logs[kind] = [{k: log[k] for k in sorted(log) if k != "step_time"} for log in history]
    assert set(called) == {HOOKS[name]}
    assert_same_logs(logs[Own], logs[trl_fast.GRPOTrainer])


@pytest.mark.parametrize("setting", ["environment_timeout", "reward_timeout"])
def test_what_is_bound_to_a_thread_works_with_a_time_limit(setting, tool_model_path, tmp_path):
    class Stored(Sums):
        def __init__(self):
            self.connection = sqlite3.connect(":memory:")

        def reset(self, **row):
            self.total = self.connection.execute("select 1").fetchone()[0]

        def get_reward(self):
            return self.connection.execute("select ?", (self.total,)).fetchone()[0]

    settings = {"environment_factory": Stored, "max_steps": 1, setting: 5}
    trainer = make(trl_fast, tmp_path, tool_model_path, **settings)
    trainer.train()
    assert trainer.state.log_history[0][FAILURES] == 0


def test_rewards_of_one_name_have_metrics_of_their_own(tool_model_path, tmp_path):
    def named(value):
        class Sums(Words):
            def get_reward(self):
                return value

        return Sums

    def rewards(factory, **given):
        trainer = make(trl_fast, tmp_path, tool_model_path, environment_factory=factory, max_steps=1, **given)
        trainer.train()
        found = {name: value for name, value in trainer.state.log_history[0].items() if name.startswith("rewards/")}
        return {name.split("/")[1]: value for name, value in found.items() if name.endswith("mean")}

    rows = questions_with_start(2, ("a", "b"))
    found = rewards({"a": named(1.0), "b": named(2.0)}, train_dataset=rows)
    assert found.keys() - {"talk"} == {"a.Sums", "b.Sums"}
    assert (found["a.Sums"], found["b.Sums"]) == (1, 2)

    def sums(completions, **_):
        return [3.0] * len(completions)

    sums.__name__ = "Sums"
    assert rewards(named(1.0), reward_funcs=sums) == {"Sums": 3, "environment.Sums": 1}


def test_a_row_of_a_stream_that_chooses_what_there_is_not_is_named(tool_model_path, tmp_path):
    rows = questions_with_start(4, ("sums", "sums", "sum")).to_iterable_dataset()
    settings = {"environment_factory": {"sums": Sums}, "train_dataset": rows, "max_steps": 4}
    message = r"The train dataset, row 2, column 'environment': 'sum' is none of environment_factory's \['sums'\]"
    with pytest.raises(ValueError, match=message):
        make(trl_fast, tmp_path, tool_model_path, **settings).train()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rollout_func": lambda prompts, trainer: {}}, ValueError, "environment_factory and rollout_func: .* one of"),
        (
            {"environment_factory": {"sums": Sums}},
            ValueError,
            r"train dataset has the columns .*expected 'environment'",
        ),
        (
            {"environment_factory": {"sums": Sums}, "train_dataset": questions_with_start(4, ("sums", "sum"))},
            ValueError,
            r"row 1, column 'environment': 'sum' is none of environment_factory's \['sums'\]",
        ),
        ({"train_dataset": None}, ValueError, "max_steps=-1: without a train_dataset"),
        ({"train_dataset": None, "environment_factory": {"a": Sums}}, ValueError, "train_dataset is required where"),
        (
            {"train_dataset": questions_with_start().rename_column("start", "environments")},
            ValueError,
            "column 'environments'",
        ),
        (
            {"train_dataset": questions_with_start().remove_columns("start"), "environment_factory": Words},
            ValueError,
            "Words.reset()",
        ),
        ({"reward_funcs": None, "environment_factory": Words}, ValueError, "there is no reward function"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights: expected one for each"),
        ({"tools": [Sums().fail]}, ValueError, "two functions have the name 'fail'"),
        ({"environment_timeout": 0}, ValueError, "environment_timeout"),
        (
            {"train_dataset": Dataset.from_dict({"prompt": ["What?"], "start": [1]})},
            ValueError,
            "row 0, column 'prompt': 'What[?]' is text, which has no place for tools",
        ),
    ],
)
def test_what_cannot_be_is_named_before_training(given, error, message, tool_model_path, tmp_path):
    steps = {"max_steps": -1} if "train_dataset" in given and given["train_dataset"] is None else {}
    with pytest.raises(error, match=message):
        make(trl_fast, tmp_path, tool_model_path, **given, **steps)


def test_methods_without_tools_have_no_environments(tool_model_path, tmp_path):
    with pytest.raises(NotImplementedError, match="environment_factory: RLOOTrainer has none; use GRPOTrainer"):
        trl_fast.RLOOTrainer(tool_model_path, gone, train_dataset=questions_with_start(), environment_factory=Sums)


def test_vllm_plays_too(tool_model_path, tmp_path, monkeypatch):
    tokenizer = tool_tokenizer()

    def turn(prompt, index, max_tokens):
        told = tokenizer.decode(prompt)
        text = ADD + EOS if told.count("<|im_start|>tool") < 1 + index % 2 else ANSWER
        ids = tokenizer(text=text)["input_ids"]
        return ids, [-0.5] * len(ids)

    install_fake_vllm(monkeypatch)
    monkeypatch.setattr(vllm, "made_up", turn)
    policy = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
    rows = questions_with_start(2)
    trainer = make(trl_fast, tmp_path, tool_model_path, policy=GENERATES, train_dataset=rows, **policy)
    trainer.train()
    asked = next(given for name, *given in trainer.engine.engine.llm.log if name == "generate")
    prompts = [each["prompt_token_ids"] for each in asked[0]]
    assert {"Begin" in tokenizer.decode(prompt) for prompt in prompts} == {False, True}
    assert sorted(each.total for each in trainer.environments) == [3, 3, 4, 4, 6, 6, 7, 7]
    assert trainer.state.log_history[0]["tools/call_frequency"] >= 1
