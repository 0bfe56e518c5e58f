"""The `margingate` command: one parser, one subcommand per module."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from margingate import __version__
from margingate.cli.exit_status import CUT_OFF, FAILED, INTERRUPTED
from margingate.errors import CliError

# Each module has `add_parser(subparsers)`, which sets `func=run`, and imports nothing heavy when
# it is itself imported: `margingate --help` imports them all.
COMMANDS = ("model", "hooks", "reference", "probe", "calibrate", "study", "check", "watch", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit status.

    0 is done, and 1 that an answer changed (`check`, `demo`). A CliError is one line on stderr and
    2, as a stdout that cannot be written is; Ctrl-C is 130, and a stdout that nobody reads any more
    141.
    """
    try:
        args = build_parser().parse_args(argv)
        status = int(args.func(args))
        _flush()
        return status
    except CliError as err:
        return _failed(str(err))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as err:  # argparse's, or 1 of rich, whose stdout nobody reads any more
        if err.code != 1:
            raise
        return CUT_OFF
    except OSError as err:
        if err.filename is not None or (failed := _of_stdout()) is None:
            raise
        return failed


def _flush() -> None:
    if sys.stdout is not None:  # closed, by >&-
        sys.stdout.flush()


def _of_stdout() -> int | None:
    """The status, where stdout is what failed: then it fails once more."""
    try:
        print(flush=True)
    except OSError as err:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        if isinstance(err, BrokenPipeError):
            return CUT_OFF
        return _failed(f"stdout cannot be written ({err.strerror}): make room, or send it on.")
    return None


def _failed(sentence: str) -> int:
    print(f"margingate: {sentence}", file=sys.stderr)
    return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="margingate",
        description="Answers that do not depend on the batch, for SGLang: see it, check it, "
        "measure what it takes. The gate itself is SGLang's option --deterministic-gate.",
        epilog="Exit status: 0 done; 1 an answer changed (check and demo); 2 it could not be found "
        "out, and stderr says why; 130 Ctrl-C.",
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
