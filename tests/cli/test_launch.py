"""Flags that go to `accelerate launch`, and the processes that it starts."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from trl_fast.cli import launch as launch_module
from trl_fast.cli.launch import CONFIGS, launcher_flags, split_script
from trl_fast.cli.main import main


@pytest.fixture
def launched(monkeypatch):
    """The arguments that accelerate was called with, instead of processes."""
    calls = []
    monkeypatch.setattr(launch_module, "launch_command", calls.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return calls


@pytest.fixture
def gpus(monkeypatch):
    """A machine that has some."""
    monkeypatch.setattr(launch_module.torch.accelerator, "is_available", lambda: True)


@pytest.mark.parametrize(
    "remaining, flags, unknown",
    [
        (["--num_processes", "2"], ["--num_processes", "2"], []),
        (["--num-processes=2", "--multi_gpu"], ["--num_processes", "2", "--multi_gpu"], []),
        (["--multi_gpu", "True", "--debug", "False"], ["--multi_gpu"], []),
        (["--beeta", "1", "--num_processes", "2", "-x"], ["--num_processes", "2"], ["--beeta", "-x"]),
    ],
)
def test_remaining_strings_are_accelerates_or_nobodys(remaining, flags, unknown):
    assert launcher_flags(remaining) == (flags, unknown)


def test_every_configuration_of_ours_is_one_that_accelerate_reads(monkeypatch):
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"fsdp1", "fsdp2", "multi_gpu", "single_gpu", "zero1", "zero2", "zero3"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name in names:
        flags, _ = launcher_flags(["--num_processes", "3", "--accelerate_config", name])
        assert flags[:1] == ["--config_file"] and flags[-2:] == ["--num_processes", "3"]
        assert flags[2:4] == ["--num_processes", "1" if name == "single_gpu" else "4"]
        assert load_config_from_file(flags[1]).mixed_precision == "bf16"


def test_a_configuration_may_be_a_file_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "own.yaml").write_text((CONFIGS / "single_gpu.yaml").read_text())
    file = str(tmp_path / "own.yaml")
    assert launcher_flags(["--accelerate_config", file]) == (["--config_file", file], [])
    with pytest.raises(ValueError, match="--accelerate_config zero4: expected a file or one of fsdp1, fsdp2"):
        launcher_flags(["--accelerate_config", "zero4"])


def test_a_training_command_is_started_again_in_several_processes(launched, gpus, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("accelerate_config: fsdp2\nmulti_gpu: false\nmodel_name_or_path: m\n")
    arguments = ["dpo", "--config", str(config), "--num_processes", "2", "--beta", "0.2"]
    assert main(arguments) == 0
    (call,) = launched
    assert call.module and call.training_script == "trl_fast.cli.main"
    assert call.training_script_args == arguments
    assert (call.config_file, call.num_processes, call.multi_gpu) == (str(CONFIGS / "fsdp2.yaml"), 2, False)


def test_a_process_that_was_started_so_trains(launched, monkeypatch, capsys):
    monkeypatch.setenv("TRL_FAST_LAUNCHED", "1")
    assert main(["dpo", "--num_processes", "2", "--use_cpu", "--bf16", "false"]) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err and not launched


def test_an_unknown_flag_is_named_beside_known_ones(launched, capsys):
    assert main(["dpo", "--num_processes", "2", "--num_machine", "2", "--beeta", "1"]) == 2
    error = capsys.readouterr().err
    assert "--num_machine; did you mean 'num_machines'?" in error and "did you mean 'beta'?" in error
    assert not launched


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--num_processes", "2"], ["--standalone", "--nproc_per_node", "2"]),
        (["--accelerate_config", "multi_gpu", "--num_processes", "3"], ["--standalone", "--nproc_per_node", "3"]),
        (
            shlex.split(
                "--num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip a --main_process_port 7"
            ),
            shlex.split("--nproc_per_node 2 --nnodes 2 --node_rank 1 --master_addr a --master_port 7"),
        ),
    ],
    ids=["two", "by name", "two machines"],
)
def test_on_cpus_torchrun_starts_as_many_as_asked_for(flags, expected, launched, monkeypatch):
    calls = []
    monkeypatch.setattr(launch_module, "torchrun", calls.append)
    monkeypatch.setattr(launch_module.os, "environ", dict(os.environ))
    assert launch_module.launch(launcher_flags(flags)[0], ["env", "--x"]) == 0
    assert calls == [[*expected, "--module", "trl_fast.cli.main", "env", "--x"]] and not launched


@pytest.mark.parametrize(
    "flags, set_before, expected",
    [([], None, "3"), (["--num_cpu_threads_per_process", "2"], None, "2"), ([], "5", "5")],
    ids=["shared", "asked for", "set before"],
)
def test_processes_on_cpus_share_the_cores(flags, set_before, expected, launched, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    monkeypatch.setattr(launch_module, "torchrun", lambda _: None)
    monkeypatch.setattr(
        launch_module.os, "environ", environment | ({"OMP_NUM_THREADS": set_before} if set_before else {})
    )
    monkeypatch.setattr(launch_module.os, "cpu_count", lambda: 7)
    assert launch_module.launch(["--num_processes", "2", *flags], ["env"]) == 0
    assert launch_module.os.environ["OMP_NUM_THREADS"] == expected and not launched


def test_engines_that_need_gpus_are_refused_without_one(launched, capsys):
    assert main(["dpo", "--accelerate_config", "zero3", "--num_processes", "2"]) == 2
    assert "share a model over GPUs, and this machine has none" in capsys.readouterr().err and not launched


def test_the_exit_status_of_the_processes_is_handed_on(gpus, monkeypatch):
    def fail(arguments):
        raise subprocess.CalledProcessError(3, "python")

    monkeypatch.setattr(launch_module, "launch_command", fail)
    assert launch_module.launch(["--num_processes", "2"], ["env"]) == 3


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--num_processes", "2", "s.py", "--x"], (["--num_processes", "2"], ["s.py", "--x"])),
        (["--num_processes=2", "--multi_gpu", "-m", "a.b"], (["--num_processes", "2", "--multi_gpu"], ["-m", "a.b"])),
    ],
)
def test_flags_before_a_script(arguments, expected):
    assert split_script(arguments) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_proceses", "2", "s.py"], "--num_proceses before the script; did you mean 'num_processes'?"),
        (["--num_processes", "2"], "no script is named"),
    ],
)
def test_bad_flags_before_a_script(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_script(arguments)


def test_a_script_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, trl\n"
        "open('out.json', 'w').write(json.dumps([sys.argv[1:], trl.__doc__, os.environ['ACCELERATE_USE_CPU']]))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--cpu", "--num_processes", "1", str(script), "--flag", "1"]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == [["--flag", "1"], "trl, answered by trl_fast.", "True"]


@pytest.mark.slow
def test_two_processes_train_one_model(model_path, pairs_file, tmp_path):
    """Gloo on the CPU; each process takes two of the four pairs of a step."""
    command = [os.path.join(os.path.dirname(sys.executable), "trl-fast"), "dpo", "--model_name_or_path", model_path]
    command += ["--dataset_name", str(pairs_file), "--output_dir", str(tmp_path / "run")]
    command += shlex.split(
        "--use_cpu --bf16 false --max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --report_to none "
        "--accelerate_config multi_gpu --num_processes 2 --main_process_port 0"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("saved to") == 1 and (tmp_path / "run" / "model.safetensors").is_file()
    # Two steps of four pairs are half of the sixteen.
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == 0.5
