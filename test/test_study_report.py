"""The report of a study: one page, the same twice, with whole tables."""

from __future__ import annotations

import hashlib
import re

import study_world

from margingate.cli.main import main
from margingate.study.column_tables import more_tables
from margingate.study.tables import make_tables

# Fixtures: pytest finds them by their names here.
place = study_world.place
record = study_world.record


def test_the_report_is_one_page_and_the_same_twice(place, record, capsys):
    pages = []
    for name in ("r1", "r2"):
        folder = place.path / name
        source = ("--from", str(place.path / "out.json"))
        assert main(["study", *source, "--report", str(folder)]) == 0
        pages.append({f.name: hashlib.sha256(f.read_bytes()).digest() for f in folder.iterdir()})
    assert pages[0] == pages[1]
    pictures = {"margins.png", "rates.png", "recall.png", "columns.png", "operators.png"}
    assert set(pages[0]) == pictures | {"index.html"}
    page = (place.path / "r1/index.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    titles = [table.title for table in make_tables(record) + more_tables(record)]
    assert len(titles) == 11 and all(f"<h2>{title}" in page for title in titles)


def test_every_table_has_a_cell_per_column(record):
    for table in make_tables(record) + more_tables(record):
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title


def test_a_report_that_cannot_be_written_is_one_sentence(place, record, capsys):
    (place.path / "file").write_text("")
    source = ("--from", str(place.path / "out.json"))
    assert main(["study", *source, "--report", str(place.path / "file")]) == 2
    assert "file cannot be made" in capsys.readouterr().err
