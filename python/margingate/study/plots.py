"""Pictures of measurements: pure functions from records to PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

DENSE = 256  # rows of a forward up to which every measured count is shown
CLASSES = (
    *("#9db4cc", "#c8321e", "#e0a458", "#5b8e7d", "#7a5c8e", "#4d4d4d", "#f2cc8f", "#81b29a"),
    *("#3d405b", "#d4a5a5", "#2a6f97", "#bc6c25", "#606c38", "#9d4edd", "#ff8fa3", "#014f86"),
    *("#b5838d", "#6d6875", "#90be6d", "#577590"),
)
LINES = (("#2a6f97", "-"), ("#c8321e", "--"), ("#e0a458", "-"), ("#5b8e7d", "-."), ("#7a5c8e", ":"))
STEPS, FLIPS, LINE = "#9db4cc", "#c8321e", "#222222"
_STYLE: dict[Any, Any] = {"font.size": 11.0, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Margins:
    """Histogram of margins, as a gated server reports it in `/server_info`.

    Raises:
        ValueError: at construction, when the lists do not fit together.
    """

    edges: tuple[float, ...]  # logits, ascending; a bin holds its lower edge, the last all above
    steps: tuple[int, ...]  # decode steps per bin
    flips: tuple[int, ...]  # steps whose emitted token was replaced, by the margin it had

    def __post_init__(self) -> None:
        bins = len(self.edges) - 1
        if bins < 1 or (len(self.steps), len(self.flips)) != (bins, bins):
            raise ValueError(
                f"{len(self.edges)} edges do not bound {len(self.steps)} and {len(self.flips)} "
                "bins: give one edge more than bins."
            )
        if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"the edges {self.edges} do not ascend: sort them.")

    @classmethod
    def from_record(cls, record: Mapping[str, Sequence[Any]]) -> Self:
        """From {"edges": [...], "steps": [...], "flips": [...]}."""
        return cls(tuple(record["edges"]), tuple(record["steps"]), tuple(record["flips"]))

    def since(self, earlier: Margins) -> Margins:
        """What was counted after `earlier`, which has the same edges."""
        if earlier.edges != self.edges:
            raise ValueError("two histograms with different edges cannot be subtracted.")
        steps = (now - then for now, then in zip(self.steps, earlier.steps, strict=True))
        flips = (now - then for now, then in zip(self.flips, earlier.flips, strict=True))
        return Margins(self.edges, tuple(steps), tuple(flips))


def plot_margins(
    margins: Margins,
    threshold: float,
    path: Path,
    title: str,
    *,
    flips_are: str = "flips, repaired",
) -> None:
    """Write the histogram of all margins, with the flips and the threshold, as a PNG.

    Heights are counts divided by the bin's width in units of the first bin's, so that wide and
    narrow bins compare; the margin axis is linear up to the last bin of that width, then
    logarithmic.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        edges = np.array(margins.edges)
        widths = np.diff(edges) / (edges[1] - edges[0])
        steps, flips = np.array(margins.steps) / widths, np.array(margins.flips) / widths
        low = _floor(steps, flips)
        _bars(axes, steps, edges, low, color=STEPS, label=f"decode steps ({sum(margins.steps):,})")
        _bars(axes, flips, edges, low, color=FLIPS, label=f"{flips_are} ({sum(margins.flips):,})")
        _line(axes, threshold, margins)
        _scales(axes, edges, low, steps.max(initial=1))
        used = np.flatnonzero(steps)
        last = edges[used[-1] + 1] if len(used) else edges[-1]
        axes.set_xlim(edges[0], max(last, min(2 * threshold, edges[-1])))
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold")
        axes.set_xlabel("margin: top-1 minus top-2 logit [logits]")
        axes.set_ylabel(f"decode steps per {edges[1] - edges[0]:g} logits")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=10)
        figure.savefig(path)


def plot_classes(classes: Mapping[str, Mapping[int, int]], path: Path, title: str) -> None:
    """Write a grid of operators by row counts as a PNG; one colour a class of equal bits.

    Args:
        classes: by operator, the class of each measured row count. A count that an operator was
            not measured at stays white. Of many counts those are left out that say nothing new.
    """
    counts = telling_counts(classes)
    grid = np.full((len(classes), len(counts)), np.nan)
    for i, measured in enumerate(classes.values()):
        for j, count in enumerate(counts):
            if count in measured:
                grid[i, j] = measured[count] % len(CLASSES)
    with matplotlib.rc_context(_STYLE):
        size = (max(7.0, 2.8 + 0.26 * len(counts)), 1.6 + 0.42 * len(classes))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        colours = ListedColormap(CLASSES)
        axes.pcolormesh(grid, cmap=colours, vmin=0, vmax=len(CLASSES), edgecolor="w", linewidth=1)
        axes.set_xticks(np.arange(len(counts)) + 0.5, [str(n) for n in counts], fontsize=8)
        axes.set_yticks(np.arange(len(classes)) + 0.5, list(classes))
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_xlabel("rows in one forward; one colour: a row has the same bits")
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold")
        figure.savefig(path)


