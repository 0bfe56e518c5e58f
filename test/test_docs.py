"""The documents: pages made from the code are current, links lead somewhere, figures are recorded.

test_hooks and test_metrics hold their own pages.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from benchmark import answers_plot
from benchmark.answers_plot import Changed, plot_answers, read_changed, recorded
from margingate import api
from margingate.cli.main import main
from margingate.config import GateConfig
from margingate.core.audit import Audits
from margingate.reference import FOR_TESTS, NO_DEFAULT, NOTES, PAGES
from margingate.runtime.observe import audit
from margingate.runtime.observe.tally import Tally
from margingate.runtime.request.record import (
    COLUMNS,
    FAULT_ROWS,
    FORCED_IDS,
    SWITCH,
    Counts,
    GateRequest,
)
from margingate.runtime.request.sampling_params import Draw
from margingate.runtime.start.refused_settings import REFUSALS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES_OF_TEXT = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmark/**/*.md")}
)
GROUPS = ("Added", "Changed", "Refused now", "Fixed")
LINK = re.compile(r"\]\((?!\w+://)([^)\s]*)\)")


def names(entries: tuple[api.Entry, ...]) -> list[str]:
    return [entry.name for entry in entries]


@pytest.mark.parametrize("page", PAGES)
def test_pages_made_from_the_code_are_what_the_command_prints(page, capsys):
    assert main(["reference", page]) == 0
    printed = capsys.readouterr().out
    document = ROOT / "docs" / f"{page}.md"
    assert printed == document.read_text(), f"run: margingate reference {page} > {document}"


def test_options_has_every_option_and_notes_are_of_options():
    known = {option.name for option in fields(GateConfig)}
    text = PAGES["options"]()
    for name in known:
        assert text.count(f"| `--gate-{name.replace('_', '-')}` |") == 1
    assert {*NOTES, *NO_DEFAULT, *FOR_TESTS} <= known


def test_the_record_of_an_answer_has_the_keys_of_the_api():
    config = GateConfig(simulate_flip_rate=0.1)
    gated = GateRequest("key", True, drift={}, draw=Draw(1, 0.5, 2, 1.0, 0.0)).summary(config)
    assert [name for name in gated if name in names(api.COUNTS)] == names(api.COUNTS)
    ungated = GateRequest("key", False, "because").summary(replace(config, study=True))
    beside = {"fingerprint", "fingerprint_because", "scores", "weight_generations"}
    assert {*gated, *ungated} | beside == {*names(api.RECORD), *names(api.COUNTS)}


def test_the_api_has_every_counter():
    assert names(api.COUNTS) == [counter.name for counter in fields(Counts)]
    assert names(api.TALLY) == [counter.name for counter in fields(Tally)]
    assert set(names(api.AUDIT)) == set(audit.report(Audits(0.5)))


def test_the_api_has_every_parameter_of_the_gate():
    custom = [f'custom_params["{name}"]' for name in (FAULT_ROWS, FORCED_IDS, COLUMNS)]
    of_sglang = ["sampling_seed", "return_routed_experts"]
    assert names(api.PARAMETERS) == [SWITCH, *of_sglang, *custom]


def test_the_refusals_have_a_row_for_each_refused_setting():
    """Of both releases that are served, with the reason and the way out that the start says."""
    page = (ROOT / "docs" / "refusals.md").read_text()
    (table,) = (part for part in page.split("\n\n") if part.startswith("| option | because |"))
    listed = re.findall(r"^\| `(--[\w-]+)` \| (.+) \| (.+) \|$", table, re.M)
    assert listed == [(each.option, each.because, each.instead) for each in REFUSALS]


def said_in(source: str) -> Iterator[str]:
    """The texts of a module; `{}` where a value goes in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(getattr(part, "value", "{}")) for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


VALUE = re.compile(r"\W*[A-Z]+\W*|\S*\d\S*")  # what stands for one in a sentence of a page


