"""The gate's metrics: what Prometheus is told, and that code, dashboard and document agree."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from test_layering import MODULES, below, imported

from margingate.confidence import miss_bound
from margingate.config import GateConfig, GateError
from margingate.core.audit import Audits, Bits
from margingate.core.policy import Reason
from margingate.runtime.observe import metrics
from margingate.runtime.observe.metrics import COUNTED, FLUSH_S, METRICS, PREFIX, GateMetrics
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import Counts, GateRequest, Hold

DOCS = Path(__file__).parents[1] / "docs"
LABELS = {"model_name": "m", "tp_rank": 0}
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SERIES = {PREFIX + m.name + suffix: m.name for m in METRICS for suffix in SUFFIXES[m.kind]}


def request(key: str = "1:a", **counts: float) -> Any:
    return SimpleNamespace(gate=GateRequest(key, True, counts=Counts(**counts)))


class Gate:
    """A scheduler's counters, the metrics that watch it, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: str = "margin") -> None:
        self.time = 100.0
        monkeypatch.setattr(metrics, "now", lambda: self.time)
        self.requests, self.audits = OpenRequests(GateConfig(rows=8)), Audits(1)
        self.registry = CollectorRegistry()
        observes = policy == "observe"
        self.metrics = GateMetrics(
            self.requests, self.audits, LABELS, self.registry, observes=observes
        )

    def step(self, mode: str = "decode", gated: int = 1, canonical: bool = False) -> None:
        forward_mode = SimpleNamespace(is_decode=lambda: mode == "decode")
        self.metrics.stepped(SimpleNamespace(forward_mode=forward_mode), gated, canonical)

    def turn(self, seconds: float = FLUSH_S) -> None:
        """The scheduler's loop comes round, so much later."""
        self.time += seconds
        self.metrics.turned()

    def __getitem__(self, name: str) -> Any:
        """A sample, by its name after the prefix and `{its own label's value}`; None: not there."""
        name, _, value = name.rstrip("}").partition("{")
        metric = next(m for m in METRICS if name.startswith(m.name))
        own = {metric.label: value} if value else {}
        labels = {**{key: str(v) for key, v in LABELS.items()}, **own}
        return self.registry.get_sample_value(PREFIX + name, labels)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_every_series_is_there_at_zero_from_the_start(gate):
    names = {f"{m.name}{{{value}}}" for m in METRICS for value in m.values if m.kind == "counter"}
    assert all(gate[name] == 0 for name in names), names
    assert gate["pass_seconds_count"] == gate["held_reqs"] == 0
    assert all((m.kind == "counter") == m.name.endswith("_total") for m in METRICS)


def test_counters_are_those_of_ended_and_open_requests(gate):
    rising = {field: 10 + i for i, field in enumerate(COUNTED.values())}
    gate.requests.totals = Counts(**rising, passes=7)
    ended, held = request("1:a", flips=2), request("2:b", flips=3, passes=5)
    for each in (ended, held):
        gate.requests.open(each)
    gate.requests.withhold(held, Hold(None, None, 0.0))
    gate.requests.reasons = {Reason.ABOVE: 6, Reason.BELOW: 2}
    gate.requests.dues = {"full": 4, "idle": 3}
    gate.step()
    gate.turn()
    for name, field in COUNTED.items():
        assert gate[name] == rising[field] + 5 * (field == "flips"), name
    assert (gate["rows_total{above}"], gate["rows_total{below}"]) == (6, 2)
    assert (gate["passes_total{full}"], gate["passes_total{idle}"]) == (4, 3)
    assert (gate["open_reqs"], gate["held_reqs"]) == (2, 1)

    gate.requests.close(ended)
    gate.requests.reasons[Reason.ABOVE] += 1
    gate.metrics.ended(ended)
    gate.turn()
    assert gate["flips_total"] == rising["flips"] + 5
    assert gate["rows_total{above}"] == 7
    assert gate["open_reqs"] == 1


def test_audits_are_told_while_nothing_else_happens(gate):
    audits = gate.audits
    gate.turn()
    assert gate["audit_mismatch_bound"] == 0, "nothing was flushed yet"
    audits.compared(40, mismatch=False)
    audits.compared(3, mismatch=True)
    audits.compared(2, mismatch=False, bits=Bits(bits=96), kinds=["column", "margin"])
    audits.dropped = 5
    gate.metrics.audited("a")
    gate.turn()
    assert (gate["audit_requests_total"], gate["audit_tokens_total"]) == (3, 45)
    assert (gate["audit_bits_total"], gate["audit_bit_mismatches_total"]) == (96, 1)
    assert (gate["audit_mismatches_total"], gate["audit_dropped_total"]) == (1, 5)
    assert gate["audit_mismatch_bound"] == pytest.approx(miss_bound(1, 3, 0.95))


