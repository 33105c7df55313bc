"""Which names `import trl` answers, and what is said about the others."""

import importlib
import importlib.util
import multiprocessing.spawn
import subprocess
import sys
from fnmatch import fnmatchcase

import multiprocess.spawn
import pytest

import trl_fast
from trl_fast.dropin.finder import TrlFinder
from trl_fast.dropin.gone import GONE, GONE_MODULES
from trl_fast.dropin.names import MODULES, TRL_VERSION
from trl_fast.dropin.workers import Alias


@pytest.fixture
def installed(without_trl):
    trl_fast.install_as_trl()
    import trl

    return trl


def test_every_name_of_the_table_is_there(installed):
    for module, places in MODULES.items():
        ours = importlib.import_module(module)
        for name, place in places.items():
            value = getattr(ours, name)
            if place.startswith("trl_fast") and hasattr(value, "__module__"):
                assert value.__module__.split(".")[0] in ("trl_fast", "functools", "typing", "types", "collections"), (
                    f"{module}.{name}"
                )
        assert set(places) <= set(dir(ours))


def test_the_packages_have_all_that_is_public_here(installed):
    for name in set(trl_fast.__all__) - {"__version__"}:
        assert getattr(installed, name) is getattr(trl_fast, name)
        assert getattr(installed.trainer, name) is getattr(trl_fast, name)
    assert installed.__version__ == TRL_VERSION


def test_every_way_of_importing(installed):
    namespace = {}
    exec("import trl.trainer.dpo_trainer as a\nfrom trl.trainer import *\nfrom trl.scripts import utils", namespace)
    assert namespace["a"].DPOTrainer is namespace["DPOTrainer"] is trl_fast.DPOTrainer
    assert namespace["utils"].TrlParser is trl_fast.TrlParser
    assert installed.rewards.think_format_reward.__module__ == "trl_fast.rewards"


@pytest.mark.parametrize(
    "statement, message",
    [
        ("from trl import pack_examples", "trl.pack_examples: TRL had it until 0.19; use pack_dataset"),
        ("from trl.trainer import XPOTrainer", "trl.trainer.XPOTrainer: TRL had it until 0.28.*trl.experimental"),
        (
            "from trl.trainer.utils import get_peft_config, unheard",
            "does not have trl.trainer.utils.unheard; leave it out",
        ),
        ("from trl.core import LengthSampler", "trl.core.LengthSampler: .* use random.randrange"),
        ("from trl.core import respond_to_batch", "PPOTrainer of TRL up to 0.11"),
        ("from trl.extras import BestOfNSampler", "trl.extras.BestOfNSampler: .* num_return_sequences"),
        ("from trl.extras.vllm_client import VLLMClient", "trl.extras.vllm_client: .* use_vllm=True"),
        ("from trl.trainer.judges import PairRMJudge", "trl.trainer.judges: TRL had it until 0.28"),
        ("from trl.chat_template_utils import qwen3_chat_template", "keeps no copies of models' chat templates"),
        ("from trl import NashMDTrainer", "subclass of OnlineDPOTrainer; neither TRL 1.16"),
        ("import trl.experimental.nash_md", "use OnlineDPOTrainer"),
        ("from trl.experimental.judges import PairRMJudge", "judges: TRL had it until 0.28"),
        (
            "from trl.experimental.harbor import HarborSpec",
            "the package harbor's tasks, .* import it from TRL itself",
        ),
        ("import trl.experimental.unheard", "trl_fast does not have it; run the script with TRL itself"),
    ],
)
def test_what_is_not_there_is_an_import_error_that_says_what_to_do(statement, message, installed):
    with pytest.raises(ImportError, match=message):
        exec(statement)


def test_attributes_that_are_not_there(installed):
    assert not hasattr(installed, "PRMTrainer")
    with pytest.raises(AttributeError, match="TRL had it until 0.19"):
        installed.pack_examples  # noqa: B018
    with pytest.raises(AttributeError, match="does not have trl.trainer.utils.unheard"):
        installed.trainer.utils.unheard  # noqa: B018


def test_no_name_that_is_there_is_called_gone():
    there = {*trl_fast.__all__, *(name for places in MODULES.values() for name in places)}
    assert not {name for name in there for gone in GONE if fnmatchcase(name, gone)}
    assert not set(GONE_MODULES) & set(MODULES) - {
        "trl.chat_template_utils",
        "trl.core",
        "trl.experimental",
        "trl.kernels",
    }


def test_trl_itself_must_not_have_been_imported():
    import trl

    with pytest.raises(ImportError, match=r"trl has been imported from .*trl/__init__.py already.*trl-fast run"):
        trl_fast.install_as_trl()
    assert sys.modules["trl"] is trl


def test_twice_is_once(installed):
    trl_fast.install_as_trl()
    assert sys.modules["trl"] is installed
    assert sum(isinstance(finder, TrlFinder) for finder in sys.meta_path) == 1


def test_caches_can_be_invalidated(installed):
    # transformers does it before it imports a model's own code.
    importlib.invalidate_caches()
    assert importlib.import_module("trl.rewards") is installed.rewards


def test_kto_where_it_was_experimental(installed):
    from trl.experimental.kto import KTOConfig, KTOTrainer
    from trl.experimental.kto.kto_trainer import KTOTrainer as Again

    assert (KTOConfig, KTOTrainer, Again) == (trl_fast.KTOConfig, trl_fast.KTOTrainer, trl_fast.KTOTrainer)


def test_methods_of_trls_experimental_package(installed):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    ours = (trl_fast.GMPOConfig, trl_fast.GMPOTrainer, trl_fast.OnlineDPOConfig, trl_fast.OnlineDPOTrainer)
    assert (GMPOConfig, GMPOTrainer, OnlineDPOConfig, OnlineDPOTrainer) == ours
    assert (installed.OnlineDPOTrainer, installed.OnlineDPOConfig) == (OnlineDPOTrainer, OnlineDPOConfig)


def test_an_import_of_trl_is_cheap():
    script = (
        "import sys, trl_fast; trl_fast.install_as_trl(); import trl; print({'torch', 'datasets'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


WORKERS = """
import multiprocessing
import sys

import trl

def kind(_):
    import trl.rewards
    return type(trl).__name__, type(trl.rewards).__name__

if __name__ == "__main__":
    print("parent", type(trl).__name__)
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print("worker", *pool.map(kind, [0])[0])
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_know_trl(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    command = [sys.executable, "-m", "trl_fast.cli.main", "run", str(script), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["parent TrlModule", "worker TrlModule TrlModule"], done.stderr


def test_workers_are_left_alone_where_it_is_not_installed(without_trl):
    trl_fast.install_as_trl()
    for package in (multiprocessing.spawn, multiprocess.spawn):
        assert any(isinstance(value, Alias) for value in package.get_preparation_data("worker").values())
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, TrlFinder)]
    for package in (multiprocessing.spawn, multiprocess.spawn):
        assert not any(isinstance(value, Alias) for value in package.get_preparation_data("worker").values())
