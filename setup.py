"""Builds the native modules by calling cmake; CMakeLists.txt is the only build description."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def refers_to_missing_tools(cache: Path) -> bool:
    """True if a CMake cache was written inside an isolated build environment that no longer exists."""
    if not cache.exists():
        return False
    entries = r"^(?:CMAKE_MAKE_PROGRAM|CMAKE_COMMAND|pybind11_DIR|CMAKE_CXX_COMPILER):\w+=(/.*)$"
    return any(not os.path.exists(path) for path in re.findall(entries, cache.read_text(), re.M))


class CMakeBuild(build_ext):
    def run(self) -> None:
        package = Path(self.get_ext_fullpath("peftkern._C")).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        fresh = ["--fresh"] if refers_to_missing_tools(build / "CMakeCache.txt") else []
        arguments = [f"-DPython_EXECUTABLE={sys.executable}", *os.environ.get("CMAKE_ARGS", "").split()]
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *fresh, *arguments])
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs])
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(package)])


setup(ext_modules=[Extension("peftkern._C", [])], cmdclass={"build_ext": CMakeBuild})
