"""A machine has a name."""

import json

from benchmarks.machine_info import cpu_name, describe_machine


def test_the_name_comes_from_the_first_processor(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nmodel name\t: other\n")
    assert cpu_name(path) == "AMD EPYC (family 25, model 1)"
    path.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert cpu_name(path) == cpu_name(tmp_path / "missing") != ""


def test_the_description_can_be_written_down():
    described = describe_machine()
    assert json.loads(json.dumps(described)) == described
    assert all(described.values())
