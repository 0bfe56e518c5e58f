"""The record of a request: its prompt, key, settings, counts, rows and log-probs."""

from array import array
from random import Random
from types import SimpleNamespace

import pytest
from request_stand_in import CONFIG, classify, request

from margingate.config import GateConfig
from margingate.runtime.request.admission import digest, queue
from margingate.runtime.request.record import LOGPROB_LISTS, Counts, GateRequest, logprob_lists


def test_the_record_names_the_prompt():
    one, same, other = request(), request(), request()
    other.origin_input_ids = [*one.origin_input_ids, 1]
    records = [classify(req).summary(CONFIG)["prompt"] for req in (one, same, other)]
    assert records[0] == records[1] != records[2]
    assert len(records[0]) == 16
    assert digest([1 << 70]) == ""


def test_the_record_names_the_prompt_that_sglang_cut():
    req = request(origin_input_ids=array("q", [1, 2, 3, 4]))
    req.to_finish = None
    before = classify(req).prompt
    queue(req, "")
    assert req.gate.prompt == before
    req.origin_input_ids = req.origin_input_ids[:3]  # --allow-auto-truncate, behind its making
    queue(req, "")
    assert req.gate.prompt == digest([1, 2, 3]) != before


def test_keys_differ_where_clients_reuse_an_id():
    one, two = classify(request(rid="same")), classify(request(rid="same"))
    assert one.key != two.key
    assert one.key.endswith(":same")


def test_the_summary_of_a_gated_request_has_the_settings_and_every_count():
    gate = classify(request())
    gate.counts.add(Counts(steps=7, flips=1, drain_s=0.5))
    summary = gate.summary(GateConfig(threshold=0.25, guarantee="exact"))
    assert summary["gated"] is True
    assert (summary["guarantee"], summary["policy"]) == ("exact", "margin")
    assert summary["threshold"] == 0.25
    assert (summary["steps"], summary["flips"], summary["drain_s"]) == (7, 1, 0.5)
    assert set(Counts.__slots__) <= summary.keys()


def test_counts_add_up_field_by_field():
    total = Counts()
    for number in (1, 2):
        total.add(Counts(**dict.fromkeys(Counts.__slots__, number)))
    assert all(getattr(total, name) == 3 for name in Counts.__slots__)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_known_as_they_were_noted(seed):
    """Of rows that are canonical and not flagged, with or without a call."""
    rng = Random(seed)
    gate, wanted = GateRequest("1:a", True), []
    for row in range(60):
        flagged, canonical = rng.choice(
            [(False, True), (False, True), (True, False), (False, False)]
        )
        if canonical and rng.random() < 0.7:
            gate.margins.append(row)
        else:
            gate.note_row(row, flagged=flagged, canonical=canonical)
        wanted.append((float(row), flagged, canonical))
        if rng.random() < 0.1:
            kept = rng.randrange(len(wanted) + 1)
            gate.forget_rows(kept)
            del wanted[kept:]
        rows = range(1, len(wanted) + 1)
        canonical_rows = gate.were_canonical(len(wanted) + 3)
        flags = [gate.was_flagged(row) for row in rows]
        assert list(zip(gate.margins, flags, canonical_rows, strict=True)) == wanted
        assert gate.were_canonical(5) == canonical_rows[:5]
        assert not gate.was_flagged(len(wanted) + 1)


def test_log_prob_lists_are_those_that_are_kept():
    kept = SimpleNamespace(**{name: [] for name in LOGPROB_LISTS})
    kept.output_token_logprobs_val = [0.0]
    req = SimpleNamespace(return_logprob=True, logprob=kept)
    assert logprob_lists(req) == {"output_token_logprobs_val": [0.0]}
    req.return_logprob = False
    assert logprob_lists(req) == {}
