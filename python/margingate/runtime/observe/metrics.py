"""The gate's Prometheus metrics, beside SGLang's own and under the same labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from time import monotonic as now
from typing import TYPE_CHECKING, Any

from margingate.config import GateError
from margingate.core.audit import Audits
from margingate.core.policy import Reason
from margingate.runtime.observe import audit
from margingate.runtime.observe.metric_table import METRICS, PREFIX
from margingate.runtime.request.observer import Observer
from margingate.runtime.request.open_requests import OpenRequests

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

FLUSH_S = 0.5  # prometheus_client is told at most this often
# Counters that are kept with each request: metric, field of `Counts`.
COUNTED = {
    "verified_rows_total": "verified",
    "replayed_rows_total": "replayed",
    "flips_total": "flips",
    "missed_total": "missed",
    "rolled_back_tokens_total": "rolled_back",
    "repaired_columns_total": "repaired",
    "retractions_total": "retractions",
}
# Counters of `Audits`.
AUDITED = {
    "audit_requests_total": "audited",
    "audit_tokens_total": "tokens",
    "audit_mismatches_total": "mismatches",
    "audit_bits_total": "bits.bits",
    "audit_bit_mismatches_total": "bit_mismatches",
    "audit_dropped_total": "dropped",
}
EXACT = 13  # hexadecimal digits that a float holds
_LABELS = {metric.name: metric.label for metric in METRICS}
_Series = tuple[str, str]  # a metric's name and its own label's value, "" without one


def observers(
    scheduler: Any,
    requests: OpenRequests,
    audits: Audits,
    *,
    observes: bool,
    fingerprint: Callable[[], str | None],
) -> tuple[Observer, ...]:
    """The metrics, where SGLang keeps its own in this process (--enable-metrics); else nothing.

    Args: as GateMetrics takes them.

    Raises:
        GateError: a metric cannot be registered.
    """
    if not scheduler.metrics_reporter.current_scheduler_metrics_enabled:
        return ()
    labels = scheduler.metrics_collector.labels
    return (GateMetrics(requests, audits, labels, observes=observes, fingerprint=fingerprint),)


def as_number(fingerprint: str | None) -> int:
    """Equal for equal fingerprints; labels would leave a series of each old one behind."""
    return int(fingerprint[:EXACT], 16) if fingerprint else 0


class GateMetrics(Observer):
    """Collects numbers; `flush` alone calls prometheus_client, at most every FLUSH_S.

    Counters that are kept anyway are read from where they are, so they agree with `/server_info`.
    """

    def __init__(
        self,
        requests: OpenRequests,
        audits: Audits,
        labels: Mapping[str, Any],
        registry: CollectorRegistry | None = None,
        *,
        observes: bool = False,
        fingerprint: Callable[[], str | None] = lambda: None,
    ) -> None:
        """
        Args:
            labels: SGLang's, with their values.
            registry: None: the process's.
            observes: the policy; flags are counted, and none is acted upon.
            fingerprint: says what it is now, in hexadecimal digits.

        Raises:
            GateError: a metric cannot be registered.
        """
        self._requests, self._audits, self._observes = requests, audits, observes
        self._fingerprint = fingerprint
        self._labels = dict(labels)
        self._metrics: dict[str, Any] = {}
        self._register(registry)
        self._tally: dict[_Series, int] = {}  # counted here
        self._told: dict[_Series, int] = {}  # what prometheus_client knows of each counter
        self._observed: dict[str, list[float]] = {}  # by histogram, since the last flush
        self._changed = False  # since the last flush
        self._flushed = now()

    def _register(self, registry: CollectorRegistry | None) -> None:
        # Imported here: it looks for PROMETHEUS_MULTIPROC_DIR, which SGLang sets late, only once.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        kinds: dict[str, Any] = {
            "counter": Counter,
            "gauge": partial(Gauge, multiprocess_mode="mostrecent"),
            "histogram": Histogram,
        }
        try:
            for metric in METRICS:
                self._metrics[metric.name] = kinds[metric.kind](
                    PREFIX + metric.name,
                    metric.meaning,
                    [*self._labels, *filter(None, [metric.label])],
                    registry=registry or REGISTRY,
                    **({"buckets": metric.buckets} if metric.buckets else {}),
                )
                for value in metric.values:
                    self._child(metric.name, value)
        except (TypeError, ValueError, OSError) as error:
            raise GateError(
                f"the gate's metric {PREFIX}{metric.name} cannot be registered: {error}: drop "
                "--enable-metrics, or what uses this name or its labels."
            ) from error

    # -- events

    def stepped(self, batch: Any, gated: int, canonical: bool) -> None:
        self._changed = True  # what is counted elsewhere, if nothing else
        if not gated:
            return
        decode = batch.forward_mode.is_decode()
        self._count("steps_total", "decode" if decode else "prefill")
        if decode and canonical:
            self._count("canonical_steps_total")

    def flagged(self, req: Any, row: int, margin: float, reason: str) -> None:
        self._count("flagged_rows_total", reason)

    def passed(self, rows: int, requests: int, seconds: float, due: str) -> None:
        self._observe("pass_seconds", seconds)
        self._observe("pass_rows", rows)

    def settled(self, req: Any, seconds: float) -> None:
        self._observe("settle_seconds", seconds)

    def ended(self, req: Any) -> None:
        if req.gate.counts.drain_s > 0:
            self._observe("drain_seconds", req.gate.counts.drain_s)
        self._changed = True  # the rest is counted elsewhere

    def audited(self, rid: str) -> None:
        self._changed = True

    def turned(self) -> None:
        if self._changed and now() - self._flushed >= FLUSH_S:
            self.flush()

    def _count(self, name: str, value: str = "") -> None:
        self._tally[name, value] = self._tally.get((name, value), 0) + 1
        self._changed = True

    def _observe(self, name: str, value: float) -> None:
        self._observed.setdefault(name, []).append(value)
        self._changed = True

    # -- to prometheus_client

    def flush(self) -> None:
        """Tell prometheus_client all that happened since the last time."""
        self._changed, self._flushed = False, now()
        for series, total in self._totals():
            if (rise := total - self._told.get(series, 0)) > 0:
                self._child(*series).inc(rise)
                self._told[series] = total
        for name, values in self._observed.items():
            child = self._child(name)
            for value in values:
                child.observe(value)
            values.clear()
        self._child("audit_mismatch_bound").set(audit.bound(self._audits))
        self._child("open_reqs").set(len(self._requests))
        self._child("held_reqs").set(len(self._requests.held))
        self._child("fingerprint").set(as_number(self._fingerprint()))

    def _totals(self) -> Iterator[tuple[_Series, int]]:
        requests, counts = self._requests, self._requests.summed()
        yield from self._tally.items()
        for name, field in COUNTED.items():
            yield (name, ""), getattr(counts, field)
        for name, field in AUDITED.items():
            yield (name, ""), attrgetter(field)(self._audits)
        for reason, rows in requests.reasons.items():
            yield ("rows_total", reason), rows
        for due, passes in requests.dues.items():
            yield ("passes_total", due), passes
        if self._observes:
            yield ("flagged_rows_total", Reason.OBSERVED), counts.flagged

    def _child(self, name: str, value: str = "") -> Any:
        own = _LABELS[name]
        return self._metrics[name].labels(**self._labels, **({own: value} if own else {}))
