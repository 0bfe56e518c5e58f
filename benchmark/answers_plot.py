"""The picture of README.md: how many answers change with the batch, by server and arrangement.

    python -m benchmark.answers_plot [--out docs/demo.png]

Drawn from the recorded runs of `benchmark/sameness/servers.py` that SOURCES names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

ARRANGEMENTS = {"batched": "in a batch", "shuffled1": "in another order", "cached": "prompt cached"}
# The newest record of each server: its name in the picture, the run's folder, its name there.
SOURCES = (
    ("stock SGLang", "h200-2026-11-28-2", "stock-default"),
    ("SGLang's deterministic mode", "h200-2026-11-28-2", "sglang-deterministic-default"),
    ("margingate", "h200-2026-11-28-2", "gate"),
)
RESULTS = Path(__file__).parent / "results"
TITLE = "Answers that change with the batch: SmolLM2, 64 requests at once, SGLang 0.5.23, H200"
COLOURS = ("#c8321e", "#e0a458", "#2a6f97")
_STYLE: dict[Any, Any] = {"font.size": 11.0, "axes.spines.top": False, "axes.spines.right": False}


class Changed(NamedTuple):
    """How many of the answers are not those that the same server gives to the request alone."""

    changed: int
    answers: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.changed / self.answers


def read_changed(record: Mapping[str, Any], server: str) -> dict[str, Changed]:
    """By arrangement, from a record of that script; an arrangement without a cache hit is left out.

    Raises:
        KeyError: the record lacks the server or an arrangement.
    """
    runs = {name: record["cases"][server][name] for name in ARRANGEMENTS}
    if not runs["cached"]["cached"]:  # tokens from the prefix cache
        del runs["cached"]
    return {name: Changed(run["of"] - run["tokens"], run["of"]) for name, run in runs.items()}


def plot_answers(servers: Mapping[str, Mapping[str, Changed]], path: Path, title: str) -> None:
    """Write a group of bars for each arrangement, one for each server, as a PNG.

    Args:
        servers: by name, what changed by arrangement; one that is missing is said to have no cache.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        width = 0.8 / len(servers)
        places = np.arange(len(ARRANGEMENTS))
        for number, (name, runs) in enumerate(servers.items()):
            left = places - 0.4 + (number + 0.5) * width
            shares = [runs[run].share if run in runs else 0.0 for run in ARRANGEMENTS]
            bars = axes.bar(left, shares, width, color=COLOURS[number], label=name)
            labels = [_label(runs.get(run)) for run in ARRANGEMENTS]
            axes.bar_label(bars, labels, padding=3, color=COLOURS[number], fontsize=10)
        axes.set_xticks(places, list(ARRANGEMENTS.values()))
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("answers changed")
        axes.legend(loc="upper left", ncols=len(servers), frameon=False)
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold", fontsize=12)
        figure.savefig(path)


def _label(found: Changed | None) -> str:
    return "no cache" if found is None else f"{found.changed} of {found.answers}"


def recorded(results: Path = RESULTS) -> dict[str, dict[str, Changed]]:
    """What SOURCES recorded, from a folder of runs."""
    return {
        name: read_changed(json.loads((results / run / "sameness.json").read_text()), server)
        for name, run, server in SOURCES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/demo.png"), metavar="FILE")
    plot_answers(recorded(), parser.parse_args().out, TITLE)


if __name__ == "__main__":
    main()
