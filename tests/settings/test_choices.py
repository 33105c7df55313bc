"""Settings that take one of several names: read from a table when they are needed, and checked."""

import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest

from trl_fast.losses.kto import LOSSES
from trl_fast.settings.choices import Choices, check_choice
from trl_fast.trainers.methods import METHODS


@dataclass
class Settings:
    loss_type: str = field(default="kto", metadata={"choices": Choices("trl_fast.losses.kto:LOSSES")})
    mode: str = "fast"


def test_choices_are_the_names_of_the_table():
    choices = Choices("trl_fast.losses.kto:LOSSES")
    assert list(choices) == list(LOSSES) and len(choices) == len(LOSSES)
    assert choices[0] in choices and "ipo" not in choices


def test_the_table_is_imported_when_a_name_is_needed():
    script = """
import sys
from trl_fast.settings.choices import Choices
choices, table = Choices("trl_fast.losses.kto:LOSSES"), "trl_fast.losses.kto"
print(table in sys.modules, len(choices), table in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", str(len(LOSSES)), "True"], done.stderr


def test_a_value_that_is_none_of_the_choices_is_named_with_them():
    check_choice(Settings(), "loss_type")
    with pytest.raises(ValueError, match="loss_type='ipo' is unknown; expected one of kto, apo_zero_unpaired"):
        check_choice(Settings(loss_type="ipo"), "loss_type")
    with pytest.raises(ValueError, match="mode='slow' is unknown; expected one of fast, faster"):
        check_choice(Settings(mode="slow"), "mode", ("fast", "faster"))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_default_of_a_config_is_one_of_its_choices(method):
    for item in fields(method.config_class()):
        choices = item.metadata.get("choices")
        if isinstance(choices, Choices):
            assert item.default is None or item.default in choices, item.name
