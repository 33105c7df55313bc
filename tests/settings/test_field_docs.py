"""Every field of a config says what it is, and the source tells the same of it as the class does."""

import dataclasses
import re
from enum import Enum

import pytest

from trl_fast.cli.rewards import REWARD_FUNCTIONS
from trl_fast.lazy_imports import import_place
from trl_fast.settings.field_docs import UNKNOWN, read_fields
from trl_fast.trainers.methods import METHODS

ARGUMENTS = {
    **{method.name: method.config for method in METHODS.values()},
    "model": "trl_fast.cli.arguments:ModelConfig",
    "mixture": "trl_fast.cli.arguments:DatasetMixtureConfig",
    "dataset": "trl_fast.cli.arguments:DatasetConfig",
    "rewards": "trl_fast.cli.rewards:RewardScriptArguments",
    "validate": "trl_fast.cli.validate:ValidateArguments",
    "plan": "trl_fast.cli.plan:PlanArguments",
    "sft 0.8": "trl_fast.dropin.helpers.older_arguments:SftScriptArguments",
    "dpo 0.8": "trl_fast.dropin.helpers.older_arguments:DpoScriptArguments",
}


def default_of(item):
    made = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return made.value if isinstance(made, Enum) else made


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_field_of_ours_has_a_text(name):
    docs = read_fields(ARGUMENTS[name])
    for doc in docs.values():
        if doc.owner == "TrainingArguments" or doc.is_older_name:
            continue
        assert doc.text.endswith("."), doc
        assert len(doc.summary) <= 112, doc
        assert doc.default is not None or re.search(r"\bNone\b|[Hh]ub name|Has no effect", doc.text), doc
        missing = [choice for choice in doc.choices if not re.search(rf"\b{choice}\b", doc.text)]
        assert not missing, (doc, missing)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_source_tells_what_the_class_has(name):
    docs, items = read_fields(ARGUMENTS[name]), dataclasses.fields(import_place(ARGUMENTS[name]))
    assert list(docs) == [item.name for item in items]
    for item in items:
        doc, default = docs[item.name], default_of(item)
        assert (doc.default is UNKNOWN and default is dataclasses.MISSING) or doc.default == default, doc
        assert doc.text, doc


def test_the_text_of_reward_funcs_lists_every_function():
    text = read_fields(ARGUMENTS["rewards"])["reward_funcs"].text
    assert all(name in text for name in REWARD_FUNCTIONS)


SOURCE = '''
from dataclasses import dataclass, field
from enum import Enum

NAMES = {"a": 1, "b": 2}
HOW = ("fast", *NAMES)


class Colour(Enum):
    RED = "red"


@dataclass
class Base:
    bare: str
    kept: int = 1
    """Kept."""
    moved: int = 1
    """Before."""


@dataclass
class Settings(Base):
    made: list[str] = field(default_factory=lambda: ["x"])
    empty: dict = field(default_factory=dict)
    """A summary
    of two lines.

    And more.
    """
    how: str = field(default="fast", metadata={"help": "90%% of it.", "choices": HOW})
    colour: Colour | str = "red"
    fused: Literal["auto", True] = "auto"
    computed: int = len(HOW)
    moved: int = 2
    """After."""
'''


def test_what_is_read_of_a_source(tmp_path, monkeypatch):
    (tmp_path / "field_docs_example.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    docs = read_fields("field_docs_example:Settings")
    assert list(docs) == ["bare", "kept", "moved", "made", "empty", "how", "colour", "fused", "computed"]
    assert [docs[name].text for name in ("kept", "moved", "bare", "how")] == ["Kept.", "After.", "", "90% of it."]
    assert [docs[name].owner for name in ("kept", "moved")] == ["Base", "Settings"]
    assert docs["empty"].summary == "A summary of two lines." and docs["empty"].text.endswith("And more.")
    assert [docs[name].default for name in ("made", "empty", "moved")] == [["x"], {}, 2]
    assert docs["how"].choices == ("fast", "a", "b") and docs["colour"].choices == ("red",)
    assert docs["fused"].choices == ("auto", True)
    assert docs["bare"].default is UNKNOWN and docs["computed"].default is UNKNOWN
    with pytest.raises(KeyError):
        read_fields("field_docs_example:Nothing")
