"""Audits: what is chosen, kept and dropped, how a replay gives way, and what is reported."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from margingate.config import GateConfig, GateError
from margingate.core.audit import MOST_STARTS, Audits, Recorded


def recorded(rid: str = "a", size: int = 3, generation: int = 0) -> Recorded:
    return Recorded(rid, array("q", range(size - 1)), array("q", [7]), generation=generation)


# The choice


@given(st.text(), st.floats(0, 1), st.integers(0, 1 << 30))
def test_the_choice_is_a_function_of_id_and_seed(rid, rate, seed):
    audits = Audits(rate, seed)
    first = audits.chooses(rid)
    audits.compared(9, mismatch=True)
    assert audits.chooses(rid) == first == Audits(rate, seed).chooses(rid)
    assert Audits(1.0, seed).chooses(rid) and not Audits(0.0, seed).chooses(rid)


@given(st.text(), st.integers(0, 1 << 30), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_rate_chooses_all_that_a_lower_one_does(rid, seed, one, other):
    low, high = sorted((one, other))
    assert Audits(low, seed).chooses(rid) <= Audits(high, seed).chooses(rid)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_the_rate_is_the_share_that_is_chosen(rate):
    chosen = sum(Audits(rate, 3).chooses(f"request-{i}") for i in range(20_000))
    assert chosen == pytest.approx(20_000 * rate, rel=0.15)


# The queue


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "take", "interrupt"]), st.integers(2, 60), st.integers(0, 1))
)


@given(STEPS, st.integers(1, 100))
def test_the_queue_is_bounded_and_nothing_is_lost_uncounted(steps, most):
    audits, added, running = Audits(1.0, most_tokens=most), 0, []
    for action, size, generation in steps:
        if action == "add":
            audits.add(recorded(f"{added}", size, generation))
            added += 1
        elif action == "take" and (taken := audits.take(generation)) is not None:
            assert taken.generation == generation
            running.append(taken)
        elif action == "interrupt" and running:
            audits.interrupted(running.pop())
        kept = sum(each.size for each in audits._waiting)
        assert audits._size == kept and (kept <= most or audits.waiting == 1)
        assert added == audits.waiting + audits.dropped + len(running)


def test_the_oldest_goes_first_and_is_dropped_first():
    audits = Audits(1.0, most_tokens=6)
    for rid in ("a", "b", "c"):
        audits.add(recorded(rid))
    assert (audits.waiting, audits.dropped) == (2, 1)
    assert audits.take(0) == recorded("b")


def test_a_replay_that_is_interrupted_again_and_again_is_given_up():
    audits = Audits(1.0)
    audits.add(recorded())
    starts = 0
    while (taken := audits.take(0)) is not None:
        starts += 1
        audits.interrupted(taken)
    assert (starts, audits.dropped, audits.audited) == (MOST_STARTS, 1, 0)


# One idle turn. The forwards are made up here; test_server_invariant.py runs them.


class Server:
    """An auditor, and the scheduler as it sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parts: list[list[int]]) -> None:
        from margingate.runtime import audit

        self.module = audit
        self.called_after = 99  # looks for messages that find none
        self.told: list[str] = []
        self.closed = 0
        socket = SimpleNamespace(poll=self._poll)
        self.scheduler = SimpleNamespace(
            server_args=SimpleNamespace(random_seed=5),
            ipc_channels=SimpleNamespace(recv_from_tokenizer=socket, recv_from_rpc=None),
            weight_updater=SimpleNamespace(offload_tags=set()),
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 4),
            tree_cache=SimpleNamespace(evictable_size=lambda: 4),
        )
        self.controller = SimpleNamespace(
            scheduler=self.scheduler,
            config=GateConfig(audit_rate=1.0),
            fingerprint=SimpleNamespace(generation=2),
            observers=(SimpleNamespace(audited=self.told.append),),
        )
        self.auditor = audit.Auditor(self.controller)  # type: ignore[arg-type]
        self.audits = self.auditor.audits

        def replay(_recorded: Recorded) -> Any:
            try:
                yield from parts
            finally:
                self.closed += 1

        monkeypatch.setattr(self.auditor, "_replay", replay)

    def _poll(self, _timeout: int, _flags: int) -> int:
        self.called_after -= 1
        return int(self.called_after < 0)

    def end(
        self, reason: Any = "stop", output: tuple[int, ...] = (5, 6, 7), rid: str = "r"
    ) -> None:
        gate = SimpleNamespace(draw=None, generation=2, penalties=None)
        ids = array("q", output)
        self.auditor.ended(
            SimpleNamespace(
                rid=rid,
                finished_reason=reason,
                output_ids_through_stop=ids,
                origin_input_ids=array("q", [1, 2, 3]),
                gate=gate,
                grammar=None,
                sampling_params=SimpleNamespace(logit_bias=None),
            )
        )
        ids[:] = array("q", [0] * len(ids))  # what is recorded is a copy


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
    server.controller.fingerprint.generation = 3
    server.auditor.idle()
    assert (server.audits.waiting, server.audits.dropped, server.closed) == (0, 1, 0)
    server.controller.fingerprint.generation = 2
    server.end(output=tuple(range(7)))  # 3 and 6 columns, and there is room for 8
    server.auditor.idle()
    assert (server.audits.audited, server.audits.dropped, server.closed) == (0, 2, 0)


