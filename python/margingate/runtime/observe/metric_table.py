"""The gate's Prometheus metrics by name, kind and meaning.

docs/metrics.md lists them, docs/grafana.json shows them; a test holds the three together.
"""

from __future__ import annotations

from dataclasses import dataclass

from margingate.core.policy import Reason
from margingate.core.queue import Due

PREFIX = "sglang:gate_"
FLAGS = (
    *(Reason.BELOW, Reason.ROUTER, Reason.ALWAYS, Reason.NOT_FINITE),
    *(Reason.INJECTED, Reason.SIMULATED, Reason.OBSERVED),
)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, and its line in docs/metrics.md."""

    name: str  # after PREFIX
    kind: str  # counter, gauge or histogram
    unit: str
    meaning: str
    label: str = ""  # beside SGLang's own
    values: tuple[str, ...] = ("",)  # of the label; these are there, at 0, from the start
    buckets: tuple[float, ...] = ()  # of a histogram


METRICS = (
    Metric(
        "rows_total",
        "counter",
        "rows",
        "tokens emitted, also those rolled back later",
        "reason",
        tuple(Reason),
    ),
    Metric("flagged_rows_total", "counter", "rows", "rows to be verified", "reason", FLAGS),
    Metric(
        "steps_total",
        "counter",
        "forwards",
        "prefill and decode forwards with gated requests in them",
        "mode",
        ("prefill", "decode"),
    ),
    Metric(
        "canonical_steps_total",
        "counter",
        "forwards",
        "decode forwards with gated requests in them that needed no verification",
    ),
    Metric("verified_rows_total", "counter", "rows", "rows computed by verify passes"),
    Metric(
        "replayed_rows_total",
        "counter",
        "rows",
        "rows verified only because a flagged one brought them along",
    ),
    Metric("flips_total", "counter", "rows", "mismatches repaired"),
    Metric(
        "missed_total",
        "counter",
        "rows",
        "mismatches found after the token had been sent; should stay 0",
    ),
    Metric(
        "rolled_back_tokens_total",
        "counter",
        "tokens",
        "tokens dropped by flips, the replaced ones included",
    ),
    Metric("repaired_columns_total", "counter", "columns", "K/V columns rewritten in place"),
    Metric(
        "retractions_total",
        "counter",
        "retractions",
        "times a request lost its memory and was replayed",
    ),
    Metric("passes_total", "counter", "passes", "verify passes", "due", tuple(Due)),
    Metric(
        "pass_seconds",
        "histogram",
        "seconds",
        "a verify pass, from taking its rows to having settled them",
        buckets=SECONDS,
    ),
    Metric(
        "pass_rows", "histogram", "rows", "rows of a verify pass, padding not counted", buckets=ROWS
    ),
    Metric(
        "drain_seconds",
        "histogram",
        "seconds",
        "per request that had to wait for it: from its last token to the verdict on its rows",
        buckets=SECONDS,
    ),
    Metric(
        "settle_seconds",
        "histogram",
        "seconds",
        "per wait: from the first token that is not settled until all of the request's are",
        buckets=SECONDS,
    ),
    Metric(
        "audit_requests_total",
        "counter",
        "requests",
        "finished requests replayed and compared (`--gate-audit-rate`)",
    ),
    Metric("audit_tokens_total", "counter", "tokens", "output tokens compared by audits"),
    Metric(
        "audit_mismatches_total",
        "counter",
        "requests",
        "audited requests with a token that differs; should stay 0",
    ),
    Metric(
        "audit_bits_total",
        "counter",
        "bits",
        "bits of margins, log-probs and K/V columns compared by audits",
    ),
    Metric(
        "audit_bit_mismatches_total",
        "counter",
        "requests",
        "audited requests with the same tokens and other bits; should stay 0",
    ),
    Metric(
        "audit_dropped_total",
        "counter",
        "requests",
        "requests chosen for an audit and not compared",
    ),
    Metric(
        "audit_mismatch_bound",
        "gauge",
        "share",
        "upper 95 % confidence bound on mismatches per request; 1 before the first audit",
    ),
    Metric("open_reqs", "gauge", "requests", "gated requests with a token and no end yet"),
    Metric("held_reqs", "gauge", "requests", "gated requests whose end waits for verification"),
    Metric(
        "fingerprint",
        "gauge",
        "number",
        "the first 13 hexadecimal digits of the fingerprint, as a number; 0 where there is none",
    ),
)
