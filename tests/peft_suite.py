"""Runs PEFT's own tests on the fused ops, offline: `make peft-suite`.

The tests come from PEFT's source archive at the installed version. What they import but need only for tests that are
not chosen here is a stub; tests that want the Hugging Face hub fail or are skipped as they are without peftkern.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The layer types that have a fast path, and what combines them; dtype_autocast tests take minutes each.
CHOSEN = (
    "(LoraConfig or IA3Config or TestMixedAdapterBatches or TestDynamicDispatch or TestRequiresGrad"
    " or TestMultiRankAdapter or TestLayerRepr) and not dtype_autocast"
)
# Neither layers that no op computes, nor the one test that wants the network: a few minutes less.
LINEAR = f"{CHOSEN} and not Conv1d and not Conv2d and not Conv3d and not MHA and not override_lora_linear"
STUBS = {
    "datasets": "class Dataset: ...\n\n\ndef load_dataset(*args, **kwargs):\n    raise RuntimeError('a stub')\n",
    "diffusers": "__version__ = '0'\n\n\nclass StableDiffusionPipeline: ...\n",
}
PACKAGES = ("parameterized", "attrs")


def prepare(folder: Path) -> Path:
    """Downloads and unpacks what is missing; returns PEFT's source folder.

    Raises:
        SystemExit: the download failed.
    """
    release = f"peft-{version('peft')}"
    source = folder / release
    if not source.is_dir():
        pip = [sys.executable, "-m", "pip", "--quiet"]
        archive = ["download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", str(folder)]
        packages = ["install", "--no-deps", "--target", str(folder / "packages"), *PACKAGES]
        for arguments in ([*archive, release.replace("-", "==")], packages):
            if subprocess.run([*pip, *arguments]).returncode:
                wanted = f"PEFT's source archive and {', '.join(PACKAGES)}"
                raise SystemExit(f"peft_suite: could not download {wanted}; it needs a package index, or {source}")
        with tarfile.open(folder / f"{release}.tar.gz") as tar:
            tar.extractall(folder, filter="data")
    (source / "tests/__init__.py").touch()
    for name, text in STUBS.items():
        stub = folder / "packages" / name / "__init__.py"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(text)
    return source


def main() -> int:
    """Returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/peft-suite")
    parser.add_argument("--stock", action="store_true", help="without the plugin, to compare")
    parser.add_argument("--linear", action="store_true", help="only the tests of layers that the ops know")
    parser.add_argument("tests", nargs="*", default=["tests/test_custom_models.py"])
    parser.add_argument("-k", dest="chosen", default=None)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = prepare(folder)
    chosen = options.chosen or (LINEAR if options.linear else CHOSEN)
    plugin = [] if options.stock else ["-p", "peftkern.integrations.peft_pytest"]
    paths = os.pathsep.join([str(ROOT), str(folder / "packages")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-W", "ignore", *plugin, "-k", chosen]
    return subprocess.run([*command, *options.tests], cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
