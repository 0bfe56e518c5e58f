"""An idle turn of the auditor: what is compared and reported. Its forwards are made up."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from audited_server import Server
from sglang.srt.managers.schedule_batch import ReqKvInfo

from margingate.core.audit import Bits
from margingate.runtime.request.record import GateRequest


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch, [[], [5], [6, 7]])


def test_an_answer_that_is_replayed_alike(server):
    server.end()
    server.auditor.idle()
    assert (server.audits.audited, server.audits.tokens, server.audits.mismatches) == (1, 3, 0)
    assert (server.closed, server.told, server.audits.waiting) == (1, ["r"], 0)
    server.auditor.idle()
    assert server.audits.audited == 1


WIDTH = 2 * 2 * 8 * 16  # bits of a column of `Pool`


def test_the_bits_that_were_compared_are_counted(server):
    server.end()
    server.auditor.idle()
    found = server.module.report(server.audits)
    assert [found[name] for name in ("margins", "logprobs", "columns")] == [3, 3, 5]
    assert found["bits"] == 5 * WIDTH + (3 + 3) * 32
    assert server.found == (1, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("column", range(5))
def test_a_column_with_other_bits_is_found_though_all_tokens_are_right(server, caplog, column):
    server.columns[column] += 1
    server.end()
    server.auditor.idle()
    assert server.found == (1, 0, 1, 0, 0, 1) and server.audits.tokens == 3
    assert (
        f"the same tokens with other bits, first in column {column}, of a prompt of 3 tokens"
        in (caplog.text)
    )
    assert "in forwards of 2+1, 1 rows" in caplog.text


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("kind", ["margin", "logprob"])
def test_one_bit_of_a_float_is_found(server, caplog, kind, row):
    values = getattr(server, kind + "s")
    bits = torch.tensor(values).view(torch.int32)
    bits[row] ^= 1
    values[:] = bits.view(torch.float32).tolist()
    server.end()
    server.auditor.idle()
    margin = kind == "margin"
    assert server.found == (1, 0, 1, int(margin), int(not margin), 0)
    assert f"first in {'margin' if margin else 'log-prob'} {row + 1}, of" in caplog.text


def test_a_zero_has_a_sign_and_a_nan_is_itself(server):
    server.margins[:] = [0.0, float("nan"), float("inf")]
    server.end(canonical=(0, 0, 0))
    recorded = server.audits.take(2)
    held = server.module._Comparison(recorded, WIDTH)
    for value, other in ((0.0, -0.0), (float("nan"), float("inf"))):
        for replayed, wrong in ((value, {}), (other, {"margin": 1})):
            held.wrong.clear()
            held._take_float("margin", replayed, array("f", [value]), 0)
            assert held.wrong == wrong


def test_nothing_is_compared_that_is_not_promised(server):
    server.canonical = 1
    server.margins[1:] = server.logprobs[1:] = [9.0, 9.0]
    server.columns[3:] = 0
    server.end(canonical=(1, 0, 0))
    server.auditor.idle()
    assert server.found == (1, 0, 0, 0, 0, 0)
    bits = server.audits.bits
    assert (bits.margins, bits.logprobs, bits.columns) == (1, 1, 3)


def test_the_margin_of_a_verified_row_is_the_fast_paths_and_its_columns_are_not(server):
    server.margins[1] = 9.0
    server.end(canonical=(1, 0, 1))
    server.auditor.idle()
    bits = server.audits.bits
    assert (bits.margins, bits.logprobs, bits.columns) == (2, 3, 5)
    assert server.found == (1, 0, 0, 0, 0, 0)


def test_without_a_canonical_row_or_memory_tokens_alone_are_compared(server, monkeypatch, caplog):
    server.canonical = 0
    server.end(canonical=(0, 0, 0))
    server.auditor.idle()

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(server.auditor._columns, "of", fails)
    server.canonical = 3
    server.end(canonical=(0, 0, 0))
    server.auditor.idle()
    assert "no memory to digest the columns of request r" in caplog.text
    assert (server.audits.tokens, server.audits.bits) == (6, Bits())


def test_log_probs_only_where_the_client_asked_and_margins_of_greedy_rows(server):
    server.end(return_logprob=False, draw=SimpleNamespace())
    server.auditor.idle()
    bits = server.audits.bits
    assert (bits.margins, bits.logprobs, bits.columns) == (0, 0, 5)


def test_bits_that_differ_are_not_lost_when_a_message_comes(server):
    server.columns[0] += 1
    server.end()
    server.called_after = 1  # after the first forward
    server.auditor.idle()
    assert server.found[:3] == (1, 0, 1) and server.audits.waiting == 0


def test_no_audit_runs_while_weights_are_written(server):
    server.end()
    server.scheduler.weight_updater._session = "open"
    assert not server.auditor.idle() and server.audits.waiting
    server.scheduler.weight_updater._session = None
    assert server.auditor.idle()


def test_columns_of_others_are_not_digested(server, monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(server.auditor._columns, "of", asked.append)
    kv = ReqKvInfo(req_pool_idx=1)
    req = SimpleNamespace(gate=GateRequest("k", False), kv=kv, finished_reason="stop")
    server.auditor.freed(req)
    server.auditor.freed(SimpleNamespace(kv=kv))
    server.audits.rate = 0.0
    server.end()
    assert not asked


@pytest.mark.parametrize(("output", "row"), [((4, 6, 7), 1), ((5, 9, 9), 2), ((5, 6, 8), 3)])
def test_the_first_token_that_differs_is_reported(server, caplog, output, row):
    server.end(output=output)
    server.auditor.idle()
    assert (server.audits.audited, server.audits.tokens, server.audits.mismatches) == (1, row, 1)
    assert server.closed == 1
    assert f"an audit of request r found token {row} to be {row + 4} where" in caplog.text


@pytest.mark.parametrize("looks", range(3))
def test_a_message_interrupts_between_two_forwards(server, looks):
    server.end()
    server.called_after = looks
    server.auditor.idle()
    assert (server.audits.audited, server.audits.waiting, server.audits.dropped) == (0, 1, 0)
    assert server.closed == (looks > 0)
    server.called_after = 99
    server.auditor.idle()
    assert (server.audits.audited, server.audits.tokens, server.audits.mismatches) == (1, 3, 0)


def test_older_weights_given_back_memory_and_too_little_of_it(server):
    server.end()
    server.scheduler.weight_updater.offload_tags.add("kv_cache")
    server.auditor.idle()
    assert (server.audits.waiting, server.closed) == (1, 0)
    server.scheduler.weight_updater.offload_tags.clear()
    server.fingerprint.generation = 3
    server.auditor.idle()
    assert (server.audits.waiting, server.audits.dropped, server.closed) == (0, 1, 0)
    server.fingerprint.generation = 2
    server.end(output=tuple(range(7)))  # 3 and 6 columns, and there is room for 8
    server.auditor.idle()
    assert (server.audits.audited, server.audits.dropped, server.closed) == (0, 2, 0)


def test_aborted_and_vanished_requests_and_health_checks_are_not_audited(server):
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    server.end(FINISH_ABORT("gone"))
    server.end(None)  # retracted, or it vanished
    server.end(rid="HEALTH_CHECK_7")
    assert server.audits.waiting == server.audits.dropped == 0


def test_a_replay_that_fails_is_closed(server, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(server.audits, "compared", fails)
    server.end()
    with pytest.raises(RuntimeError):
        server.auditor.idle()
    assert server.closed == 1


# The report


def test_the_bound_is_exact(server):
    report = server.module.report
    assert report(server.audits)["mismatch_bound"] == 1.0
    for _ in range(59):
        server.audits.compared(10, mismatch=False)
    found = report(server.audits)
    assert found["mismatch_bound"] == pytest.approx(1 - 0.05 ** (1 / 59))
    assert found["mismatch_bound"] < 0.05 < 1 - 0.05 ** (1 / 58)
    assert (found["audited"], found["tokens"], found["rate"]) == (59, 590, 1.0)
    server.audits.compared(1, mismatch=True)
    assert 1 / 60 < report(server.audits)["mismatch_bound"] < 0.08