def test_the_sentences_that_pages_quote_are_in_the_code():
    """By most of their runs of four words: some are put together of pieces."""
    modules = (ROOT / "python" / "margingate").rglob("*.py")
    texts = [text for module in modules for text in said_in(module.read_text())]
    code = " | ".join(" ".join(text.split()) for text in texts)
    quoted = 0
    for page in ("limits", "refusals"):
        whole = re.sub(r"(?<=\S)\n> ", " ", (ROOT / "docs" / f"{page}.md").read_text())
        for sentence in re.findall(r"^> `(.*?)`", whole, re.M):
            words = sentence.split()
            runs = [words[at : at + 4] for at in range(len(words) - 3)]
            runs = [run for run in runs if not any(map(VALUE.fullmatch, run))]
            found = sum(" ".join(run) in code for run in runs)
            assert 2 * found >= len(runs), sentence
            quoted += 1
    assert quoted > 40


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@pytest.mark.parametrize("page", PAGES_OF_TEXT, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_index_of_runs_names_the_pages_that_link_to_each():
    """README.md takes figures from runs that its pages link to; those links are not its own."""
    index = (ROOT / "benchmark" / "results" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[([\w-]+)\]\([^|]*\|[^|]*\|(.*)\|$", index, re.M))
    links = {page.name: LINK.findall(page.read_text()) for page in ROOT.glob("docs/*.md")}
    assert len(rows) > 20
    for run, cited in rows.items():
        linking = {page for page, found in links.items() if any(f"/{run}/" in one for one in found)}
        assert set(re.findall(r"\w+\.md", cited)) - {"README.md"} == linking, run


NAMED = re.compile(r"`((?:\w+/)+)(\w+\.\w+)`")
FOLDERS = (ROOT, ROOT / "python" / "margingate", ROOT / "python" / "margingate" / "runtime")


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    """Of folders that are there: from the root, the package or its runtime."""
    for folder, file in NAMED.findall(page.read_text()):
        places = [root / folder for root in FOLDERS if (root / folder).is_dir()]
        assert not places or any((place / file).exists() for place in places), folder + file


SYMBOLS = (
    re.compile(r"`(?P<name>\w+)` in `(?P<file>[\w/]+\.py)`"),
    re.compile(r"`(?P<file>[\w/]+\.py)`: [^`.]*`(?P<name>\w+)`"),
)


def test_what_a_recipe_names_in_a_file_is_there():
    text = (ROOT / "docs" / "extending.md").read_text()
    found = [match.group("file", "name") for form in SYMBOLS for match in form.finditer(text)]
    assert len(found) >= 9
    for file, name in found:
        (path,) = (root / file for root in FOLDERS if (root / file).exists())
        assert re.search(rf"\b{name}\b", path.read_text()), f"{file} has no {name}"


def test_the_readme_takes_three_minutes():
    assert README.count("\n") <= 120
    prose = re.sub(r"\]\([^)]*\)|[|`*#<>-]", " ", README)
    assert len(prose.split()) <= 700


def test_the_readme_says_what_was_recorded():
    servers = recorded()
    stock, mode, gate = servers.values()
    same = sorted(run.answers - run.changed for name, run in stock.items() if name != "cached")
    assert same[0] == same[-1], "the table has one figure"
    cells = [f"{same[0]} of {stock['batched'].answers}"]
    cells += [f"{run.answers - run.changed} of {run.answers}" for run in mode.values()]
    cells += [f"{run.answers - run.changed} of {run.answers}" for run in gate.values()]
    for cell in cells:
        assert f"| {cell} |" in README


def test_the_readme_has_the_times_of_the_newest_table():
    """As `benchmark.readme_table` wrote it."""
    tables = (ROOT / "benchmark" / "results").glob("*/table.md")
    newest = max(tables, key=lambda path: path.parent.name.partition("-")[2])
    recorded_rows = newest.read_text().splitlines()
    labels = ("time of a decode step (", "time of a prefill", "tokens a second, all at once")
    for label in labels:
        recorded_row, row = (
            next(line for line in lines if line.startswith(f"| {label}"))
            for lines in (recorded_rows, README.splitlines())
        )
        assert row.split("|")[2:] == recorded_row.split("|")[2:]


def test_the_changes_are_for_who_upgrades():
    """Four groups of entries, each of two lines at most."""
    _, *versions = (ROOT / "CHANGELOG.md").read_text().split("\n## ")
    for version in versions:
        _, *groups = version.split("\n### ")
        titles = [group.partition("\n")[0] for group in groups]
        assert titles == [one for one in GROUPS if one in titles], "another group, or another order"
        for group in groups:
            for entry in re.split(r"^(?=- )", group.partition("\n\n")[2], flags=re.M):
                if entry.startswith("- "):
                    lines = entry.partition("\n\n")[0].splitlines()
                    assert len(lines) <= 2 and max(map(len, lines)) <= 132, entry
                    assert lines[-1].endswith("."), entry


def run(of: int, tokens: int, cached: int) -> dict[str, int]:
    return {"of": of, "tokens": tokens, "cached": cached}


def test_what_changed_is_read_by_arrangement(tmp_path):
    runs = {"batched": run(9, 7, 0), "shuffled1": run(9, 9, 0), "cached": run(9, 3, 40)}
    without = runs | {"cached": run(9, 9, 0)}
    record = json.loads(json.dumps({"cases": {"a": runs, "b": without}}))
    found = read_changed(record, "a")
    assert found == {"batched": Changed(2, 9), "shuffled1": Changed(0, 9), "cached": Changed(6, 9)}
    assert found["cached"].share == 6 / 9
    assert "cached" not in read_changed(record, "b"), "no prompt came from a cache"
    with pytest.raises(KeyError):
        read_changed(record, "c")
    plot_answers({"a": found, "b": read_changed(record, "b")}, tmp_path / "a.png", "Answers")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_drawn_of_the_records(tmp_path, monkeypatch):
    picture = tmp_path / "demo.png"
    monkeypatch.setattr("sys.argv", ["answers_plot", "--out", str(picture)])
    answers_plot.main()
    assert picture.stat().st_size > 10_000


def test_every_test_that_is_named_is_in_its_module():
    """A table that names what is gone would say that a fault is held when it is not."""
    rows = re.findall(
        r"^\|[^|]*\| (`[^|]*`) \| (.*) \|$", (ROOT / "test/README.md").read_text(), re.M
    )
    assert len(rows) > 50
    for modules, tests in rows:
        files = [ROOT / f"test/test_{name}.py" for name in re.findall(r"`(\w+)`", modules)]
        defined = {
            name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())
        }
        missing = set(re.findall(r"`(test_\w+)`", tests)) - defined
        assert not missing, f"not in {modules}: {missing}"
