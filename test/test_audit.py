"""Audits: what is chosen, kept and dropped, how a replay gives way, and what is reported."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import ReqKvInfo

from margingate.config import GateConfig, GateError
from margingate.core.audit import MOST_STARTS, Audits, Bits, Recorded, grid, pieces
from margingate.runtime.observe.replay import Part, Replay
from margingate.runtime.request.forward_record import record_on
from margingate.runtime.request.record import GateRequest
from margingate.runtime.verify.verifier import RowLogprobs, RowResult


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


# How the prompt of a replay is cut


@given(st.text(), st.integers(1, 3000), st.integers(1, 3000))
def test_the_pieces_are_the_prompt_and_no_forward_is_too_large(name, length, most):
    found = pieces(name, length, most)
    assert [piece.start for piece in found] == [0, *(piece.end for piece in found[:-1])]
    assert found[-1].end == length and (len(found) > 1 or length == 1)
    for piece in found:
        assert 1 <= piece.end - piece.start <= piece.end - piece.start + piece.others <= most
    assert found == pieces(name, length, most)


def test_the_pieces_are_the_same_in_each_process_and_others_for_each_request():
    found = [(p.start, p.end, p.others) for p in pieces("a", 300, 256)]
    assert found == [(0, 129, 91), (129, 212, 70), (212, 300, 63)]
    sizes = {pieces(f"request-{i}", 300, 256)[0].end for i in range(100)}
    assert len(sizes) > 60, "row counts hardly differ"


def test_the_grid_is_cut_where_the_gate_cuts():
    assert [(p.start, p.end, p.others) for p in grid(9, 4)] == [(0, 4, 0), (4, 8, 0), (8, 9, 0)]
    assert [(p.start, p.end) for p in grid(8, 4)] == [(0, 4), (4, 8)]


# Digests of columns

DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Pool:
    """A K/V pool of 2 layers, 16 slots and 2 heads of 4, with numbers in it."""

    start_layer, layer_num = 1, 2

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.buffers = [
            [torch.randn((16, 2, 4), generator=generator).to(dtype) for _ in "kv"] for _ in range(2)
        ]

    def get_kv_buffer(self, layer: int) -> list[torch.Tensor]:
        return self.buffers[layer - 1]


SPOTS = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 15), st.integers(0, 7))


@given(st.sampled_from(list(DTYPES)), SPOTS, st.integers(0, 15))
def test_each_bit_of_a_column_is_in_its_digest_and_in_no_other(dtype, spot, bit):
    from margingate.runtime.verify.column_bits import ColumnBits

    pool, slots = Pool(dtype), torch.arange(16)
    columns = ColumnBits(pool)
    before = columns.of(slots)
    layer, part, slot, element = spot
    raw = pool.buffers[layer][part].view(DTYPES[dtype]).view(16, 8)
    raw[slot, element] ^= (1 << bit) if bit < 15 or dtype is torch.float32 else -(1 << 15)
    assert (columns.of(slots) != before).nonzero().flatten().tolist() == [slot]


def test_what_is_swapped_shows_and_pieces_do_not(monkeypatch):
    from margingate.runtime.verify import column_bits

    pool, slots = Pool(), torch.tensor([5, 3, 9, 3])
    columns = column_bits.ColumnBits(pool)
    before = columns.of(slots)
    assert columns.width == 2 * 2 * 8 * 16
    assert before[1] == before[3] and len(set(before.tolist())) == 3
    monkeypatch.setattr(column_bits, "MOST_ELEMENTS", 1)
    assert columns.of(slots).equal(before)
    for one in pool.buffers:
        one.reverse()  # keys are values
    assert not columns.of(slots).eq(before).any()
    for one in pool.buffers:
        one.reverse()
    pool.buffers.reverse()  # a layer is another
    assert not columns.of(slots).eq(before).any()


# One idle turn. The forwards are made up here; test_server_invariant.py runs them.


class Server:
    """An auditor, and the scheduler as it sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parts: list[list[int]]) -> None:
        from margingate.runtime.observe import audit

        self.module = audit
        self.called_after = 99  # looks for messages that find none
        self.told: list[str] = []
        self.closed = 0
        socket = SimpleNamespace(poll=self._poll)
        self.pool = Pool()
        pages = torch.arange(32).view(4, 8) % 16
        self.scheduler: Any = SimpleNamespace(
            server_args=SimpleNamespace(random_seed=5),
            ipc_channels=SimpleNamespace(recv_from_tokenizer=socket, recv_from_rpc=None),
            weight_updater=SimpleNamespace(offload_tags=set(), _session=None),
            token_to_kv_pool_allocator=SimpleNamespace(
                available_size=lambda: 4, get_kvcache=lambda: self.pool
            ),
            req_to_token_pool=SimpleNamespace(req_to_token=pages),
            tree_cache=SimpleNamespace(evictable_size=lambda: 4),
        )
        self.canonical = 3  # rows
        self.fingerprint: Any = SimpleNamespace(generation=2)
        requests: Any = SimpleNamespace(
            observers=SimpleNamespace(audited=self.told.append),
            canonical_columns=lambda req: (
                len(req.origin_input_ids) + self.canonical - 1 if self.canonical else 0
            ),
        )
        config, checks = GateConfig(audit_rate=1.0, prefill_chunk=8), cast(Any, None)
        self.auditor = audit.Auditor(self.scheduler, config, checks, requests, self.fingerprint)
        self.audits = self.auditor.audits
        monkeypatch.setattr(audit, "Replay", self._made_up)
        self.parts = parts
        self.margins, self.logprobs = [0.25, 0.5, 0.75], [-1.0, -2.0, -3.0]
        self.columns = self.auditor._columns.of(pages[1, :5])  # the replay's

    def _made_up(self, _sched: Any, _checks: Any, _chunk: int, recorded: Any, _columns: Any) -> Any:
        known = 0 if recorded.columns is None else len(recorded.columns)
        return SimpleNamespace(parts=lambda: self._replay(known), rows_of=lambda: "2+1, 1")

    def _replay(self, known: int) -> Any:
        """The first part has the prompt's 3 columns, the last one those of the answer."""
        done, last = 0, len(self.parts) - 1
        try:
            for i, tokens in enumerate(self.parts):
                rows = []
                for token in tokens:
                    found = RowLogprobs(self.logprobs[done], None, None)
                    rows.append(RowResult(token, self.margins[done], found))
                    done += 1
                spans = {0: (0, 3), last: (3, 5)}
                first, end = spans.get(i, (0, 0))
                asked = first < min(end, known)
                yield Part(rows, first, self.columns[first : min(end, known)] if asked else None)
        finally:
            self.closed += 1

    def _poll(self, _timeout: int, _flags: int) -> int:
        self.called_after -= 1
        return int(self.called_after < 0)

    def end(
        self,
        reason: Any = "stop",
        output: tuple[int, ...] = (5, 6, 7),
        rid: str = "r",
        canonical: tuple[int, ...] = (1, 1, 1),
        **more: Any,
    ) -> None:
        gate = GateRequest("key", True)
        gate.begins(2, tokens=0)
        for margin, mark in zip((0.25, 0.5, 0.75), canonical, strict=True):
            gate.note_row(margin, flagged=False, canonical=bool(mark))
        gate.draw = more.pop("draw", None)
        ids = array("q", output)
        req = SimpleNamespace(
            rid=rid,
            finished_reason=reason,
            output_ids_through_stop=ids,
            origin_input_ids=array("q", [1, 2, 3]),
            gate=gate,
            grammar=None,
            sampling_params=SimpleNamespace(logit_bias=None),
            kv=ReqKvInfo(req_pool_idx=1),
            return_logprob=True,
            logprob=SimpleNamespace(output_token_logprobs_val=[-1.0, -2.0, -3.0]),
        )
        vars(req).update(more)
        self.auditor.freed(req)
        for layer in self.pool.buffers:
            for part in layer:
                part.zero_()  # whoever gets the slots writes to them
        req.kv.req_pool_idx = None
        self.auditor.ended(req)
        ids[:] = array("q", [0] * len(ids))  # what is recorded is a copy

    @property
    def found(self) -> tuple[int, ...]:
        """Requests, and those with a token, with bits alone, and with each kind that differ."""
        audits = self.audits
        return (audits.audited, audits.mismatches, audits.bit_mismatches, *audits.by_kind.values())


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


