"""Scripts as people have them: with their import line changed, and unchanged under `trl-fast run`."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from trl_fast.cli.main import main

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))
# One deprecation line each for what is older.
OLDER = {
    "dpo": ["max_prompt_length", "tokenizer"],
    "orpo": ["max_prompt_length", "tokenizer"],
    "sft": ["tokenizer"],
    "sft_model_name": [],
    "reward": [],
    "kto": [],
    "ppo": [],
    "grpo": ["max_new_tokens"],
}


def older_names(record):
    known = ("max_prompt_length", "tokenizer", "max_new_tokens")
    return [name for name in known for w in record if f"`{name}` is" in str(w.message)]


def assert_trained(folder):
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_with_the_import_line_changed(script, workplace, recwarn):
    text = script.read_text()
    changed = text.replace("from trl import", "from trl_fast import")
    assert changed != text
    (workplace / "script.py").write_text(changed)
    runpy.run_path(str(workplace / "script.py"), run_name="__main__")
    assert_trained(workplace / "result")
    assert older_names(recwarn) == OLDER[script.stem]


@pytest.mark.usefixtures("without_trl")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_unchanged_under_run(script, workplace, recwarn, capsys):
    assert main(["run", str(script)]) == 0
    shown = capsys.readouterr()
    assert re.search(
        r"^trl-fast run: `import trl` gives trl_fast .*; here (\w+, )*\w+(Config|Trainer)\b", shown.err, re.M
    )
    assert len(re.findall("^kernels ", shown.out, re.M)) == 1
    assert_trained(workplace / "result")
    assert older_names(recwarn) == OLDER[script.stem]


COMMANDS = {
    "sft": "sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/Capybara --output_dir result",
    "dpo": "dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized "
    "--output_dir result --beta 0.1",
    "kto": "kto --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/kto-mix-14k "
    "--output_dir result --beta 0.1",
    "reward": "reward --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized "
    "--output_dir result",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line(command, workplace, capsys):
    assert main(shlex.split(COMMANDS[command])) == 0
    assert_trained(workplace / "result")
    assert "saved to result " in capsys.readouterr().out


@pytest.mark.usefixtures("without_trl")
def test_a_module_and_its_arguments_under_run(workplace):
    (workplace / "package").mkdir()
    (workplace / "package" / "train.py").write_text(
        "import sys\n"
        "from trl.trainer.utils import disable_dropout_in_model\n"
        "from package import helper\n"
        "if __name__ == '__main__':\n"
        "    open('out', 'w').write(f'{sys.argv[1:]} {disable_dropout_in_model.__module__} {helper.NAME}')\n"
    )
    (workplace / "package" / "helper.py").write_text("import trl\nNAME = trl.DPOConfig.__name__\n")
    assert main(["run", "-m", "package.train", "--beta", "1"]) == 0
    assert (workplace / "out").read_text() == "['--beta', '1'] trl_fast.modeling.loading DPOConfig"


@pytest.mark.usefixtures("without_trl")
def test_a_script_finds_its_neighbours_and_its_exit_status_is_its_own(workplace):
    (workplace / "scripts").mkdir()
    (workplace / "scripts" / "neighbour.py").write_text("STATUS = 3\n")
    (workplace / "scripts" / "script.py").write_text(
        "import sys, trl\nfrom neighbour import STATUS\nsys.exit(STATUS)\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(["run", "scripts/script.py"])
    assert exit_.value.code == 3


@pytest.mark.parametrize(
    "arguments, message", [([], "no script is named"), (["-m"], "no script"), (["gone.py"], "no script 'gone.py'")]
)
def test_run_without_a_script(arguments, message, capsys):
    assert main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["run", "--help"]) == 0
    assert "trl-fast run [LAUNCHER FLAGS] SCRIPT.py" in capsys.readouterr().out
