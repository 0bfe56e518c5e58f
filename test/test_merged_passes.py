"""which passes share a decode step, and when their verdicts are entered."""

from __future__ import annotations

from time import monotonic as now
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, ReqKvInfo

from margingate.config import GateConfig
from margingate.core.ledger import Ledger
from margingate.runtime.hooks import handlers
from margingate.runtime.request import guard, lifecycle
from margingate.runtime.request.forward_record import MergedPass, record_of, record_on
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest, Hold
from margingate.runtime.verify import merged_passes, passes
from margingate.runtime.verify.merged_passes import PATIENCE, MergedPasses
from margingate.runtime.verify.passes import Passes
from margingate.runtime.verify.simulation import Simulator
from margingate.runtime.verify.verifier import RowInput, RowResult, Verifier
from margingate_kernels import Top2

V = 8
DECODE = SimpleNamespace(is_decode=lambda: True)
PREFILL = SimpleNamespace(is_decode=lambda: False)


def make_request(key: str, **changes: Any) -> SimpleNamespace:
    given = {"return_logprob": False, "output_ids": list(range(100, 130)), **changes}
    given.setdefault("origin_input_ids", [0] * 8)  # and IN_FLIGHT: a row sees at most 40 keys
    given.setdefault("grammar", None)
    given.setdefault("multimodal_inputs", None)
    given["sampling_params"] = SimpleNamespace(logit_bias=given.pop("bias", None))
    gate = GateRequest(key, True, draw=given.pop("draw", None))
    return SimpleNamespace(gate=gate, rid=key, **given)


class Server:
    """What merged passes look at; requests, ledger and queue are the real ones."""

    def __init__(self, delay: int = 2, *, serves: bool = True, backend: Any = None) -> None:
        self.requests = OpenRequests(GateConfig(rows=V, max_delay=delay))
        self.ledger, self.queue = self.requests.ledger, self.requests.queue
        verifier: Any = SimpleNamespace(rows=V, backend=backend or object())
        self.scheduler = SimpleNamespace(
            running_batch=SimpleNamespace(reqs=[]), tree_cache=None, last_batch=None
        )
        self.passes = Passes(
            self.scheduler,
            self.requests,
            verifier,
            simulator=Simulator(GateConfig()),
            in_flight=cast(Any, None),
            penalties=cast(Any, None),
        )
        self.merged = MergedPasses(
            self.scheduler, self.requests, self.passes, verifier, serves=serves
        )

    def expected(self, due: str | None) -> bool:
        """Whether a step will carry what is due, in a turn that begins with it."""
        self.merged.note_due(due)
        return self.merged.will_merge()

    def add(self, key: str, rows: int, flagged: int, **changes: Any) -> Any:
        """A decoding request with `rows` rows, the one at `flagged` flagged now."""
        req = make_request(key, **changes)
        self.requests.open(req)
        self.scheduler.running_batch.reqs.append(req)
        for row in range(1, rows + 1):
            self.ledger.emit(key, flagged=row == flagged, canonical=row == 1)
        self.queue.note(key, self.requests.step)
        return req

    def board(self, mode: Any = DECODE, rows: int | None = None) -> Any:
        count = len(self.scheduler.running_batch.reqs) if rows is None else rows
        return self.merged.take_rows(SimpleNamespace(forward_mode=mode, batch_size=count))


def best(tokens: list[int], margin: float = 1.0) -> Top2:
    ids, margins = torch.tensor(tokens), torch.full((len(tokens),), margin)
    return Top2(ids, ids + 1, margins, -margins)


def carrying(merged: MergedPass) -> Any:
    """A step's result that carries a pass."""
    result = SimpleNamespace(logits_output=SimpleNamespace())
    record_on(result.logits_output).merged = merged
    return result


def land(server: Server, boarded: Any, tokens: list[int]) -> None:
    rows, due = boarded
    server.merged.process_results(carrying(MergedPass(rows, due, now(), best(tokens))))


@pytest.fixture
def entered(monkeypatch) -> list[Any]:
    """What is entered, in place of entering it."""
    calls: list[Any] = []
    monkeypatch.setattr(
        Passes, "enter", lambda _self, rows, results, *_: calls.append((rows, results))
    )
    return calls


def test_a_due_pass_rides_in_the_next_decode_step_and_in_no_prefill():
    server = Server(delay=2)
    server.add("a", 6, 5)
    assert server.board() is None, "it may wait two steps"
    server.requests.step = 2
    assert server.expected("delay")
    assert server.board(PREFILL) is None
    rows, due = server.board()
    assert [row.index for row in rows] == [2, 3, 4, 5] and due == "delay"
    assert server.merged.count == 1
    assert server.board() is None, "its rows are in flight"


