"""Faults that a benchmark asks for, put into what the fast path chose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from sglang.srt.managers.schedule_batch import ReqKvInfo

from margingate.runtime.request.forward_record import record_on


def test_a_hidden_fault_is_emitted_and_not_flagged():
    from margingate.runtime.verify.rows import inject_fault

    gate = SimpleNamespace(faults=frozenset({-2, 3}), injected_first=None)
    req = SimpleNamespace(gate=gate, output_ids=[4], kv=ReqKvInfo(req_pool_idx=0))
    output = SimpleNamespace()
    record_on(output).best = cast(Any, SimpleNamespace(runner_up=[9], margin=[0.5]))
    for tokens, emitted, flagged in (([4], 9, False), ([4, 9], 9, True), ([4, 9, 9], 5, False)):
        req.output_ids = tokens
        result = SimpleNamespace(logits_output=output, next_token_ids=[5])
        relay = SimpleNamespace(output_tokens_buf=[5])
        assert inject_fault(relay, req, result, 0) is flagged
        assert result.next_token_ids == relay.output_tokens_buf == [emitted]
    assert not gate.faults


def test_a_fault_waits_where_nothing_was_chosen():
    """SGLang samples nothing for a batch whose prompts leave no room for a token."""
    from margingate.runtime.verify.rows import inject_fault

    gate = SimpleNamespace(faults=frozenset({1}), injected_first=None)
    req = SimpleNamespace(gate=gate, output_ids=[], kv=ReqKvInfo(req_pool_idx=0))
    result = SimpleNamespace(logits_output=SimpleNamespace(), next_token_ids=[0])
    assert not inject_fault(None, req, result, 0) and result.next_token_ids == [0]


@pytest.mark.parametrize("margin", [float("inf"), 1e30])  # greedy, and of seeded_top2
def test_a_fault_waits_where_a_grammar_leaves_one_token(margin):
    from margingate.runtime.verify.rows import inject_fault

    gate = SimpleNamespace(faults=frozenset({1}), injected_first=None)
    req = SimpleNamespace(gate=gate, output_ids=[], kv=ReqKvInfo(req_pool_idx=0))
    best = SimpleNamespace(runner_up=[9], margin=[margin])
    result = SimpleNamespace(logits_output=SimpleNamespace(), next_token_ids=[5])
    record_on(result.logits_output).best = cast(Any, best)
    assert not inject_fault(None, req, result, 0) and result.next_token_ids == [5]
