"""A stream's settled part is handed to SGLang; the whole output is copied only where it must be."""

from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest

from margingate.runtime.schedule.stream import SettledStream


@pytest.mark.parametrize(("settled", "copied"), [(4, False), (3, True)])
def test_an_output_that_is_settled_is_not_copied(settled, copied):
    ledger = SimpleNamespace(settled_length=lambda _key: settled, mark_sent=lambda *_: None)
    requests, nothing = cast(Any, SimpleNamespace(ledger=ledger)), cast(Any, None)
    sender = SettledStream(nothing, requests, nothing, nothing)
    tokens = array("q", [5, 6, 7, 8])
    req = SimpleNamespace(
        gate=SimpleNamespace(kept=None, key="a"),
        sampling_params=SimpleNamespace(stream_interval=None),
        send_token_offset=0,
        output_ids=tokens,
    )
    seen = []
    accumulator = SimpleNamespace(default_stream_interval=1)
    sender._send_settled(lambda _acc, req: seen.append(req.output_ids), accumulator, req)
    assert (seen[0] is not tokens) == copied and list(seen[0]) == [5, 6, 7, 8][:settled]
    assert req.output_ids is tokens and req.sampling_params.stream_interval is None


@pytest.mark.parametrize("finished", [True, False])
def test_after_a_failure_the_end_is_told_and_nothing_else(finished):
    told, closed = [], []
    requests = cast(Any, SimpleNamespace(close=closed.append))
    nothing = cast(Any, None)
    req = SimpleNamespace(finished=lambda: finished)
    sender = SettledStream(nothing, requests, nothing, nothing)
    sender.accept_failed(lambda _acc, req: told.append(req), None, req)
    assert told == closed == [req] * finished


def test_as_a_result_is_processed_only_ends_and_what_is_not_gated_may_be_sent():
    nothing = cast(Any, None)
    sender = SettledStream(nothing, nothing, nothing, nothing)
    gated, other = SimpleNamespace(gated=True), SimpleNamespace(gated=False)
    decoding = SimpleNamespace(gate=gated, finished_reason=None)
    ended = SimpleNamespace(gate=gated, finished_reason="length")
    free = SimpleNamespace(gate=other, finished_reason=None)
    early = SimpleNamespace(finished_reason=None)  # of before the gate was up
    reqs = [decoding, ended, free, early]
    assert sender.sendable(reqs) == reqs
    with sender.muted():
        assert sender.sendable(reqs) == [ended, free, early]