def test_a_step_carries_as_many_rows_as_it_leaves_room_for():
    server = Server(delay=1)
    for key in "abc":
        server.add(key, 9, 9)
    server.requests.step = 1
    rows, _ = server.board()
    assert len(rows) == V - 3 and {row.rid for row in rows} == {"a"}


@pytest.mark.parametrize(
    ("delay", "decoding", "changes"),
    [
        (0, 1, {}),
        (1, V // 2 + 1, {}),
        *((1, 1, {"return_logprob": True}), (1, 1, {"draw": object()})),
        *((1, 1, {"grammar": object()}), (1, 1, {"bias": {"5": 1.0}})),
    ],
)
def test_passes_that_go_alone(delay: int, decoding: int, changes: dict[str, Any]):
    server = Server(delay)
    server.add("a", 4, 3, **changes)
    running = server.scheduler.running_batch.reqs
    running += [make_request(f"other-{i}") for i in range(decoding - 1)]
    server.requests.step = 1
    assert server.board() is None and not server.expected("delay")


@pytest.mark.parametrize(("room", "taken"), [(10_000, 5), (320, 5), (240, 3), (239, 0), (120, 0)])
def test_with_the_gates_own_attention_a_step_has_room_for_so_many_keys(room: int, taken: int):
    own = SimpleNamespace(margingate=SimpleNamespace(room=room))
    server = Server(1, backend=own)
    for key in "abc":  # a step of theirs sees up to 120 keys
        server.add(key, 9, 9)
    server.requests.step = 1
    assert server.expected("delay") is bool(taken)
    rows, _ = server.board() or ((), None)
    assert len(rows) == taken


def test_servers_without_rides():
    server = Server(1, serves=False)
    server.add("a", 4, 3)
    server.requests.step = 1
    assert server.board() is None and not server.expected("delay")


def test_a_pass_does_not_wait_where_nothing_decodes_or_for_long():
    server = Server(1)
    req = server.add("a", 4, 3)
    server.requests.withhold(req, Hold(None, None, now()))
    assert not server.expected("draining")
    server.requests.unhold(req)
    assert server.expected("delay")
    server.requests.step = PATIENCE
    assert server.expected("delay")
    server.requests.step = PATIENCE + 1
    assert not server.expected("delay")
    assert not server.expected(None) and server.expected("delay")
    server.scheduler.running_batch.reqs.remove(req)
    assert not server.expected("delay")


def test_verdicts_that_agree_are_entered_at_once(entered):
    server = Server(1)
    server.add("a", 6, 4)
    server.requests.step = 1
    boarded = server.board()
    land(server, boarded, [101, 102, 103])
    assert not server.merged.waiting
    [(rows, results)] = entered
    assert rows == boarded[0] and [each.token for each in results] == [101, 102, 103]


def test_a_flip_waits_for_a_moment_with_nothing_in_flight(entered):
    server = Server(1)
    server.add("a", 6, 4)
    server.requests.step = 1
    land(server, server.board(), [101, 7, 103])
    assert not entered and len(server.merged.waiting) == 1
    server.add("b", 6, 4)
    server.requests.step = 2
    land(server, server.board(), [101, 102, 103])
    assert not entered, "the next ones wait behind it"
    server.merged.enter()
    assert len(entered) == 2 and not server.merged.waiting


@pytest.mark.parametrize("gone", ["retracted", "closed"])
def test_verdicts_on_rows_that_are_gone_take_nothing_back(gone: str, entered):
    server = Server(1)
    req = server.add("a", 6, 4)
    server.requests.step = 1
    boarded = server.board()
    if gone == "retracted":
        server.ledger.retract("a")
        req.output_ids = []
    else:
        server.requests.close(req)
    land(server, boarded, [1, 2, 3])
    assert len(entered) == 1


def test_tokens_of_replaced_weights_stand_whatever_a_pass_says(monkeypatch):
    """Sent or not, with their log-probs; the first token behind them is judged as ever."""
    taken: list[tuple[str, int]] = []
    monkeypatch.setattr(Passes, "_flip", lambda _s, _r, row, *_: taken.append(("flip", row)))
    monkeypatch.setattr(
        passes.rollback, "replace_logprobs", lambda _req, row, _: taken.append(("log-prob", row))
    )
    server = Server(1)
    req = server.add("a", 6, 5)  # rows 2 to 5 are computed
    req.output_ids, req.finished = list(range(100, 106)), lambda: False
    req.gate.margins.extend([1.0] * 6)
    req.gate.begins(0, tokens=0)
    req.gate.crosses(1, tokens=3)
    server.ledger.mark_sent("a", 2)
    rows = server.requests.next_batch()
    assert [row.index for row in rows] == [2, 3, 4, 5]
    results = [RowResult(token, 1.0, None) for token in (7, 7, 103, 7)]
    found = [server.passes.matches(*each) for each in zip(rows, results, strict=True)]
    assert found == [True, True, True, False]
    server.passes.enter(rows, results, now(), "full")
    assert taken == [("log-prob", 4), ("flip", 5)] and req.gate.counts.missed == 0


def test_a_result_without_a_pass_lands_nothing(entered):
    server = Server(1)
    server.merged.process_results(SimpleNamespace(logits_output=None))
    server.merged.process_results(SimpleNamespace(logits_output=SimpleNamespace()))
    assert not entered and not server.merged.waiting


def test_the_first_row_is_judged_by_the_prefill():
    rows = Ledger("exact", "span")
    rows.open("a")
    rows.emit("a", flagged=True)
    rows.emit("a", flagged=True)
    merged = MergedPass(rows.take("a", 2), "full", now(), best([9], 0.5))
    assert merged_passes.results_of(merged) == [None, RowResult(9, 0.5, None)]


def translator_of(table: torch.Tensor) -> Any:
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

    return KVIndexTranslator(
        req_to_token=table,
        token_to_kv_pool_allocator=None,
        token_to_kv_pool=None,
        page_size=1,
        device="cpu",
    )


@pytest.mark.parametrize("sections", [False, True])
def test_the_steps_rows_come_first_in_the_forward(sections):
    table = torch.arange(12).view(2, 6) + 50
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        attn_backend=None,
        device="cpu",
        kv_index_translator=translator_of(table),
        model_config=SimpleNamespace(model_is_mrope=sections),
    )
    beside = SimpleNamespace(
        batch_size=2,
        req_pool_indices=torch.tensor([7, 8]),
        positions=torch.tensor([3, 4]),
        input_ids=torch.tensor([30, 40]),
        out_cache_loc=torch.tensor([300, 400]),
        seq_lens_cpu=torch.tensor([4, 5]),
        mrope_positions=torch.tensor([[3, 4], [2, 4], [1, 4]]) if sections else None,
    )
    batch = Verifier(runner, 5).batch([RowInput(1, 2, 11), RowInput(1, 3, 12)], 5, beside)
    assert batch.batch_size == 5
    assert batch.req_pool_indices.tolist() == [7, 8, 1, 1, 0]
    assert batch.input_ids.tolist() == [30, 40, 11, 12, 0]
    assert batch.positions.tolist() == [3, 4, 2, 3, 0]
    wanted = [[3, 4, 2, 3, 0], [2, 4, 2, 3, 0], [1, 4, 2, 3, 0]] if sections else None
    found = batch.mrope_positions
    assert (None if found is None else found.tolist()) == wanted, "images have their own"
    assert batch.out_cache_loc.tolist() == [300, 400, 58, 59, 50]
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [4, 5, 3, 4, 1]
    assert batch.seq_lens_sum == 17 and batch.global_num_token_non_padded_cpu == 5
    plan = batch.kv_loc_plan
    assert plan.write_physical is batch.out_cache_loc and batch.out_cache_loc_is_physical


