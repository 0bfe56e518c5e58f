"""A study as one HTML page: tables, plots inside it, and what they were measured on."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from margingate.confidence import clopper_pearson
from margingate.errors import CliError
from margingate.study.column_tables import LAYERS, near_flips
from margingate.study.row_counts import grid
from margingate.study.session import write
from margingate.study.steps import Signal, Steps, signals, steps_of
from margingate.study.tables import CONFIDENCE, Table, first_threshold

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }}
table {{ border-collapse: collapse; margin: .5rem 0 2rem }}
th, td {{ text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd;
  font-variant-numeric: tabular-nums }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }} code {{ overflow-wrap: anywhere }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def write_report(record: Mapping[str, Any], tables: Sequence[Table], folder: Path) -> Path:
    """Write index.html and the PNG files; the page's path.

    Raises CliError where matplotlib is not installed or the folder cannot be written.
    """
    try:
        import margingate.study.plots  # noqa: F401
    except ImportError as err:
        raise CliError(
            f"--report draws with matplotlib, which cannot be imported ({err}): install it, or "
            "make the report elsewhere with --from; what was measured is kept."
        ) from err
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _plots(record, folder)
    except OSError as err:
        raise CliError(
            f"--report {folder} cannot be written ({err.strerror}): make room, or name another "
            "folder."
        ) from err
    title = f"Flips under batching: {record['name']}"
    body = "\n".join([_about(record), *map(_picture, pictures), *map(_table, tables)])
    write(folder / "index.html", PAGE.format(title=html.escape(title), body=body))
    return folder / "index.html"


def _about(record: Mapping[str, Any]) -> str:
    """What was measured, on what, and how."""
    machine = "; ".join(f"{key} {value}" for key, value in record["machine"].items())
    sets = ", ".join(f"{name} ({len(names)})" for name, names in record["sets"].items())
    extra = " ".join(record["server_args"]) or "none"
    sentences = (
        f"Every prompt is answered alone ({record['tokens']} tokens at most), then in batches of "
        f"{', '.join(map(str, record['batch_sizes']))}, forced along its answer alone, on SGLang's "
        "own kernels. A step flips where the batched run would choose another token. Thresholds "
        "found here are for --gate-fast-path stock.",
        f"Prompts: {sets}. Server arguments: {extra}.",
        f"Machine: {machine}. Hash of config.json: {record['model']['config_sha256'][:16]}.",
    )
    return "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.columns)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<p>{html.escape(table.about)}</p>\n"
        f"<table><tr>{head}</tr>\n{body}</table>"
    )


def _plots(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every picture that there are figures for, as PNG files."""
    steps, made = steps_of(record), []
    _plot_margins(steps, first_threshold(record), folder / "margins.png")
    _plot_rates(steps, list(record["sets"]), folder / "rates.png")
    made += [folder / "margins.png", folder / "rates.png"]
    if steps.flips.any():
        _plot_recall(steps, folder / "recall.png")
        made.append(folder / "recall.png")
    if near := near_flips(record["columns"] or []):
        _plot_columns(near, folder / "columns.png")
        made.append(folder / "columns.png")
    if record["probe"] and record["probe"].get("operators"):
        _plot_operators(record["probe"], folder / "operators.png")
        made.append(folder / "operators.png")
    return made


def _plot_margins(steps: Steps, threshold: float, path: Path) -> None:
    from margingate.core.histogram import MarginHistogram
    from margingate.study.plots import Margins, plot_margins

    histogram = MarginHistogram()
    histogram.add_steps(steps.margins.tolist())
    for margin in steps.margins[steps.flips].tolist():
        histogram.add_flip(margin)
    margins = Margins.from_record(histogram.record())
    title = "Margins of batched decode steps, and of the flips"
    plot_margins(margins, threshold, path, title, flips_are="flips")


def _plot_rates(steps: Steps, sets: Sequence[str], path: Path) -> None:
    from margingate.study.plots import plot_rates

    rates = {}
    for name in sets:
        here = steps.flips[steps.sets == name]
        low, high = clopper_pearson(int(here.sum()), len(here), CONFIDENCE)
        rates[name] = (float(here.mean()) if len(here) else 0.0, low, high)
    plot_rates(rates, path, "Flips per decode step, with 95 % intervals")


def _plot_recall(steps: Steps, path: Path) -> None:
    from margingate.study.plots import plot_recall

    curves = {signal.name: recall_curve(signal) for signal in signals(steps) if signal.flips.any()}
    plot_recall(curves, path, "Flips caught by steps flagged")


def recall_curve(signal: Signal) -> tuple[list[float], list[float]]:
    """Shares flagged and caught, by every bar at a flip's own number."""
    known = ~np.isnan(signal.values)
    bars = np.unique(signal.values[signal.flips & known])
    flagged = [float(signal.flagged(bar).mean()) for bar in bars]
    caught = [float(signal.flagged(bar)[signal.flips].mean()) for bar in bars]
    return [0.0, *flagged, 1.0], [0.0, *caught, 1.0]


def _plot_columns(near: Mapping[int, list[list[tuple[float, float]]]], path: Path) -> None:
    from margingate.study.plots import plot_offsets

    count = len(next(iter(near.values())))
    layers = {
        LAYERS[i]: {offset: [one[1] for one in parts[i]] for offset, parts in near.items()}
        for i in range(count)
    }
    plot_offsets(layers, path, "K/V columns around flips, batched against alone")


def _plot_operators(probe: Mapping[str, Any], path: Path) -> None:
    from margingate.study.plots import plot_classes

    plot_classes(grid(probe["operators"]), path, "Row counts that give a row the same bits")
