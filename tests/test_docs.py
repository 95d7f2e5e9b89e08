"""The documents are true: their code runs, commands parse, links lead somewhere, the table is the data's."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import peftkern
from benchmarks import backends_table, table
from peftkern.cli import _build_parser, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
README = (ROOT / "README.md").read_text()
NEEDS = {"bitsandbytes", "peft", "transformers"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(language):
    """(document:line, text) of each fenced block of a language."""
    found = []
    for path in DOCUMENTS:
        document = path.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", document, re.M | re.S):
            line = document[: match.start()].count("\n") + 2
            found.append(pytest.param(match.group(1), id=f"{name_of(path)}:{line}"))
    return found


def commands():
    """Every line of every shell block, one parameter each."""
    return [
        pytest.param(line, id=line) for block in blocks("sh") for line in block.values[0].splitlines() if line.strip()
    ]


def test_every_block_has_a_language_that_is_checked():
    for path in DOCUMENTS:
        fences = re.findall(r"^```(.*)$", path.read_text(), re.M)
        assert set(fences[::2]) <= {"sh", "python"} and set(fences[1::2]) <= {""}


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path):
    for package in NEEDS:
        if re.search(rf"^(?:import|from) {package}\b", code, re.M):
            pytest.importorskip(package)
    program = tmp_path / "example.py"
    program.write_text("import torch\ntorch.set_num_threads(1)\n" + code)
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_has_twelve_lines_and_leaves_an_adapter(tmp_path):
    (code,) = re.findall(r"## Example\n\n```python\n(.*?)```", README, re.S)
    lines = code.strip().splitlines()
    assert len([line for line in lines if line]) == 12
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def make_targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def check_make(arguments):
    assert arguments and set(arguments) <= make_targets()


def check_pip(arguments):
    assert arguments[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    for argument in arguments[1:]:
        if not argument.startswith("-"):
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", argument)
            assert extras
            for extra in (extras.group(1) or "").split(","):
                assert not extra or re.search(rf"^{extra} = \[", project, re.M)


def check_peftkern(arguments):
    args = _build_parser().parse_args(arguments)
    assert callable(args.run)


def check_python(arguments):
    assert arguments[0] == "-m"
    module, rest = arguments[1], arguments[2:]
    if module == "pytest":
        assert rest and all((ROOT / file).is_file() for file in rest)
        return
    program = importlib.import_module(module)
    if module == "benchmarks.run":
        program.parse(rest)
    else:
        options = {argument for argument in rest if argument.startswith("--")}
        source = Path(program.__file__).read_text()
        assert all(f'"{option}"' in source for option in options)


CHECKS = {"make": check_make, "pip": check_pip, "peftkern": check_peftkern, "python": check_python}


@pytest.mark.parametrize("command", commands())
def test_command_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        assert f"`{name}`" in README and value
    program, arguments = Path(words[0]).name, words[1:]
    CHECKS[program](arguments)


def test_make_targets_in_the_text_exist():
    mentioned = {target for path in DOCUMENTS for target in re.findall(r"`make (\w+)`", path.read_text())}
    assert {"demo", "lint"} <= mentioned <= make_targets()


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]])
def test_info_runs(arguments, capsys):
    assert f"peftkern {arguments[0]}" in README
    assert main(arguments) == 0
    assert "scalar" in capsys.readouterr().out


def test_options_in_the_text_exist():
    files = [*ROOT.glob("peftkern/cli/*.py"), *ROOT.glob("benchmarks/*.py")]
    sources = "".join(file.read_text() for file in files)
    for path in DOCUMENTS:
        for option in re.findall(r"`(--[a-z-]+)`", path.read_text()):
            assert f'"{option}"' in sources or option == "--no-build-isolation", option


def anchors(document):
    headings = re.findall(r"^#+ (.*)$", document, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists() if file else True, target
        if anchor:
            assert anchor in anchors((path.parent / file).read_text() if file else path.read_text()), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_named_in_the_text_exist(path):
    for name in re.findall(r"`((?:peftkern|csrc|tests|benchmarks|docs|examples)/[\w./*<>-]*)`", path.read_text()):
        pattern = re.sub(r"<\w+>", "*", name.rstrip("/"))
        assert list(ROOT.glob(pattern)), name


def test_readme_names_everything_public():
    names = [name for name in peftkern.__all__ if name != "nn"]
    names += [f"nn.{name}" for name in peftkern.nn.__all__]
    assert [name for name in names if not re.search(rf"`{re.escape(name)}\b", README)] == []


def test_signatures_in_the_readme_are_real():
    checked = 0
    for name, inside in re.findall(r"`(\w+)\((\w[^`]*)\)`", README):
        function = getattr(peftkern, name, None)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        for argument in inside.split(", "):
            argument, _, default = argument.partition("=")
            if argument in ("model_or_function", "*args"):
                continue
            assert argument in parameters, f"{name}: {argument}"
            assert not default or repr(parameters[argument].default) == default
        checked += 1
    assert checked >= 8


def test_readme_shows_the_committed_results():
    begin, end = table.shown(README)
    wanted = table.of_files(table.RESULTS)
    assert README[begin:end] == f"\n{wanted}\n", "run: python -m benchmarks.table --update README.md"


def test_missed_targets_are_the_committed_results_s():
    document = (ROOT / "docs/speed.md").read_text()
    begin, end = table.shown(document)
    wanted = table.missed(table.read_report(table.RESULTS))
    assert document[begin:end] == f"\n{wanted}\n", "run: python -m benchmarks.table --missed --update docs/speed.md"


def test_methods_figures_are_the_committed_results():
    document = (ROOT / "docs/methods.md").read_text()
    begin, end = table.shown(document)
    wanted = table.of_files(table.METHODS_RESULTS)
    update = "python -m benchmarks.table benchmarks/results/methods/speed.json --update docs/methods.md"
    assert document[begin:end] == f"\n{wanted}\n", f"run: {update}"


def test_backends_figures_are_the_committed_results():
    document = (ROOT / "docs/peft.md").read_text()
    begin, end = table.shown(document)
    wanted = backends_table.of_file(backends_table.RESULTS)
    assert document[begin:end] == f"\n{wanted}\n", "run: python -m benchmarks.backends_table --update docs/peft.md"


def test_environment_variables_are_documented():
    read = set()
    for folder in ("peftkern", "csrc", "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu"):
                text = file.read_text()
                read |= set(re.findall(r"""(?:environ(?:\.get)?|getenv)[\[(]\s*"(PEFTKERN_\w+)\"""", text))
    assert {"PEFTKERN_ISA", "PEFTKERN_BACKEND", "PEFTKERN_TEST_SEED"} <= read
    section = README.partition("## Environment variables")[2].partition("\n## ")[0]
    assert {name for name in read if f"| `{name}` |" not in section} == set()
    assert set(re.findall(r"^\| `(PEFTKERN_\w+)` \|", section, re.M)) == read


def test_version_is_the_same_everywhere():
    assert f'version = "{peftkern.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{peftkern.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