def test_a_forward_without_a_gate_is_sglangs_own():
    assert handlers.forward(lambda *given: given, "r", "batch", None) == ("r", "batch", None)


def grammar_fails_at(server: Server, key: str) -> Any:
    """A request in whose verify pass the grammar gives up."""
    req = server.add(key, 4, 3, grammar=object())
    req.gate.grammar_failed = True
    req.finished_reason = req.to_finish = None
    req.finished = lambda: req.finished_reason is not None
    req.update_finish_state = lambda _n: vars(req).update(finished_reason=req.to_finish)
    return req


def test_a_grammar_that_fails_in_a_pass_aborts_its_request_and_nothing_else(monkeypatch):
    """Whatever token a row without its mask says, it is no verdict."""
    freed: list[Any] = []
    monkeypatch.setattr(lifecycle, "end", lambda _requests, _tree, req: freed.append(req))
    server = Server(1)
    judged: list[str] = []
    monkeypatch.setattr(Passes, "_judge", lambda _self, row, _r: judged.append(row.rid))
    bad, good = grammar_fails_at(server, "bad"), server.add("good", 4, 3)
    good.finished = lambda: False
    server.requests.withhold(bad, Hold(None, None, now()))
    rows = server.requests.next_batch()
    assert {row.rid for row in rows} == {"bad", "good"}
    results = [RowResult(999, 1.0, None)] * len(rows)
    for row, result in zip(rows, results, strict=True):
        assert row.rid == "good" or not server.passes.matches(row, result)
    server.passes.enter(rows, results, now(), "full")
    assert isinstance(bad.finished_reason, FINISH_ABORT) and freed == [bad]
    assert set(judged) == {"good"} and not server.requests.held
    server.queue.note("good", 1)
    assert all(row.rid != "bad" for row in server.requests.next_batch())


