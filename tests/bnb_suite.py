"""Runs bitsandbytes' own 4-bit tests on the CPU, stock and with our backend: `make bnb-suite BNB_SRC=DIR`.

DIR is a source tree of bitsandbytes at the installed version, of which only the tests are used: they run from a copy,
so that the installed library is the one imported. Fails if a test passes with stock and not with the backend.
"""

import argparse
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = ("functional", "linear4bit", "ops", "autograd", "parametrize")
# What goes through the 4-bit ops, but not what only prints times, nor what takes minutes where stock quantises.
CHOSEN = "(4bit or parametrize) and not bench and not large and not (gemv and (512 or 1024))"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def pytest_configure(config: Any) -> None:
    """As a plugin: bitsandbytes on the backend, as its entry point has it."""
    import bitsandbytes  # noqa: F401 -- before the backend, which replaces what it has registered

    from peftkern.integrations import bnb_backend

    bnb_backend.register()
    if not bnb_backend._registered:
        raise RuntimeError("bnb_suite: the backend has not taken this bitsandbytes")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """As a plugin: shows that our kernels ran."""
    from peftkern._native import caps, ops

    level = caps.isa()
    terminalreporter.write_line(f"peftkern: {ops.cpu_tiles_run(level):,} tiles computed at level {level}")


def outcomes(report: Path) -> dict[str, str]:
    """Test -> what became of it."""
    kinds = {"failure": FAILED, "error": FAILED, "skipped": SKIPPED}
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = next((kinds[child.tag] for child in case if child.tag in kinds), PASSED)
        found[f"{case.get('classname')}::{case.get('name')}"] = kind
    return found


def run(folder: Path, name: str, options: argparse.Namespace) -> dict[str, str]:
    """Runs the tests in a process; bitsandbytes reads PEFTKERN_BNB as it is imported."""
    ours = name == "peftkern"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "PEFTKERN_BNB": str(int(ours)), "BNB_TEST_DEVICE": "cpu"}
    report = folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line", "-o"]
    command += ["addopts=", f"--junitxml={report}", *(["-p", "bnb_suite"] if ours else []), "-k", options.chosen]
    files = [f"tests/test_{file}.py" for file in FILES]
    status = subprocess.run([*command, *files], cwd=folder, env=environment).returncode
    if status not in (0, 1):  # 1: tests failed
        raise SystemExit(f"bnb_suite: pytest could not run the tests (exit code {status})")
    return outcomes(report)


def compare(stock: dict[str, str], ours: dict[str, str]) -> list[str]:
    """Prints both counts and what differs; the tests that only stock passes."""
    for name, found in (("stock", stock), ("peftkern", ours)):
        counts = Counter(found.values())
        print(f"{name:9}" + ", ".join(f"{counts[kind]:,} {kind}" for kind in (PASSED, FAILED, SKIPPED)))
    gained = sorted(test for test, kind in ours.items() if kind == PASSED and stock.get(test) == FAILED)
    lost = sorted(test for test, kind in stock.items() if kind == PASSED and ours.get(test) != PASSED)
    for title, tests in (("only with peftkern pass", gained), ("only without peftkern pass", lost)):
        print("\n".join([f"{len(tests)} {title}", *(f"  {test}" for test in tests)]))
    return lost


def main() -> int:
    """Returns 1 if a test is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a source tree of bitsandbytes")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bnb-suite")
    parser.add_argument("-k", dest="chosen", default=CHOSEN)
    options = parser.parse_args()
    if not (options.source / "tests/test_linear4bit.py").is_file():
        parser.error(
            f"{options.source} must be a source tree of bitsandbytes {version('bitsandbytes')}, with its tests"
        )
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(options.source / "tests", folder / "tests")
    return int(bool(compare(*(run(folder, name, options) for name in ("stock", "peftkern")))))


if __name__ == "__main__":
    sys.exit(main())
