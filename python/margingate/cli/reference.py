"""`margingate reference`: pages of the documentation that are made from the code."""

import argparse

from margingate.reference import PAGES


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `margingate reference`."""
    parser = subparsers.add_parser(
        "reference",
        help="print the options or the API of a gated server, as Markdown",
        description="Print docs/options.md or docs/api.md, which are made from the code.",
    )
    parser.add_argument("page", choices=sorted(PAGES))
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the page, and nothing else, on stdout."""
    print(PAGES[args.page](), end="")
    return 0
