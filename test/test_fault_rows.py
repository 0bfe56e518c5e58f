"""Rows that a request asks to be corrupted: which servers do so, and what is answered."""

import pytest
from request_stand_in import CONFIG, classify, refused, request

from margingate.config import GateConfig
from margingate.runtime.hooks import handlers
from margingate.runtime.request.admission import attach

FAULTY = GateConfig(inject_faults=True)


def test_faults_need_a_server_started_for_them():
    text = refused(request({"gate_fault_rows": [1]}))
    assert text.startswith("custom_params.gate_fault_rows needs a server started with ")
    assert "--gate-inject-faults" in text


def test_faults_are_kept_where_they_are_honoured():
    gate = classify(request({"gate_fault_rows": [3, 1, 3]}), FAULTY)
    assert (gate.gated, gate.faults) == (True, frozenset({1, 3}))


@pytest.mark.parametrize("copies", [1, 2])
def test_a_score_has_no_row_for_faults(copies):
    """SGLang sends one first for a request with `n` above 1, with the same parameters."""
    gate = classify(request({"gate_fault_rows": [1]}, max_new_tokens=0, n=copies), FAULTY)
    assert (gate.gated, gate.faults) == (True, frozenset())


@pytest.mark.parametrize("config", [CONFIG, FAULTY])
def test_no_faults_are_no_faults(config):
    assert classify(request({"gate_fault_rows": []}), config).gated


@pytest.mark.parametrize("rows", [3, "12", {"1": 2}, [1.0], [True], ["1"], [[1]], None])
def test_malformed_faults_are_answered(rows):
    text = refused(request({"gate_fault_rows": rows}), FAULTY)
    assert text == f"custom_params.gate_fault_rows is {rows!r}: give a list of row numbers."


@pytest.mark.parametrize(("faults", "room", "refused"), [([1], 0, True), ([1], 1, False)])
def test_a_fault_in_an_answer_without_room_is_answered(faults, room, refused):
    """SGLang cuts `max_new_tokens` behind `Req.__init__`, so this is asked at the queue."""
    req, aborts = request({"gate_fault_rows": faults}), []
    attach(req, FAULTY)
    req.sampling_params.max_new_tokens, req.to_finish = room, None
    req.set_finish_with_abort = aborts.append
    handlers.add_request(None, req)
    text = (
        "gate_fault_rows is [1], but a prompt of 3 tokens leaves no room for an answer: shorten "
        "the prompt, or raise --context-length."
    )
    assert aborts == [text] * refused
