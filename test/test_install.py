"""A gated start asks all that it has to ask, around SGLang's own start; each no ends it.

What the answers rest on is held elsewhere. Here is held that each question is asked.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.arguments.server_args import ATTRIBUTE, LAUNCHED
from margingate.runtime.hooks import firing, registry
from margingate.runtime.hooks.launcher_table import TOKENIZER_HOOKS
from margingate.runtime.request import guard
from margingate.runtime.start import install

BEFORE = (
    *("release.check_version", "surface.check", "arguments.confirm_settings"),
    *("confirm_launcher", "registry.install"),
)
BEHIND = (
    *("refused_models.refuse_columns", "refused_models.refuse_stock_experts"),
    *("refused_models.refuse_other_masks", "pools.confirm", "run_checks", "firing.confirm"),
)
# What the gate is then made of, and who is told.
MADE = ("GateController", "_observers", "handlers.serve", "replicas_alike.announce")
STOCK = "loaded_model.refuse"  # asked here on the stock path; the probe asks it on the other


class Start:
    """Scheduler.__init__ with the hook around it; nothing behind the questions is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.no = ""  # the question that raises
        for name in (*BEFORE, *BEHIND, *MADE, STOCK):
            monkeypatch.setattr(f"{install.__name__}.{name}", self._question(name))

    def _question(self, name: str) -> Any:
        def ask(*_: Any, **__: Any) -> Any:
            self.asked.append(name)
            if name == self.no:
                raise GateError(name)
            return MagicMock()

        return ask

    def run(self, config: GateConfig) -> None:
        def original(*_: Any) -> None:
            self.asked.append("SGLang")

        server_args = MagicMock(**{ATTRIBUTE: config})
        install.init(original, MagicMock(), server_args)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    return Start(monkeypatch)


@pytest.mark.parametrize("path", ["invariant", "stock"])
def test_a_scheduler_asks_everything_before_its_gate_is_up(start: Start, path: str) -> None:
    start.run(GateConfig(fast_path=path))
    at = start.asked.index("SGLang")
    assert set(start.asked[:at]) == set(BEFORE)
    asked = [name for name in start.asked[at + 1 :] if name not in MADE]
    assert set(asked) == {*BEHIND, STOCK} - ({STOCK} if path == "invariant" else set())
    assert asked[-1] == "firing.confirm", "when the checks have run"
    assert start.asked[-len(MADE) :] == [*MADE]


@pytest.mark.parametrize("no", [*BEFORE, *BEHIND, STOCK])
def test_each_no_ends_the_start(start: Start, no: str) -> None:
    start.no = no
    with pytest.raises(GateError, match=no):
        start.run(GateConfig(fast_path="stock"))
    assert not set(start.asked) & set(MADE), "no gate was made"
    assert ("SGLang" in start.asked) is (no not in BEFORE)


def fired(monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    """As if just these hooks had run in this process."""
    monkeypatch.setattr(guard, "_tallies", {name: guard.Tally(fired=1) for name in targets})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hook_that_the_checks_did_not_run_is_named(monkeypatch, ranks: int) -> None:
    """By the counters of this process; of two ranks the sum is asked for too."""
    confirm = firing.confirm
    start = Start(monkeypatch)
    monkeypatch.setattr(firing, "confirm", confirm)
    monkeypatch.setattr(install.ranks, "tp_size", lambda _scheduler: ranks)
    config = GateConfig(fast_path="invariant")
    needed = [*firing.at_start(config, ranks=ranks, quantized=True)]
    for missing in needed:
        fired(monkeypatch, *(name for name in needed if name != missing))
        with pytest.raises(GateError, match=f"patched sglang.srt.{missing}, and SGLang did not"):
            start.run(config)
    fired(monkeypatch, *needed)
    start.run(config)
    assert len(needed) == 1 + ranks


def test_the_first_request_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the observers of every gate, and told how many replicas there are."""
    for module in ("metrics", "event_records", "audit", "delay"):
        monkeypatch.setattr(f"{install.__name__}.{module}.observers", lambda *_, **__: ())
    monkeypatch.setattr(install.replicas, "size", lambda _args: 3)
    controller = MagicMock(config=GateConfig())
    (first,) = (each for each in install._observers(controller) if each is not controller.tally)
    assert isinstance(first, firing.FirstRequest)
    assert (first._config, first._replicas) == (controller.config, 3)


@pytest.mark.parametrize("gated", [True, False])
def test_a_launcher_has_its_hooks_first_and_then_asks_every_scheduler(monkeypatch, gated) -> None:
    """Its mark is on the arguments before any scheduler gets them."""
    installed: list[Any] = []
    monkeypatch.setattr(registry, "install", installed.append)
    monkeypatch.setattr(install.vision, "warm_up_with_text", lambda _model: None)
    carried = {ATTRIBUTE: GateConfig(rows=16)} if gated else {}
    server_args = SimpleNamespace(dp_size=1, **carried)
    manager = SimpleNamespace(server_args=server_args, model_config=None)
    infos: list[dict[str, Any]] = [{"margingate": {}}]

    def original(_cls: Any, args: Any) -> Any:
        assert installed == ([TOKENIZER_HOOKS] if gated else [])
        assert getattr(args, LAUNCHED, False) is gated
        return manager, None, None, SimpleNamespace(scheduler_infos=infos), None, []

    assert install.launch(original, None, server_args)[0] is manager
    infos.append({})
    if not gated:
        install.launch(original, None, server_args)
        return
    installed.clear()
    with pytest.raises(GateError, match="scheduler 1 came up without the gate"):
        install.launch(original, None, server_args)
    installed.clear()
    setattr(server_args, ATTRIBUTE, GateConfig())  # never resolved
    with pytest.raises(GateError, match=r"without the hook on ServerArgs\.resolve_once"):
        install.launch(original, None, server_args)
