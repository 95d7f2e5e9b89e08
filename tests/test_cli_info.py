"""`peftkern info` and what every command shares."""

import json
import subprocess
import sys

import pytest
import torch

import peftkern
from peftkern.cli import main


def test_json_has_the_whole_picture(capsys, monkeypatch):
    monkeypatch.setenv("PEFTKERN_ISA", "scalar")
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["isa"] == "scalar"
    assert found["isa_levels"].keys() == {"scalar", "avx2", "avx512", "avx512bf16"}
    assert found["isa_levels"]["scalar"] is True
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["peftkern"] == peftkern.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"peft", "bitsandbytes", "transformers"} <= found["versions"].keys()
    assert found["backends"]["reference"] == found["backends"]["cpu"] == "available"
    has_cuda = bool(found["cuda_archs"])
    assert ("needs tensors on a CUDA device" if has_cuda else "not part of this build") in found["backends"]["cuda"]
    assert found["environment"]["PEFTKERN_ISA"] == "scalar"
    assert found["backend"] == "reference"
    assert found["build"]["compiler"]


def test_text_says_the_same(capsys, monkeypatch):
    monkeypatch.setenv("PEFTKERN_ISA", "scalar")
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["instruction set"].strip().startswith("scalar (here: ")
    assert lines["PEFTKERN_ISA"].strip() == "scalar"


def test_a_package_that_is_missing(capsys, monkeypatch):
    from peftkern.cli import info

    monkeypatch.setattr(info, "OPTIONAL_PACKAGES", ("surely-not-installed",))
    assert main(["info"]) == 0
    assert "surely-not-installed  not installed" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "finetune"])
@pytest.mark.parametrize("variable", ["PEFTKERN_ISA", "PEFTKERN_BACKEND"])
def test_unknown_name_in_the_environment(variable, command, capsys, monkeypatch):
    monkeypatch.setenv(variable, "mmx")
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert variable in error and error.count("\n") == 1


@pytest.mark.parametrize(("argv", "named"), [([], "command"), (["dance"], "dance"), (["info", "--loud"], "--loud")])
def test_bad_arguments_take_one_line(argv, named, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("peftkern: error: ") and named in error and error.count("\n") == 1


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "peftkern", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"peftkern {peftkern.__version__}"
