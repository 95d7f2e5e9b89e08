"""The command line: `peftkern finetune | compare | bench | info`, also `python -m peftkern`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import peftkern
from peftkern.cli import bench, compare, finetune, info
from peftkern.cli.errors import Diverged, Interrupted, UsageError


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, without the usage text above it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="peftkern", description="Parameter-efficient fine-tuning with fused kernels.")
    parser.add_argument("--version", action="version", version=f"peftkern {peftkern.__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    finetune.add_parser(subparsers)
    compare.add_parser(subparsers)
    bench.add_parser(subparsers)
    info.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0 done, 1 failed at work, 2 bad input, 130 Ctrl-C.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` if None.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("PEFTKERN_BNB", "0")  # bitsandbytes is a peer here: on its own kernels
    try:
        args = _build_parser().parse_args(arguments)
        return args.run(args)
    except UsageError as error:
        message, code = f"error: {error}", 2
    except (OSError, Diverged) as error:
        message, code = f"error: {error}", 1
    except Interrupted as stop:
        message, code = f"{stop}; to go on: {shlex.join(['peftkern', *arguments])}", 130
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"peftkern: {message}", file=sys.stderr)
    return code