def test_any_request_id_is_chosen_or_not():
    audits = [Audits(0.5, seed) for seed in range(64)]
    assert 10 < sum(each.chooses("job-\ud800") for each in audits) < 54


@pytest.mark.parametrize("margin", [float("inf"), 1e30])  # greedy, and of seeded_top2
def test_a_fault_waits_where_a_grammar_leaves_one_token(margin):
    from margingate.runtime.verify.rows import inject_fault

    gate = SimpleNamespace(faults=frozenset({1}), injected_first=None)
    req = SimpleNamespace(gate=gate, output_ids=[], kv=ReqKvInfo(req_pool_idx=0))
    best = SimpleNamespace(runner_up=[9], margin=[margin])
    result = SimpleNamespace(logits_output=SimpleNamespace(), next_token_ids=[5])
    record_on(result.logits_output).best = cast(Any, best)
    assert not inject_fault(None, req, result, 0) and result.next_token_ids == [5]


# The forwards of a replay


class Forwards:
    """What a replay asks of the scheduler, written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
        from margingate.runtime.observe import replay

        self.prefills: list[list[tuple[str, int, int]]] = []
        self.released: list[str] = []
        self.verified: list[tuple[int, int]] = []
        self.asked: list[list[int]] = []
        verifier = SimpleNamespace(rows=2, choose=self._choose, run=self._run)
        self.scheduler: Any = SimpleNamespace(
            server_args=SimpleNamespace(chunked_prefill_size=-1, max_prefill_tokens=16),
            model_config=SimpleNamespace(vocab_size=50),
            req_to_token_pool=SimpleNamespace(
                available_size=lambda: 4, req_to_token=torch.arange(64).view(1, 64)
            ),
            token_to_kv_pool_allocator=SimpleNamespace(
                available_size=lambda: 60, get_kvcache=lambda: None
            ),
            tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        )
        prefill = SimpleNamespace(together=together)
        self.checks: Any = SimpleNamespace(verifier=verifier, prefill=prefill)
        monkeypatch.setattr(replay, "extend", self._extend)
        monkeypatch.setattr(replay, "internal_request", self._request)
        monkeypatch.setattr(replay, "release", lambda _, req: self.released.append(req.rid))
        monkeypatch.setattr(replay.rollback, "extend_columns", lambda *_: True)

    @staticmethod
    def _request(name: str, prompt: Any) -> Any:
        return SimpleNamespace(rid=name, kv=ReqKvInfo(req_pool_idx=0), prompt=list(prompt))

    def _extend(self, _scheduler: Any, parts: Any) -> torch.Tensor:
        self.prefills.append([(req.rid, start, end) for req, start, end in parts])
        assert all(end <= len(req.prompt) for req, _, end in parts)
        return torch.arange(len(parts)).view(-1, 1)

    def _choose(self, logits: torch.Tensor, rows: Any) -> list[RowResult]:
        assert logits.shape == (1, 1) and logits.item() == len(self.prefills[-1]) - 1
        return self._run(rows)

    def _run(self, rows: Any) -> list[RowResult]:
        self.verified += [(row.position, row.token) for row in rows]
        return [RowResult(7, 0.5, None) for _ in rows]

    def parts(self, prompt: int = 20, columns: Any = None) -> list[Part]:
        answer = Recorded("a", array("q", range(prompt)), array("q", [30, 31, 32, 33]))
        if columns is not None:
            answer = replace(answer, columns=columns)
        digests = SimpleNamespace(of=lambda slots: self.asked.append(slots.tolist()) or slots)
        return list(Replay(self.scheduler, self.checks, 8, answer, digests).parts())


def test_a_replay_prefills_in_other_row_counts_beside_others_and_frees_all(monkeypatch):
    forwards = Forwards(monkeypatch, together=True)
    found = forwards.parts(columns=torch.zeros(22, dtype=torch.int64))
    own = [parts[-1] for parts in forwards.prefills]
    planned = pieces("a", 20, 16)
    assert own == [("audit-a", piece.start, piece.end) for piece in planned]
    beside = [sum(end for _, _, end in parts[:-1]) for parts in forwards.prefills]
    assert beside == [piece.others for piece in planned] and any(beside)
    assert len(forwards.released) == 1 + sum(map(bool, beside))
    assert forwards.verified == [(19, 19), (20, 30), (21, 31), (22, 32)]
    assert [row.token for part in found for row in part.rows] == [7] * 4
    asked = [slot for slots in forwards.asked for slot in slots]
    assert asked == list(range(22)), "a column that was not promised was compared, or one was not"


def test_a_replay_keeps_to_the_grid_where_bits_depend_on_the_forward(monkeypatch):
    forwards = Forwards(monkeypatch, together=False)
    forwards.parts()
    assert forwards.prefills == [[("audit-a", s, e)] for s, e in ((0, 8), (8, 16), (16, 20))]
    assert not forwards.asked and forwards.released == ["audit-a"]


@pytest.mark.parametrize(("room", "requests"), [(24, 4), (26, 4), (60, 1)])
def test_company_takes_no_room_that_is_not_there(monkeypatch, room, requests):
    forwards = Forwards(monkeypatch, together=True)
    forwards.scheduler.token_to_kv_pool_allocator.available_size = lambda: room
    forwards.scheduler.req_to_token_pool.available_size = lambda: requests
    forwards.parts()
    most = min(max(room - 24, 0), 16 if requests > 1 else 0)
    beside = [end for parts in forwards.prefills for _, _, end in parts[:-1]]
    assert all(count <= most for count in beside) and bool(beside) == bool(most)


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
    from margingate.runtime.start.refusals import refuse_audit

    refuse_audit(SimpleNamespace(tp_size=2), GateConfig())
    refuse_audit(SimpleNamespace(tp_size=1), GateConfig(audit_rate=1.0))
    with pytest.raises(GateError, match="but --tp-size is 2, and"):
        refuse_audit(SimpleNamespace(tp_size=2), GateConfig(audit_rate=1.0))
