"""/server_info does not read every slot each time it is asked."""

from types import SimpleNamespace
from typing import Any

from margingate.runtime.observe import integrity


def test_a_busy_server_is_checked_rarely_and_an_idle_one_each_time(monkeypatch):
    checks, idle = [], False
    monkeypatch.setattr(integrity, "check", lambda *given: checks.append(given))
    nothing: Any = None
    reports = integrity.Reports(SimpleNamespace(is_fully_idle=lambda: idle), nothing, nothing)
    assert [reports.report() for _ in range(5)] == ["ok"] * 5
    assert len(checks) == 1
    idle = True
    assert reports.report() == "ok" and len(checks) == 2
