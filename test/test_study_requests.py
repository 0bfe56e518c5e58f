"""What a request may ask of a server of studies alone: forced tokens, choices and columns."""

import pytest
from request_stand_in import VOCABULARY, classify, refused, request

from margingate.config import GateConfig, GateError
from margingate.runtime.request.record import ColumnsWanted

STUDY = GateConfig(policy="observe", study=True)


def test_forced_ids_are_for_studies():
    forced = {"gate_forced_ids": [3, VOCABULARY - 1]}
    assert classify(request(forced), STUDY).forced == (3, VOCABULARY - 1)
    assert "needs a server started with --gate-study" in refused(request(forced))
    for bad in (5, ["a"], [True], "12"):
        assert "give a list of token ids" in refused(request({"gate_forced_ids": bad}), STUDY)
    text = refused(request({"gate_forced_ids": [3, VOCABULARY]}), STUDY)
    assert text.startswith(f"custom_params.gate_forced_ids holds {VOCABULARY}, but the model's")


def test_forced_ids_need_a_gate_that_only_observes():
    other = GateConfig(study=True)
    assert "--gate-policy observe" in refused(request({"gate_forced_ids": [3]}), other)


def test_studies_report_choices_and_run_without_overlap():
    gate = classify(request(), STUDY)
    gate.choices.append((3, 0.5))
    assert gate.summary(STUDY)["choices"] == [(3, 0.5)]
    with pytest.raises(GateError, match="--gate-study forces tokens"):
        GateConfig(policy="observe", study=True, overlap="on")


def test_columns_are_kept_and_compared_in_studies_only():
    keep, against = {"gate_columns": {"keep": "k"}}, {"gate_columns": {"against": "k"}}
    assert classify(request(keep)).columns_wanted is None
    assert classify(request(keep), STUDY).columns_wanted == ColumnsWanted("k", True)
    assert classify(request(against), STUDY).columns_wanted == ColumnsWanted("k", False)
    for bad in ("k", {}, {"drop": "k"}, {"keep": "k", "against": "k"}):
        assert classify(request({"gate_columns": bad}), STUDY).columns_wanted is None
    gate = classify(request(against), GateConfig(study=True))
    gate.drift = {"rows": []}
    assert gate.summary(GateConfig(study=True))["columns"] == {"rows": []}
