import json
import shlex

import pytest

from support.bad_files import write_data, write_models, write_yaml
from support.models import save_tiny_classifier, save_tiny_model
from support.tokenizer import build_tokenizer
from support.training import color_pairs
from trl_fast.cli import training
from trl_fast.cli.main import main


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), build_tokenizer())


@pytest.fixture(scope="session")
def reward_model_path(tmp_path_factory):
    return save_tiny_classifier(tmp_path_factory.mktemp("tiny-reward"), build_tokenizer())


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in color_pairs(16)))
    return path


# Flags of a run that is stopped before its first step.
RUN = (
    "--output_dir {out} --per_device_train_batch_size 2 --max_steps 1 --max_length 64 --use_cpu true --bf16 false "
    "--report_to none --dataloader_pin_memory false"
)


@pytest.fixture(scope="session")
def places(tmp_path_factory, model_path, reward_model_path):
    """Folders with broken files of each kind, and whole models, by the names that command lines call them."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("data", "yaml", "models", "out")}
    write_data(found["data"])
    write_models(found["models"], model_path)
    write_yaml(found["yaml"], model_path, str(found["data"]))
    return {"model": model_path, "reward": reward_model_path, **{name: str(place) for name, place in found.items()}}


@pytest.fixture
def refused(places, monkeypatch, capsys, tmp_path):
    """Runs a command line and checks that it is refused: one last line on stderr that names what it has to."""
    monkeypatch.setattr(training, "train", lambda *arguments, **keywords: pytest.fail("training has begun"))
    monkeypatch.chdir(tmp_path)

    def run(command_line, *named):
        words = [word.format(**places) for word in shlex.split(command_line.replace("RUN", RUN))]
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        shown = capsys.readouterr()
        line = shown.err.rstrip().splitlines()[-1]
        assert status == 2, line
        assert "Traceback" not in shown.err and "usage:" not in shown.err
        assert "WAS RUN" not in shown.out + shown.err
        ours = [each for each in shown.err.splitlines() if each.startswith("trl-fast ")]
        assert ours == [line] and line.startswith(f"trl-fast {words[0]}: "), shown.err[-500:]
        for text in named:
            assert text.format(**places) in line
        return line

    return run
