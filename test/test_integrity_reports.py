"""/server_info does not read every slot each time it is asked."""

from types import SimpleNamespace

from margingate.runtime import integrity


def test_a_busy_server_is_checked_rarely_and_an_idle_one_each_time(monkeypatch):
    checks, idle = [], False
    monkeypatch.setattr(integrity, "check", checks.append)
    controller = SimpleNamespace(scheduler=SimpleNamespace(is_fully_idle=lambda: idle))
    reports = integrity.Reports()
    assert [reports.report(controller) for _ in range(5)] == ["ok"] * 5
    assert len(checks) == 1
    idle = True
    assert reports.report(controller) == "ok" and len(checks) == 2
