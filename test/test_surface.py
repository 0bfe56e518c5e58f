"""What of SGLang's objects the gate names: all of it is in one table, and looked up at start."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import surface_scan

from margingate.config import GateError
from margingate.runtime.compat import surface, surface_table


def test_the_table_has_what_the_source_names_and_nothing_else():
    """A new attribute goes into compat/surface_table.py; test/surface_scan.py reads the source."""
    found = surface_scan.attributes()
    table = {path: set(names.split()) for path, names in surface_table.SURFACE.items()}
    assert {path: set(names) for path, names in found.items()} == table


def test_the_scan_sees_reads_writes_calls_items_and_names_in_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(surface_scan, "RUNTIME", tmp_path)
    (tmp_path / "a.py").write_text(
        "req.rid = scheduler.last_batch.reqs[0].stream\nself._scheduler.abort(req.gate)\n"
        "getattr(req, 'kv').row, setattr(batch, name, 1), view(args).dtype, other.rid\n"
    )
    found = surface_scan.attributes()
    assert {path: {*names} for path, names in found.items()} == {
        "managers.schedule_batch.Req": {"rid", "stream", "kv"},
        "managers.schedule_batch.ScheduleBatch": {"reqs"},
        "managers.scheduler.Scheduler": {"last_batch", "abort"},
        "server_args.ServerArgs": {"dtype"},
    }
    assert found["managers.schedule_batch.Req"]["rid"] == ["a.py:1"]


def test_this_sglang_has_all_of_it():
    assert surface.missing() == []
    surface.check()


@pytest.mark.parametrize("path", ["managers.schedule_batch.Req", "managers.schedule_batch.Absent"])
def test_what_is_missing_is_named_at_start(monkeypatch, path):
    there = surface_table.SURFACE.get(path, "")
    monkeypatch.setitem(surface_table.SURFACE, path, f"{there} renamed")  # type: ignore[index]
    with pytest.raises(GateError) as caught:
        surface.check()
    named = path if path.endswith("Absent") else f"{path}.renamed"
    assert f"--deterministic-gate needs {named} of SGLang, which " in str(caught.value)


def test_a_scheduler_that_lacks_something_does_not_come_up(monkeypatch):
    from margingate.config import GateConfig
    from margingate.runtime.compat.arguments.server_args import ATTRIBUTE
    from margingate.runtime.hooks import registry
    from margingate.runtime.start import install

    monkeypatch.setattr(registry, "install", lambda hooks: None)
    monkeypatch.setattr(surface, "missing", lambda: ["managers.scheduler.Scheduler.last_batch"])
    with pytest.raises(GateError, match=r"needs managers.scheduler.Scheduler.last_batch of SGLang"):
        install.init(pytest.fail, None, SimpleNamespace(**{ATTRIBUTE: GateConfig()}))


def test_members_are_what_a_class_and_its_functions_give_its_objects():
    def wrapped(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    class Base:
        annotated: int

        def __init__(self) -> None:
            self.by_base = 1

    class Kind(Base):
        value = 1

        @wrapped
        def method(self) -> Any:
            self.by_wrapped, self.read.of_another = 1, 2

            def inner() -> None:
                self.by_inner: int = 1

            return inner

        @property
        def computed(self) -> int:
            self.by_property = 1
            return 1

        @classmethod
        def made(cls) -> None:
            cls.by_classmethod = 1  # type: ignore[attr-defined]

    class Record(msgspec.Struct):
        field: int = 1

    found = surface.members(Kind)
    assert {"annotated", "by_base", "value", "method", "by_wrapped", "by_inner"} <= found
    assert {"computed", "by_property", "made", "by_classmethod"} <= found
    assert not {"read", "absent"} & found
    assert "field" in surface.members(Record)


def test_names_behind_the_256th_are_seen():
    source = "\n".join(f"        self.a{i} = {i}" for i in range(600))
    space: dict[str, Any] = {}
    exec(f"class Kind:\n    def __init__(self):\n{source}\n", space)
    assert {f"a{i}" for i in range(600)} <= surface.members(space["Kind"])
