"""The command line of the canary."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from margingate.canary import report, unit_tests, wheel
from margingate.errors import CliError


def parser() -> argparse.ArgumentParser:
    """Of `python -m margingate.canary`."""
    made = argparse.ArgumentParser(
        prog="python -m margingate.canary",
        description="Say what would have to change to serve an SGLang release, which is fetched "
        "and not installed. Exit status: 0 nothing, 1 something, 2 it could not be found out.",
    )
    made.add_argument("release", help="a version, as 0.5.24, or the path of a wheel")
    made.add_argument(
        "--no-tests",
        dest="tests",
        action="store_false",
        help="compare only; the tests that start no server take most of the time",
    )
    return made


def run(release: str, *, tests: bool) -> int:
    """Print the tables of one release on stdout; the exit status."""
    begun = time.monotonic()
    base = report.installed()
    checkout = Path.cwd()
    if tests and not unit_tests.files(checkout):
        raise CliError(f"{checkout} has no tests: run it in a checkout, or give --no-tests.")
    with tempfile.TemporaryDirectory(prefix="margingate-canary.") as work:
        other = wheel.unpacked(release, Path(work))
        print(f"SGLang {other.version}, compared with {base.version}", file=sys.stderr)
        found, to_read = [*report.changes(other, base)], [*report.bodies(other, base)]
        if tests:
            found += report.failed_tests(other, checkout)
    print(report.written(found, to_read))
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)
    return 1 if found or to_read else 0


def main() -> int:
    """The command; its exit status."""
    given = parser().parse_args()
    try:
        return run(given.release, tests=given.tests)
    except CliError as error:
        print(f"margingate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