def test_aborted_and_vanished_requests_and_health_checks_are_not_audited(server):
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    server.end(FINISH_ABORT("gone"))
    server.end(None)
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


def test_a_hidden_fault_is_emitted_and_not_flagged():
    from margingate.runtime.rows import inject_fault

    gate = SimpleNamespace(faults=frozenset({-2, 3}), injected_first=None)
    req = SimpleNamespace(gate=gate, output_ids=[4], req_pool_idx=0)
    output = SimpleNamespace(gate=SimpleNamespace(runner_up=[9], margin=[0.5]))
    for tokens, emitted, flagged in (([4], 9, False), ([4, 9], 9, True), ([4, 9, 9], 5, False)):
        req.output_ids = tokens
        result = SimpleNamespace(logits_output=output, next_token_ids=[5])
        relay = SimpleNamespace(output_tokens_buf=[5])
        assert inject_fault(relay, req, result, 0) is flagged
        assert result.next_token_ids == relay.output_tokens_buf == [emitted]
    assert not gate.faults


def test_a_fault_waits_where_nothing_was_chosen():
    """SGLang samples nothing for a batch whose prompts leave no room for a token."""
    from margingate.runtime.rows import inject_fault

    gate = SimpleNamespace(faults=frozenset({1}), injected_first=None)
    req = SimpleNamespace(gate=gate, output_ids=[], req_pool_idx=0)
    result = SimpleNamespace(logits_output=SimpleNamespace(), next_token_ids=[0])
    assert not inject_fault(None, req, result, 0) and result.next_token_ids == [0]


def test_any_request_id_is_chosen_or_not():
    audits = [Audits(0.5, seed) for seed in range(64)]
    assert 10 < sum(each.chooses("job-\ud800") for each in audits) < 54


@pytest.mark.parametrize("margin", [float("inf"), 1e30])  # greedy, and of seeded_top2
def test_a_fault_waits_where_a_grammar_leaves_one_token(margin):
    from margingate.runtime.rows import inject_fault

    gate = SimpleNamespace(faults=frozenset({1}), injected_first=None)
    req = SimpleNamespace(gate=gate, output_ids=[], req_pool_idx=0)
    best = SimpleNamespace(runner_up=[9], margin=[margin])
    result = SimpleNamespace(logits_output=SimpleNamespace(gate=best), next_token_ids=[5])
    assert not inject_fault(None, req, result, 0) and result.next_token_ids == [5]


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


# The option


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), True, None, [1]])
def test_a_rate_is_a_share(value):
    with pytest.raises(GateError, match=r"--gate-audit-rate is .*: give a number from 0 to 1"):
        GateConfig(audit_rate=value)


def test_where_nothing_is_gated_there_is_nothing_to_audit():
    assert GateConfig(policy="observe").audit_rate == 0
    with pytest.raises(GateError, match="observe gates none: drop one of the two"):
        GateConfig(policy="observe", audit_rate=0.5)


def test_several_ranks_are_refused():
    from margingate.runtime.refusals import refuse_audit

    refuse_audit(SimpleNamespace(tp_size=2), GateConfig())
    refuse_audit(SimpleNamespace(tp_size=1), GateConfig(audit_rate=1.0))
    with pytest.raises(GateError, match="but --tp-size is 2, and"):
        refuse_audit(SimpleNamespace(tp_size=2), GateConfig(audit_rate=1.0))