def test_events(gate):
    gate.step("prefill", canonical=True)
    gate.step(canonical=True)
    gate.step()
    gate.step(gated=0, canonical=True)
    gate.metrics.flagged(request(), 3, 0.2, "below")
    gate.metrics.flagged(request(), 4, 0.1, "a_new_reason")
    gate.metrics.passed(12, 3, 0.03, "full")
    gate.metrics.passed(16, 3, 0.5, "full")
    gate.metrics.settled(request(), 0.25)
    gate.metrics.ended(request(drain_s=1.5))
    gate.metrics.ended(request())
    gate.turn()
    assert (gate["steps_total{prefill}"], gate["steps_total{decode}"]) == (1, 2)
    assert gate["canonical_steps_total"] == 1
    assert gate["flagged_rows_total{below}"] == gate["flagged_rows_total{a_new_reason}"] == 1
    assert (gate["pass_seconds_count"], gate["pass_rows_sum"]) == (2, 28)
    assert gate["pass_seconds_sum"] == pytest.approx(0.53)
    assert (gate["settle_seconds_count"], gate["settle_seconds_sum"]) == (1, 0.25)
    assert (gate["drain_seconds_count"], gate["drain_seconds_sum"]) == (1, 1.5)
    gate.step()
    gate.turn()
    assert gate["pass_seconds_count"] == 2, "observed twice"


def test_two_fingerprints_are_two_numbers(gate, monkeypatch):
    """Within what a float holds, and the same for the same one."""
    monkeypatch.setattr(gate.metrics, "_fingerprint", lambda: "6a838490191e81e0")
    gate.step()
    gate.turn()
    assert gate["fingerprint"] == 0x6A838490191E8
    assert float(metrics.as_number("f" * 16)) == (1 << 52) - 1
    monkeypatch.setattr(gate.metrics, "_fingerprint", lambda: None)
    gate.step()
    gate.turn()
    assert gate["fingerprint"] == 0


def test_prometheus_is_told_at_most_every_half_second_and_in_the_end(gate):
    gate.step()
    gate.turn(FLUSH_S - 0.1)
    assert gate["steps_total{decode}"] == 0
    gate.step()
    gate.turn(0.2)
    assert gate["steps_total{decode}"] == 2
    gate.step()
    gate.turn(0.1)
    assert gate["steps_total{decode}"] == 2
    gate.turn()  # nothing happened since but the loop comes round, as it does when idle
    assert gate["steps_total{decode}"] == 3


def test_policy_observe_counts_flags_that_nobody_acts_upon(monkeypatch):
    gate = Gate(monkeypatch, "observe")
    gate.requests.totals = Counts(steps=9, flagged=4)
    gate.requests.reasons = {"observed": 9}
    gate.step(gated=0)
    gate.turn()
    assert (gate["rows_total{observed}"], gate["flagged_rows_total{observed}"]) == (9, 4)


@pytest.mark.parametrize("labels", [LABELS, {**LABELS, "reason": "theirs"}])
def test_what_cannot_be_registered_is_an_error(gate, labels):
    registry = gate.registry if labels is LABELS else CollectorRegistry()
    with pytest.raises(GateError, match=r"sglang:gate_rows_total cannot be registered: .+: drop"):
        GateMetrics(gate.requests, gate.audits, labels, registry)


def test_metrics_are_kept_where_sglang_keeps_its_own():
    reporter = SimpleNamespace(current_scheduler_metrics_enabled=False)
    scheduler = SimpleNamespace(metrics_reporter=reporter, metrics_collector=None)
    requests = OpenRequests(GateConfig(rows=8))
    asked = {"observes": False, "fingerprint": lambda: None}
    assert metrics.observers(scheduler, requests, Audits(1), **asked) == ()


def test_prometheus_client_is_imported_late():
    """It picks its storage, one file per process, by what SGLang puts into the environment."""
    for module in MODULES:
        assert not any(below(name, "prometheus_client") for name in imported(module, at_load=True))


def test_the_dashboard_shows_every_metric_and_no_other():
    text = (DOCS / "grafana.json").read_text()
    shown = set(re.findall(re.escape(PREFIX) + r"\w+", text))
    assert shown <= SERIES.keys()
    assert {SERIES[name] for name in shown} == {metric.name for metric in METRICS}
    dashboard = json.loads(text)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"} == variables
    # A counter starts anew with the server: all but the panel of the total are rates.
    for expr in (target["expr"] for panel in panels for target in panel["targets"]):
        assert "_total" not in expr or "rate(" in expr or "missed_total" in expr, expr
        assert expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}"), expr


def test_the_document_lists_every_metric_as_the_code_does():
    text = (DOCS / "metrics.md").read_text()
    listed = [line for line in text.splitlines() if line.startswith(f"| `{PREFIX}")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in listed]
    assert cells == [
        [PREFIX + m.name, m.kind, m.label or "none", m.unit, m.meaning] for m in METRICS
    ]
    named = set(re.findall(re.escape(PREFIX) + r"\w+", text))
    assert named <= SERIES.keys() | {PREFIX + m.name for m in METRICS}
    for value in {value for m in METRICS for value in m.values if value}:
        assert f"`{value}`" in text, value
