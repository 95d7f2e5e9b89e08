"""Runs the tests of the integrations with the oldest and the newest supported releases: `make versions`.

Each set of releases gets an environment in build/versions, kept for the next time; the package is the one of this tree.
`python tests/versions.py oldest` runs one set.
"""

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETS = {
    "oldest": {"peft": "0.19.0", "transformers": "5.10.2", "bitsandbytes": "0.50.0", "accelerate": "1.12.0"},
    "newest": {"peft": "0.21.2", "transformers": "5.23.0", "bitsandbytes": "0.50.2", "accelerate": "1.15.0"},
}
# torch is pinned: an unpinned torch is a CUDA build of several GB.
TOOLS = ("torch==2.13.0", "pytest>=8", "hypothesis>=6", "numpy", "pyyaml")
PATTERNS = (
    "test_peft_[!s]*.py",
    "test_bnb_*.py",
    "test_nf4_peft.py",
    "test_nf4_bitsandbytes.py",
    "test_transformers_*.py",
)


def environment(name: str) -> Path:
    """The Python of the environment with a set's releases, made or brought up to them."""
    folder = ROOT / "build/versions" / name
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    releases = [f"{library}=={release}" for library, release in SETS[name].items()]
    # torch first: it is to come from where the caller's pip looks for it, whatever the others ask for.
    for packages in (TOOLS, releases):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def run(name: str) -> bool:
    """Runs the tests with a set; whether none failed."""
    python = environment(name)
    report = ROOT / "build/versions" / f"{name}.xml"
    files = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in (ROOT / "tests").glob(pattern))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    status = subprocess.run(command, cwd=ROOT, env=variables).returncode
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = Counter(
        next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
        for case in ElementTree.parse(report).iter("testcase")
    )
    counts = ", ".join(f"{found[kind]:,} {kind}" for kind in ("passed", "failed", "skipped"))
    print(f"{name}: {' '.join(f'{library} {release}' for library, release in SETS[name].items())}: {counts}")
    return status == 0


def main() -> int:
    """Returns 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; all by default")
    chosen = parser.parse_args().sets or list(SETS)
    if unknown := set(chosen) - set(SETS):
        parser.error(f"sets must be of {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
    return int(not all([run(name) for name in chosen]))


if __name__ == "__main__":
    sys.exit(main())