def telling_counts(classes: Mapping[str, Mapping[int, int]]) -> list[int]:
    """The row counts that a picture has room for, ascending.

    All of them up to DENSE; of larger ones, which prefill forwards have, those at which an operator
    changes its class, the ones before, and the last.
    """
    counts = sorted({count for measured in classes.values() for count in measured})
    columns = {n: [measured.get(n) for measured in classes.values()] for n in counts}
    pairs = [pair for pair in pairwise(counts) if columns[pair[0]] != columns[pair[1]]]
    shown = {count for pair in pairs for count in pair} | {counts[-1]}
    return [count for count in counts if count <= DENSE or count in shown]


def plot_recall(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, title: str
) -> None:
    """Write, per signal, the share of the flips caught by the share of the steps flagged.

    Args:
        curves: by signal, shares flagged and shares caught, both ascending from 0 to 1.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title)
        for (colour, dashes), (name, (flagged, caught)) in zip(LINES, curves.items(), strict=False):
            look: dict[str, Any] = {
                "color": colour,
                "linestyle": dashes,
                "linewidth": 2,
                "label": name,
            }
            axes.step(flagged, caught, where="post", **look)
        axes.set_xlabel("steps flagged [share]")
        axes.set_ylabel("flips caught [share]")
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
        ticks = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.legend(loc="lower right", frameon=False, fontsize=10)
        figure.savefig(path)


def plot_rates(rates: Mapping[str, tuple[float, float, float]], path: Path, title: str) -> None:
    """Write rates with their intervals, a bar each.

    Args:
        rates: by name, the rate and the interval's ends, shares.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title)
        middle = np.array([rate for rate, _, _ in rates.values()])
        low = middle - np.array([low for _, low, _ in rates.values()])
        high = np.array([high for _, _, high in rates.values()]) - middle
        looks: dict[str, Any] = {"color": STEPS, "ecolor": LINE, "capsize": 5, "width": 0.5}
        axes.bar(list(rates), middle, yerr=[low, high], **looks)
        axes.set_ylabel("flips per decode step")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.savefig(path)


def plot_offsets(
    layers: Mapping[str, Mapping[int, Sequence[float]]], path: Path, title: str
) -> None:
    """Write medians and 10 to 90 % bands by offset from a flip, a line per layer.

    Args:
        layers: by name, values by offset, relative L2 distances.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title)
        for (colour, _), (name, values) in zip(LINES, layers.items(), strict=False):
            offsets = sorted(values)
            bands = [np.quantile(values[offset], (0.1, 0.5, 0.9)) for offset in offsets]
            low, middle, high = np.array(bands).T
            axes.plot(offsets, middle, color=colour, linewidth=2, label=name)
            axes.fill_between(offsets, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axvline(0, color=LINE, linestyle="--", linewidth=1)
        axes.set_xlabel("columns after the flip's own; the band holds 80 % of them")
        axes.set_ylabel("relative L2 distance from the run alone")
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # a line at 0 shows
        axes.legend(frameon=False, fontsize=10)
        figure.savefig(path)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold")
    return figure, figure.subplots()


def _floor(*heights: np.ndarray) -> float:
    """A power of ten below every bar, at most 0.1, so that a single step shows."""
    least = min((float(h[h > 0].min()) for h in heights if (h > 0).any()), default=1.0)
    return min(0.1, float(10.0 ** math.floor(math.log10(least / 1.5))))


def _bars(
    axes: Axes, heights: np.ndarray, edges: np.ndarray, low: float, *, color: str, label: str
) -> None:
    """Filled steps that stand on `low`, since a logarithmic axis has no zero."""
    tops = np.maximum(heights, low)
    axes.stairs(tops, edges, baseline=low, fill=True, color=color, label=label)


def _line(axes: Axes, threshold: float, margins: Margins) -> None:
    """The threshold, and the share of the decode steps in the bins that lie below it."""
    whole = sum(margins.steps)
    uppers = margins.edges[1:]
    below = sum(n for n, edge in zip(margins.steps, uppers, strict=True) if edge <= threshold)
    label = f"threshold {threshold:g}"
    if whole and threshold in margins.edges:  # else a bin lies on both sides
        label += f": {below / whole:.1%} of the steps are below"
    axes.axvline(threshold, color=LINE, linestyle="--", linewidth=1.5, label=label)


def _scales(axes: Axes, edges: np.ndarray, low: float, top: float) -> None:
    """Both axes' scales, limits and ticks."""
    axes.set_yscale("log")
    axes.set_ylim(low, top * 2)
    widths = np.diff(edges)
    wider = np.flatnonzero(widths > widths[0] * 1.001)
    if not len(wider):
        return
    linear = edges[wider[0]]
    axes.set_xscale("symlog", linthresh=linear, linscale=2.0, base=2)
    doubled = [linear * 2**k for k in range(1, 20) if linear * 2**k <= edges[-1]]
    ticks = [*np.linspace(edges[0], linear, 5), *doubled]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
