"""The `margingate` command: one parser, one subcommand per module."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from margingate import __version__
from margingate.cli.errors import CliError

# Each module has `add_parser(subparsers)`, which sets `func=run`, and imports nothing heavy when
# it is itself imported: `margingate --help` imports them all.
COMMANDS = ("model", "hooks", "probe", "calibrate", "study", "check", "watch", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. A CliError is one line on stderr and status 1; Ctrl-C is 130."""
    try:
        args = build_parser().parse_args(argv)
        return int(args.func(args))
    except CliError as err:
        print(f"margingate: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="margingate", description="Batch-independent greedy decoding for SGLang."
    )
    parser.add_argument("--version", action="version", version=versions())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"margingate.cli.{name}").add_parser(subparsers)
    return parser


def versions() -> str:
    """margingate's version and, if it is installed, sglang's; imports neither's code."""
    try:
        return f"margingate {__version__} (sglang {metadata.version('sglang')})"
    except metadata.PackageNotFoundError:
        return f"margingate {__version__}"


if __name__ == "__main__":
    sys.exit(main())