def test_a_withheld_request_that_a_hook_failed_on_ends_before_the_next_batch(monkeypatch):
    """No finish check of SGLang's sees one that is in no batch."""
    monkeypatch.setattr(lifecycle, "release_columns", lambda _req, _tree, checkpoint: None)
    server = Server(1)
    bad, good = grammar_fails_at(server, "bad"), server.add("good", 4, 3)
    for req in (bad, good):
        req.time_stats = SimpleNamespace(set_completion_time=lambda: None)
        server.requests.withhold(req, Hold(None, None, now()))
    lifecycle.end_failed(server.requests, None)
    assert len(server.requests.held) == 2
    guard.end(bad, "a verdict", ValueError("ours"))
    lifecycle.end_failed(server.requests, None)
    assert "a verdict (ValueError: ours)" in bad.finished_reason.message
    assert server.requests.held == (good,) and server.requests.take_ended() == [bad]


@pytest.fixture
def two(entered) -> Server:
    """A server with two requests, each with rows to verify; `run` gives each row its position."""
    server = Server(0)
    for key in ("bad", "good"):
        changes = {"kv": ReqKvInfo(req_pool_idx=1), "to_finish": None}
        server.add(key, 4, 3, finished=lambda: False, **changes)
    server.scheduler.model_config = SimpleNamespace(vocab_size=10)
    server.passes._verifier.run = lambda rows: [RowResult(r.position, 1.0, None) for r in rows]
    return server


def test_a_request_whose_rows_cannot_be_made_ends_alone(two, entered, monkeypatch):
    made = passes.row_input

    def raising(req, *rest):
        if req.rid == "bad":
            raise RuntimeError("ours")
        return made(req, *rest)

    monkeypatch.setattr(passes, "row_input", raising)
    two.passes.run(two.requests.next_batch(), "full")
    ((rows, results),) = entered
    assert {row.rid for row in rows} == {"good"} and len(results) == len(rows)
    bad, good = two.requests["bad"], two.requests["good"]
    assert "a row to be verified" in bad.to_finish.message and good.to_finish is None
    assert two.requests.due(idle=True) is None, "rows that were taken are not wanted again"


def test_a_pass_that_raises_ends_the_request_that_is_the_cause(two, entered):
    bad, good = two.requests["bad"], two.requests["good"]
    bad.kv.req_pool_idx = 7
    run = two.passes._verifier.run

    def raising(rows):
        if any(row.pool_index == 7 for row in rows):
            raise RuntimeError("ours")
        return run(rows)

    two.passes._verifier.run = raising
    two.passes.run(two.requests.next_batch(), "full")
    ((rows, results),) = entered
    assert {row.rid for row in rows} == {"good"} and None not in results[1:]
    assert "a verify pass" in bad.to_finish.message and good.to_finish is None


def test_a_step_whose_pass_raises_runs_without_it(two):
    def raising(*_args, **_kwargs):
        raise RuntimeError("ours")

    two.passes._verifier.forward = raising
    two.queue.max_delay = 1
    two.requests.step = 1
    batch = SimpleNamespace(forward_mode=DECODE, batch_size=2)
    assert two.merged.forward(lambda *_: "logits", None, batch) == "logits"
    assert "a verify pass" in two.requests["bad"].to_finish.message


def test_rows_without_verdicts_are_wanted_again():
    """Those whose request is there, and was not taken back since; not of verdicts that wait."""
    server = Server()
    reqs = [server.add(key, 6, 3) for key in "abc"]
    server.requests.step = 2
    rows, due = server.board()
    assert {row.rid for row in rows} == set("abc")
    server.requests.close(reqs[1])
    server.ledger.retract("c")
    result = carrying(MergedPass(rows, due, now(), best([0] * len(rows))))
    server.merged.waiting.append((record_of(result).merged, []))
    server.merged.put_back(result)
    assert not server.ledger.wanted("a"), "their verdicts come"
    server.merged.waiting.clear()
    server.merged.put_back(result)
    assert list(server.ledger.wanted("a")) == [2, 3] and server.requests.due(idle=True)
    assert not server.ledger.wanted("c")
    server.merged.put_back(SimpleNamespace(logits_output=SimpleNamespace()))
