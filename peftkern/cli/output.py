"""An output folder: it can be written to, and results appear in it all at once."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def prepare(output: Path) -> None:
    """Raises OSError if no file can be written there."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass


@contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """A folder whose files move to `output` when all are written, and vanish otherwise."""
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=output))
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
