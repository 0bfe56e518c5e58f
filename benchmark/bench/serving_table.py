"""The table of `benchmark.speed.serving`; run by itself, that of a file it wrote.

python -m benchmark.bench.serving_table serving.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMPARED = {
    "output_throughput": "tok/s",
    "median_ttft_ms": "TTFT p50",
    "p99_ttft_ms": "TTFT p99",
    "median_tpot_ms": "TPOT p50",
    "p99_tpot_ms": "TPOT p99",
}
GATE = {
    "quiet_share": "quiet",  # share of decode steps that asked for no verification
    "passes_per_s": "passes/s",
    "rows_per_pass": "rows/pass",
    "settle_wait_ms": "wait ms",
}


def ratio(found: dict[str, Any], base: dict[str, Any] | None) -> dict[str, float | None]:
    """Each compared figure over that of `base`; None where there is none."""
    return {name: found[name] / base[name] if base and base[name] else None for name in COMPARED}


def short(found: dict[str, Any]) -> str:
    """One run while others go on."""
    where = f"{found['mix']}@{found['rate']} {found['mode']}"
    return f"{where}: {found['output_throughput']:.0f} tok/s in {found['duration']:.1f} s"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Load by load: each figure, and behind it its ratio to the first mode's."""
    head = ["load", "mode", *COMPARED.values(), *GATE.values()]
    loads = dict.fromkeys((found["mix"], found["rate"]) for found in results)
    rows = [
        cells(found) for load in loads for found in results if (found["mix"], found["rate"]) == load
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    )


def cells(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    figures = [_figure(found[name], found["ratios"][name]) for name in COMPARED]
    gate = found.get("gate", {})
    counts = ["-" if gate.get(name) is None else f"{gate[name]:.3g}" for name in GATE]
    load = f"{found['mix']}@{found['rate']} x{found['completed']:.0f}"
    return [load, found["mode"], *figures, *counts]


def _figure(value: float, ratio: float | None) -> str:
    return f"{value:.4g} ({'-' if ratio is None else format(ratio, '.3f')})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of a file that serving.py wrote.")
    parser.add_argument("file", type=Path, help="serving.py's --out")
    path = parser.parse_args().file
    try:
        print(table(json.loads(path.read_text())["results"]))
    except OSError as error:
        sys.exit(f"{path} cannot be read ({error.strerror}): name a file that serving.py wrote.")
    except (ValueError, KeyError, TypeError, AttributeError):
        sys.exit(f"{path} holds no results of serving.py: name a file that it wrote with --out.")


if __name__ == "__main__":
    main()
