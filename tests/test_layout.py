"""The tree keeps its promises: sizes, one stem per op, no torch in ISA files, docstrings, a quiet import."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slow_tests

import peftkern
from peftkern.methods import Method
from peftkern.nn._adapted_linear import AdaptedLinear
from peftkern.nn._adapters import AdapterModule

ROOT = Path(__file__).parents[1]
MOST_LINES = 400
SOURCES = (".py", ".pyi", ".cpp", ".h", ".cu")


def tracked() -> list[str]:
    """The files of the repository, and those that git would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


FILES = tracked()
SCHEMAS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
# Parts of another op, and what tests count tiles with.
STEM_OF = {
    "nf4_quantize_absmax": "nf4_quantize",
    "dora_linear_norm": "dora_linear",
    "dora_linear_square_norm": "dora_linear",
}
NOT_AN_OP = {"cpu_tiles_run"}


def stem(schema: str) -> str:
    name = schema.removesuffix("_backward")
    return STEM_OF.get(name, name)


def test_no_long_file():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in FILES if name.endswith(SOURCES)}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_schemas_are_found():
    assert {"nf4_quantize", "nf4_linear_backward", "lora_linear"} <= set(SCHEMAS)


@pytest.mark.parametrize("op", sorted({stem(schema) for schema in SCHEMAS} - NOT_AN_OP))
def test_an_op_has_one_stem(op):
    for name in (f"peftkern/ops/{op}.py", f"csrc/cpu/{op}.cpp", f"tests/test_{op}.py"):
        assert name in FILES
    tree = ast.parse((ROOT / f"peftkern/ops/{op}.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {op, f"{op}_reference"} <= functions
    assert op in (ROOT / "peftkern/bench/cases.py").read_text()


def test_an_op_file_has_its_schema():
    stems = {stem(schema) for schema in SCHEMAS}
    files = (Path(name).stem for name in FILES if re.fullmatch(r"peftkern/ops/[a-z]\w*\.py", name))
    ops = {file.removesuffix("_triton") for file in files}
    assert ops <= stems


def included(name: str, seen: set[str]) -> set[str]:
    """What a C++ file includes, itself and through the project's own headers."""
    found = set()
    for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', (ROOT / name).read_text(), re.M):
        found.add(header)
        own = f"csrc/{header}"
        if own in FILES and own not in seen:
            seen.add(own)
            found |= included(own, seen)
    return found


ISA_FILES = [name for name in FILES if re.fullmatch(r"csrc/cpu/(kernels|quantize)_[a-z0-9]+\.cpp", name)]


@pytest.mark.parametrize("name", ISA_FILES)
def test_instruction_set_files_are_plain(name):
    """Else an inline function compiled for AVX-512 may be the one that the linker keeps for every CPU."""
    headers = included(name, set())
    assert headers - {"immintrin.h", "stddef.h", "stdint.h", "string.h", "math.h"} == {
        header for header in headers if f"csrc/{header}" in FILES
    }


def test_every_level_has_its_files():
    levels = {Path(name).stem.partition("_")[2] for name in ISA_FILES if "/kernels_" in name}
    assert levels == {"scalar", "avx2", "avx512", "avx512bf16"}


def test_slow_tests_exist():
    """A renamed one would slip back into `make test`; an op whose every test is slow would slip out of it."""
    assert [name for name in slow_tests.FILES if f"tests/{name}" not in FILES] == []
    for name, tests in slow_tests.TESTS.items():
        functions = set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / name).read_text(), re.M))
        assert set(tests) < functions, name
    quick = {name for name in FILES if re.fullmatch(r"tests/test_\w+\.py", name)} - {
        f"tests/{name}" for name in slow_tests.FILES
    }
    assert {f"tests/test_{stem(schema)}.py" for schema in SCHEMAS if stem(schema) not in NOT_AN_OP} <= quick


def test_no_path_of_a_machine():
    path = re.compile(rb"(?<![\w.$}/-])/(?:home|root|tmp|work|mnt|Users)/[\w.-]+")
    contents = {name: (ROOT / name).read_bytes() for name in FILES}
    found = {name: path.findall(content) for name, content in contents.items() if b"\0" not in content}
    assert {name: paths for name, paths in found.items() if paths} == {}


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The public functions, classes and methods of a module, by their dotted names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body, f"{prefix}{node.name}.")


OVERRIDDEN = {"forward", "extra_repr"} | {
    name for base in (Method, AdapterModule, AdaptedLinear) for name, value in vars(base).items() if value.__doc__
}


def speaks_for_itself(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """An override of what torch or a base class here explains, or one statement."""
    return isinstance(node, ast.FunctionDef) and (node.name in OVERRIDDEN or len(node.body) == 1)


LIBRARY = [name for name in FILES if re.fullmatch(r"peftkern/(?!cli/|__main__).*\.py", name)]


@pytest.mark.parametrize("name", LIBRARY)
def test_public_names_have_docstrings(name):
    tree = ast.parse((ROOT / name).read_text())
    assert ast.get_docstring(tree)
    functions = dict(public_functions(tree.body))
    assert [at for at, node in functions.items() if not ast.get_docstring(node) and not speaks_for_itself(node)] == []


def exported() -> list[tuple[str, Any]]:
    """The names of `peftkern` and `peftkern.nn`, and what they stand for."""
    names = [(name, getattr(peftkern, name)) for name in peftkern.__all__ if name != "nn"]
    return names + [(f"nn.{name}", getattr(peftkern.nn, name)) for name in peftkern.nn.__all__]


def documented(docstring: str, section: str) -> set[str]:
    """The names that a section of a docstring explains, `a, b: ...` or `a: ..., b: ...`."""
    body = re.search(rf"^ *{section}:\n((?:(?: +.*)?\n?)+?)(?:\n *\w+:\n|\Z)", docstring, re.M)
    return set(re.findall(r"(?:^ *|, )(\w+)(?=[:,])", body.group(1), re.M)) if body else set()


@pytest.mark.parametrize(("name", "value"), exported(), ids=[name for name, _ in exported()])
def test_exported_names_explain_their_arguments(name, value):
    docstring = inspect.getdoc(value)
    assert docstring and docstring.splitlines()[0].endswith((".", ":", ")"))
    section = "Attributes" if value.__name__ == "NF4Weight" else "Args"
    parameters = set(inspect.signature(value).parameters)
    obvious = {"model", "args", "kwargs"}
    explained = documented(docstring + "\n", section)
    assert parameters - obvious <= explained | ({"training"} if "if `training`" in docstring else set())


def test_import_is_quiet_and_light():
    heavy = ("transformers", "peft", "bitsandbytes", "matplotlib", "rich", "safetensors", "accelerate", "triton")
    program = f"import sys, peftkern; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[]\n", "")
