"""The options of commands that make a walk: `margingate calibrate` and `margingate study`."""

from __future__ import annotations

import argparse
from pathlib import Path

from margingate.errors import CliError
from margingate.harness.defaults import MODEL, PROMPTS
from margingate.study.session import WalkOptions


def add_walk_options(parser: argparse.ArgumentParser) -> None:
    """What a walk needs to know, for every command that makes one."""
    parser.add_argument("--model-path", metavar="M", help=f"default: the embedded {MODEL}")
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=Path,
        default=[PROMPTS],
        metavar="FILE",
        help='JSONL with a "prompt" a line; default: the demo\'s 24',
    )
    parser.add_argument("--per-file", type=int, metavar="N", help="prompts of each; default all")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="per answer; default 128"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[2, 8, 16], metavar="B", help="default 2 8 16"
    )
    parser.add_argument(
        "server_args", nargs="*", metavar="-- ARGS", help="for the server, after --"
    )


def walk_options(args: argparse.Namespace) -> WalkOptions:
    """The options as a record; raises CliError for what cannot work, before anything starts."""
    for name in ("tokens", "per_file"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CliError(f"--{name.replace('_', '-')} is {value}: give 1 or more.")
    if bad := [size for size in args.batch_sizes if not 2 <= size <= 1024]:
        raise CliError(f"--batch-sizes has {bad[0]}: a batch has 2 to 1024 requests.")
    return WalkOptions(
        model_path=args.model_path,
        prompts=args.prompts,
        per_file=args.per_file,
        tokens=args.tokens,
        batch_sizes=args.batch_sizes,
        out=args.out,
        server_args=args.server_args,
    )
