"""The canary: a release that changed something is told apart from one that did not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from margingate.canary import __main__ as command
from margingate.canary import report, unit_tests, wheel
from margingate.canary.tree import Tree
from margingate.errors import CliError
from margingate.harness.servers import CPU_ARGS, CPU_ENV, GATE, Server, ServerError, free_port
from margingate.harness.tiny_models import tiny_model

RENAMED = {
    "sglang/srt/managers/utils.py": (
        "def copy_to_cpu(self, ret",
        "def copy_to_cpu(self, when, ret",
    ),
    "sglang/srt/managers/overlap_utils.py": ("output_tokens_buf", "tokens_buf"),
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    """A wheel of 0.5.99: the installed sources with one parameter and one attribute renamed."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]).parent
    made = tmp_path_factory.mktemp("wheel") / "sglang-0.5.99-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path in (root / "sglang").rglob("*"):
            name = str(path.relative_to(root))
            if name in RENAMED:
                before, after = RENAMED[name]
                source = path.read_text()
                assert before in source
                archive.writestr(name, source.replace(before, after))
            elif path.is_file() and path.suffix != ".pyc":
                archive.write(path, name)
        pins = "Requires-Dist: torch==9.9\nRequires-Dist: other==1; extra == 'test'\n"
        text = f"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.99\n{pins}\nAbout.\n"
        archive.writestr("sglang-0.5.99.dist-info/METADATA", text)
    return made


@pytest.fixture(scope="module")
def other(made_up, tmp_path_factory) -> Tree:
    return wheel.unpacked(str(made_up), tmp_path_factory.mktemp("unpacked"))


newest = pytest.mark.skipif(
    importlib.metadata.version("sglang") != "0.5.23", reason="the canary stands on the newest"
)


@newest
def test_what_a_release_changed_is_named(other):
    found = {(what, where): how for what, where, how in report.changes(other, report.installed())}
    hook = found.pop(("hook", "managers.utils.GenerationBatchResult.copy_to_cpu"))
    assert "its parameters are (self when" in hook, "the sentence of the start"
    assert found.pop(("attribute", "managers.overlap_utils.FutureMap.output_tokens_buf")) == "gone"
    assert found.pop(("pin", "torch==9.9")) == "new"
    assert {what for what, _ in found} == {"pin"}, "and nothing else"


@newest
def test_a_start_beside_it_ends_with_the_changed_signature(other, tmp_path, ports):
    """Had it the number of a release that is served: a server is launched, and never comes up."""
    mixed, own = tmp_path / "mixed", report.installed().root
    shutil.copytree(other.root / "sglang", mixed / "sglang", copy_function=os.symlink)
    attribute = "sglang/srt/managers/overlap_utils.py"  # the start would tell of it first
    (mixed / attribute).unlink()
    (mixed / attribute).symlink_to(own / attribute)
    server = Server(
        ("--model-path", str(tiny_model("qwen3", tmp_path)), *CPU_ARGS, GATE),
        tmp_path / "log",
        port=free_port(ports),
        env=report.environment(Tree(mixed)) | CPU_ENV,
        stop_s=0.5,
    )
    with pytest.raises(ServerError), server:
        pass
    assert (
        "--deterministic-gate cannot patch sglang.srt.managers.utils.GenerationBatchResult."
        "copy_to_cpu: its parameters are (self when "
    ) in server.log.read_text()


@newest
def test_bodies_that_differ_are_listed_and_no_others(other):
    listed = {where: (use, how) for use, where, how in report.bodies(other, report.installed())}
    use, how = listed.pop("managers.utils.GenerationBatchResult.copy_to_cpu")
    assert use == "hooked" and how.startswith("2 lines differ, sglang/srt/managers/utils.py:")
    assert all("overlap_utils" in how for _, how in listed.values())


@newest
def test_nothing_is_said_of_a_release_that_is_served(monkeypatch):
    """Where the start would refuse nothing: of the installed one `test_surface` and `test_hooks`
    hold that.
    """
    monkeypatch.setattr(report, "_beside", lambda _other: [])
    base = report.installed()
    assert list(report.bodies(base, base)) == []
    assert report.written(list(report.changes(base, base)), []) == "nothing"


def test_the_tables_are_markdown():
    found = report.written([("pin", "torch==9.9", "new")], [("hooked", "a.b", "2 lines differ")])
    assert "| pin | torch==9.9 | new |" in found
    assert "1 functions to read again:\n\n| Use | Function | How |" in found


def test_definitions_are_found_through_imports_bases_and_blocks(tmp_path):
    package = tmp_path / "sglang" / "srt"
    package.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .a import Kind as Other\n")
    (package / "a.py").write_text(
        '"""Doc."""\nfrom sglang.srt import b\nclass Kind(b.Base):\n'
        "    if True:\n        def inside(self): return 1  # a comment\n"
    )
    (package / "b.py").write_text('class Base:\n    def below(self):\n        """Doc."""\n')
    tree = Tree(tmp_path)
    inside, below = tree.find("sglang.srt.Other.inside"), tree.find("sglang.srt.a.Kind.below")
    assert inside is not None and inside.place == "sglang/srt/a.py:5"
    assert inside.body == "def inside(self):\n    return 1"
    assert below is not None and below.body == "def below(self):\n    pass"
    assert tree.find("sglang.srt.a.Kind.absent") is None
    assert tree.find("sglang.srt.absent.Kind") is None


def test_the_tests_beside_a_release_start_no_server():
    names = {path.name for path in unit_tests.files(Path(__file__).parents[1])}
    assert {"test_hooks.py", "test_radix.py", "test_surface.py"} <= names
    assert not [name for name in names if "server_" in name or name == "test_engine.py"]
    assert "test_core_ledger.py" not in names, "which has nothing to do with SGLang"


def test_failures_are_read_from_what_pytest_says():
    said = (
        "..F\nFAILED test/test_a.py::test_b[x] - ValueError: no\nERROR test/test_c.py\n1 failed\n"
    )
    assert unit_tests._FAILED.findall(said) == [
        ("test/test_a.py::test_b[x]", "ValueError: no"),
        ("test/test_c.py", ""),
    ]


def test_the_tests_are_looked_for_where_it_runs(monkeypatch, tmp_path):
    """And not beside the package: `pip install .` leaves them behind."""
    monkeypatch.setattr(report, "installed", lambda: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CliError, match=r"has no tests: run it in a checkout, or give --no-tests"):
        command.run("0.5.99", tests=True)


def test_a_release_that_cannot_be_fetched_is_one_sentence(monkeypatch, tmp_path, capsys):
    with pytest.raises(CliError, match=r"cannot be unpacked .* give a version or a wheel"):
        wheel.unpacked(str(tmp_path / "absent.whl"), tmp_path)

    def run(release: str, *, tests: bool) -> int:
        raise CliError(f"{release} {tests}")

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(sys, "argv", ["canary", "0.0.1", "--no-tests"])
    assert command.main() == 2
    assert capsys.readouterr().err == "margingate: 0.0.1 False\n"
