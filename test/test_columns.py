"""What is read and written of a request's columns, and how requests end and are taken back.

SGLang's own request, pools and functions, without a model.
"""

from __future__ import annotations

from array import array
from collections import deque
from http import HTTPStatus
from inspect import signature
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_TOKEN,
    Req,
    ScheduleBatch,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import batch_result_processor
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.weight_versions import WeightVersionEvent, compute_weight_version_spans

from margingate.config import GateConfig
from margingate.runtime.compat.kv import columns
from margingate.runtime.hooks import handlers
from margingate.runtime.observe import integrity
from margingate.runtime.request import guard, lifecycle
from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest, Hold
from margingate.runtime.schedule import controller
from margingate.runtime.verify import passes as passes_module
from margingate.runtime.verify import rollback
from margingate.runtime.verify.passes import Passes
from margingate.runtime.verify.retraction import Retractions
from margingate.runtime.verify.simulation import Simulator
from margingate.runtime.verify.verifier import RowResult

SLOTS, LONGEST = 40, 20
PROMPT = (11, 12, 13)


def make_request(key: str = "a", most: int = 4, **more: Any) -> Any:
    params = SamplingParams(temperature=0, max_new_tokens=most, stop_token_ids=[99])
    params.normalize(None)
    req = Req(key, "", array("q", PROMPT), params, **more)
    req.gate = GateRequest(key, True)
    return req


def test_each_function_changes_sglangs_record_and_adds_no_attribute():
    """A request of SGLang's takes any attribute: a name that it has no more would say nothing."""
    req = make_request()
    known = set(vars(req))
    assert not columns.holds(req)
    req.kv.req_pool_idx = 7
    assert columns.holds(req) and columns.row(req) == 7
    columns.set_columns(req, 5)
    assert columns.committed(req) == columns.allocated(req) == 5
    assert req.kv.kv_committed_len == req.kv.kv_allocated_len == 5
    req.kv.cache_protected_len = 2
    assert columns.protected(req) == 2
    columns.set_extend(req, 1, 3)
    assert columns.prefix(req) == 1 and req.extend_len == 2
    columns.park(req)
    assert columns.prefix(req) == req.extend_end == 1, "SGLang takes this for a parked chunk"
    assert set(vars(req)) == known


# -- ends by length under overlap: SGLang leaves such requests out of the next decode step


class World:
    """Pools, a relay and batches, where SGLang's functions and the gate's meet."""

    def __init__(self, *, overlap: bool = True) -> None:
        self.pool = ReqToTokenPool(4, LONGEST, "cpu", False)
        self.allocator = TokenToKVPoolAllocator(SLOTS, torch.bfloat16, "cpu", None, False)
        self.processed: list[Any] = []
        self.scheduler: Any = SimpleNamespace(
            req_to_token_pool=self.pool,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=None,
            enable_overlap=overlap,
            server_args=SimpleNamespace(tp_size=1),
            enable_skip_finishing_decode=overlap,
            result_queue=deque(),
            running_batch=ScheduleBatch(reqs=[]),
            last_batch=None,
            future_map=SimpleNamespace(output_tokens_buf=torch.zeros(5, dtype=torch.int64)),
            process_batch_result=self._process,
            batch_result_processor=SimpleNamespace(_maybe_update_reasoning_tokens=lambda *_: None),
        )
        self.in_flight = InFlight(self.scheduler)
        self.requests = OpenRequests(GateConfig(rows=8))
        self.passes = Passes(
            self.scheduler,
            self.requests,
            cast(Any, SimpleNamespace(rows=8)),
            simulator=Simulator(GateConfig()),
            in_flight=self.in_flight,
            penalties=cast(Any, None),
        )

    def decoding(self, tokens: int, flagged: int = 0, **more: Any) -> Any:
        """A request with so many tokens, whose row `flagged` is to be verified."""
        req = make_request(**more)
        self.pool.alloc([req])
        self._allocate(req, len(PROMPT))
        self.requests.open(req)
        for _ in range(tokens):
            self.emit(req, len(req.output_ids) + 1 == flagged)
        return req

    def emit(self, req: Any, flagged: bool = False) -> None:
        row = len(req.output_ids) + 1
        if row > 1:
            self._allocate(req, 1)
        self.requests.ledger.emit(req.gate.key, flagged=flagged, canonical=row == 1 and not flagged)
        req.gate.note_row(1.0, flagged=flagged, canonical=row == 1)
        req.output_ids.append(50 + row)

    def _allocate(self, req: Any, count: int) -> None:
        start = columns.allocated(req)
        slots = self.allocator.alloc(count)
        self.pool.write((columns.row(req), slice(start, start + count)), slots.to(torch.int32))
        columns.set_columns(req, start + count)

    def _process(self, batch: Any, _result: Any) -> None:
        self.processed.append(batch)
        for req in batch.reqs:
            self.emit(req)

    def batch(self, *reqs: Any) -> Any:
        batch = ScheduleBatch(reqs=list(reqs))
        for name in ("seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            setattr(batch, name, torch.tensor([columns.allocated(req) for req in reqs]))
        return batch

    def left_out(self, *reqs: Any) -> list[Any]:
        """Of these, what SGLang leaves out of the next decode step."""
        batch = ScheduleBatch(reqs=list(reqs))
        return Scheduler._reqs_finishing_inflight(self.scheduler, batch)


def test_a_request_with_one_token_left_decodes_on_where_its_result_came_early():
    """Its token is there already, so that SGLang would leave it out of its batch for ever."""
    world = World()
    req = world.decoding(2, most=4)
    world.scheduler.result_queue.append((world.batch(req), SimpleNamespace(copy_done=None)))
    assert world.left_out(req) == [], "two are left"
    world.in_flight.bring_in()
    assert len(req.output_ids) == 3 and len(world.processed) == 1
    assert world.left_out(req) == [], "one is left, and no step in flight computes it"
    assert len(world.scheduler.result_queue) == 1, "SGLang's loop takes it from there"
    batch, result = world.scheduler.result_queue.popleft()
    assert batch.reqs == [] and InFlight.is_processed(result)
    world.scheduler.result_queue.append((world.batch(req), SimpleNamespace(copy_done=None)))
    assert world.left_out(req) == [req], "its last token is on its way"


def test_a_flip_in_a_request_that_was_left_out_brings_it_back(monkeypatch):
    """It is in no batch: what was behind its row is freed, and it rejoins to decode on."""
    monkeypatch.setattr(passes_module.constraints, "follow", lambda *_, **__: None)
    world = World()
    req, other = world.decoding(3, most=4, flagged=2), make_request("b")
    world.scheduler.running_batch = world.scheduler.last_batch = world.batch(req)
    world.scheduler.result_queue.append((world.batch(req), SimpleNamespace(copy_done=None)))
    world.scheduler.running_batch.reqs = [other]  # as SGLang left it out
    world.in_flight.bring_in()
    with lifecycle.ends_withheld(world.requests, [req]):
        req.update_finish_state()
    assert world.requests.is_held(req) and not req.finished()
    assert isinstance(req.gate.hold.reason, FINISH_LENGTH)
    assert columns.allocated(req) == len(PROMPT) + 3, "no step was launched behind its last row"
    rows = world.requests.next_batch()
    results = [None if r.index == 1 else RowResult(70 + r.index, 1.0, None) for r in rows]
    world.passes.enter(rows, results, 0.0, "draining")
    assert list(req.output_ids) == [51, 72]
    assert world.requests.rejoining == (req,) and not world.requests.held
    assert columns.committed(req) == columns.allocated(req) == len(PROMPT) + 1
    assert world.allocator.available_size() == SLOTS - columns.allocated(req)
    assert world.scheduler.future_map.output_tokens_buf[columns.row(req)] == 72


def test_the_column_behind_another_end_is_freed():
    """After a stop token, a step that was launched with the request is behind it."""
    world = World()
    req = world.decoding(3)
    world._allocate(req, 1)
    rollback.drop_last_column(world.scheduler, req)
    assert columns.allocated(req) == len(PROMPT) + 2
    assert world.allocator.available_size() == SLOTS - columns.allocated(req)


def test_a_stop_token_in_the_last_place_ends_as_a_stop():
    world = World()
    req = world.decoding(3, most=4, flagged=2)
    world.emit(req)
    req.output_ids[-1] = 99
    with lifecycle.ends_withheld(world.requests, [req]):
        req.update_finish_state()
    assert isinstance(req.gate.hold.reason, FINISH_MATCHED_TOKEN) and req.gate.hold.length == 4


def test_a_finish_check_that_raises_ends_its_request_alone(monkeypatch):
    """And SGLang's own is in its place again, whatever SGLang does meanwhile."""
    world = World()
    bad, good = world.decoding(4, most=4, flagged=2), world.decoding(4, most=4, key="b", flagged=2)
    real = world.requests.withhold
    monkeypatch.setattr(
        *(world.requests, "withhold", lambda req, hold: 1 / 0 if req is bad else real(req, hold))
    )
    with pytest.raises(ValueError), lifecycle.ends_withheld(world.requests, [bad, good]):
        for req in (bad, good):
            req.update_finish_state(1)
        raise ValueError("of SGLang")
    assert bad.finished_reason.status_code == 500 and bad.finished_len == 0
    assert world.requests.is_held(good) and not world.requests.is_held(bad)
    assert not any("update_finish_state" in vars(req) for req in (bad, good))


def test_of_a_prompt_in_chunks_nothing_is_told_that_sglang_told():
    """An aborted one is finished, and the result of its last chunk comes after that was said."""
    half, whole = (SimpleNamespace(inflight_middle_chunks=count) for count in (1, 0))
    extend = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: True))
    assert controller._with_whole_prompts(extend, [half, whole]) == [whole]
    decode = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: False))
    assert controller._with_whole_prompts(decode, [whole]) == [whole]


@pytest.mark.parametrize("said", [None, FINISH_ABORT("too long", HTTPStatus.SERVICE_UNAVAILABLE)])
@pytest.mark.parametrize("place", ["held", "rejoining"])
def test_an_aborted_request_keeps_the_reason_that_sglang_gave(monkeypatch, said, place):
    """A timeout's status and sentence, where the last batch still has the request."""
    monkeypatch.setattr(lifecycle, "end", lambda *_: None)
    world = World()
    req = world.decoding(3)
    if place == "held":
        world.requests.withhold(req, Hold(FINISH_LENGTH(3), 3, 0.0))
    else:
        world.requests.mark_rejoining(req)
    req.to_finish = said
    lifecycle.abort(world.requests, None, lambda _: True)
    assert not world.requests.outside() and req.to_finish is None
    found = req.finished_reason
    assert isinstance(found, FINISH_ABORT)
    assert found is said or (said is None and found.status_code is None)


# -- retraction


def retractions(world: World) -> Retractions:
    nothing: Any = None
    holders = ColumnHolders(world.scheduler, world.requests, world.in_flight)
    return Retractions(
        world.scheduler,
        world.requests,
        world.passes,
        nothing,
        penalties=nothing,
        holders=holders,
    )


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_whether_a_retracted_request_can_go_on_is_passed_on(monkeypatch, resumable, known):
    """SGLang aborts one that cannot; nothing returned would abort each with HTTP 500."""
    monkeypatch.setattr("margingate.runtime.sampling.constraints.follow", lambda *_, **__: None)
    world = World()
    req = world.decoding(3)
    if not known:
        world.requests.close(req)
    gate = SimpleNamespace(retractions=retractions(world))
    for serving in (gate, None):
        monkeypatch.setattr(handlers, "_controller", serving)
        said = handlers.release_req(lambda req, offload_kv: resumable, req=req, offload_kv=True)
        assert said is resumable
    assert (req.gate.key in world.requests) is (known and resumable)
    assert (req.gate.kept is not None) is (known and resumable)


def no_memory(req: Any) -> None:
    req.to_finish = FINISH_ABORT("no memory", HTTPStatus.INTERNAL_SERVER_ERROR)


def failed(req: Any) -> None:
    guard.end(req, "a test", ValueError("made up"))


def grammar_failed(req: Any) -> None:
    req.to_finish = FINISH_ABORT("no", HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


@pytest.mark.parametrize(
    ("happened", "stays"), [(no_memory, False), (failed, True), (grammar_failed, True)]
)
def test_of_those_about_to_end_sglang_forgets_only_the_one_without_memory(
    monkeypatch, happened, stays
):
    """The others are prefilled again before they end; nothing of them is told meanwhile."""
    monkeypatch.setattr("margingate.runtime.sampling.constraints.follow", lambda *_, **__: None)
    world = World()
    req = world.decoding(3)
    happened(req)
    assert retractions(world).release(lambda req: True, req)
    assert (req.gate.key in world.requests) is stays
    assert len(req.output_ids) == (0 if stays else 3)


@pytest.mark.parametrize(("flagged", "kept"), [(1, 0), (2, 1), (0, 3)])
def test_log_probs_of_tokens_that_a_retraction_forgets_go_with_them(monkeypatch, flagged, kept):
    """Of all of them too: what the next prefill appends is the first of the list."""
    monkeypatch.setattr("margingate.runtime.sampling.constraints.follow", lambda *_, **__: None)
    world = World()
    req = world.decoding(3, flagged=flagged, return_logprob=True)
    req.logprob.output_token_logprobs_val[:] = [-1.0, -2.0, -3.0]
    req.logprob.output_token_logprobs_idx[:] = [51, 52, 53]
    assert retractions(world).release(lambda req: True, req)
    assert list(req.output_ids) == req.logprob.output_token_logprobs_val == []
    assert req.logprob.output_token_logprobs_idx == []
    assert (req.gate.kept is None) is (kept == 0)
    if kept:
        assert req.gate.kept.logprobs["output_token_logprobs_val"] == [-1.0, -2.0, -3.0][:kept]


@pytest.mark.parametrize(("flagged", "kept"), [(1, 0), (2, 1), (0, 3)])
def test_tokens_that_a_retraction_forgets_are_of_no_weights(monkeypatch, flagged, kept):
    """What comes in their place is of those in memory, in the record and in SGLang's spans."""
    monkeypatch.setattr("margingate.runtime.sampling.constraints.follow", lambda *_, **__: None)
    world = World()
    req = world.decoding(3, flagged=flagged)
    req.gate.begins(0, 0)
    req.gate.crosses(1, 3)
    req.weight_version_events.append(WeightVersionEvent("one", 3))
    assert retractions(world).release(lambda req: True, req)
    spans = compute_weight_version_spans(req.weight_version_events, "two", 4)
    found = [(span.version, span.start, span.end) for span in spans]
    assert found == ([("one", 0, kept)] if kept else []) + [("two", kept, 4)]
    req.gate.begins(1, kept)
    assert req.gate.generations(max(kept, 1)) == ([0] if kept else [1])
    assert req.gate.generations(kept + 1) == ([0, 1] if kept else [1])


def test_all_agrees_while_a_prompt_is_computed_again_of_whose_answer_nothing_stands(monkeypatch):
    """It is open, has no token, and some columns of its prompt."""
    monkeypatch.setattr("margingate.runtime.sampling.constraints.follow", lambda *_, **__: None)
    world = World(overlap=False)
    req = world.decoding(3, flagged=1)
    assert retractions(world).release(lambda req: True, req)
    columns.set_columns(req, len(PROMPT) - 2)
    with pytest.raises(AssertionError, match="holds"):  # of one that was never retracted
        integrity._check_request(world.requests, world.in_flight, req)
    req.retraction_count = 1  # SGLang counts
    integrity._check_request(world.requests, world.in_flight, req)


@pytest.mark.parametrize("other", ["running", "in chunks", ""])
@pytest.mark.parametrize("split", [True, False])
def test_kept_tokens_that_find_no_room_wait_for_others_and_fail_behind_none(
    monkeypatch, other, split
):
    monkeypatch.setattr("margingate.runtime.compat.kv.window_pool.is_split", lambda _: split)
    monkeypatch.setattr("margingate.runtime.sampling.constraints.follow", lambda *_, **__: None)
    monkeypatch.setattr(rollback, "extend_columns", lambda *_: False)
    world = World(overlap=False)
    req = world.decoding(3)
    again = retractions(world)
    assert again.release(lambda req: True, req)
    allocator = world.scheduler.token_to_kv_pool_allocator
    monkeypatch.setattr(allocator, "get_kvcache", lambda: None, raising=False)
    if other == "running":
        world.scheduler.running_batch.reqs.append(world.decoding(1, key="b"))
    monkeypatch.setattr(world.scheduler, "chunked_req", None, raising=False)
    if other == "in chunks":  # without a token it is not open
        half = SimpleNamespace(kv=SimpleNamespace(holds_kv=True))
        monkeypatch.setattr(world.scheduler, "chunked_req", half)
    waits: list[Any] = []
    monkeypatch.setattr(again, "_retract_again", lambda *given: waits.append(given))
    batch = SimpleNamespace(reqs=[req])
    if other:
        assert not again._restore_one(batch, req) and waits == [(batch, req)]
        return
    way_out = "--swa-full-tokens-ratio" if split else "--mem-fraction-static"
    with pytest.raises(RuntimeError, match=f"the 3 tokens .* raise {way_out}"):
        again._restore_one(batch, req)


def test_a_request_that_finds_no_room_is_released_as_sglang_asks():
    """The third place of `release_req` was another parameter once."""
    world = World()
    given: list[Any] = []
    req = make_request()
    batch = SimpleNamespace(reqs=[req, make_request("b")])
    batch.release_req = lambda *args: given.append(args)
    batch.filter_batch = lambda **named: given.append(named["keep_indices"])
    world.scheduler._add_request_to_queue = lambda req, is_retracted: given.append(is_retracted)
    retractions(world)._retract_again(batch, req)
    assert given == [(0, 1), [1], True]
    bound = signature(ScheduleBatch.release_req).bind(None, *given[0])
    assert bound.arguments == {"self": None, "idx": 0, "remaing_req_count": 1}


# -- what SGLang counts of an output, after tokens were taken back


def counts(req: Any) -> tuple[int, bool]:
    return req.reasoning_tokens, req._is_reasoning_over


@pytest.mark.parametrize("require", [True, False], ids=["asked for", "opened by the model"])
@pytest.mark.parametrize("own_end", [None, [7, 8]])
@pytest.mark.parametrize("kept", [1, 3, 5, 6])
def test_reasoning_is_counted_again_as_sglang_counts_it(monkeypatch, require, own_end, kept):
    monkeypatch.setattr(
        batch_result_processor,
        "get_request_reasoning_end_token_ids",
        lambda _params, allowed_sequences: own_end,
    )
    processor = SimpleNamespace(
        model_config=SimpleNamespace(think_end_ids=[5, 6], self_opened_think_start_ids=[1])
    )
    count = batch_result_processor.SchedulerBatchResultProcessor._maybe_update_reasoning_tokens
    processor._maybe_update_reasoning_tokens = lambda *given: count(processor, *given)
    scheduler = SimpleNamespace(batch_result_processor=processor)
    again, fresh = (make_request(require_reasoning=require) for _ in range(2))
    for token in (1, 2, 5, 6, 7, 8, 3):
        again.output_ids.append(token)
        processor._maybe_update_reasoning_tokens(again, token)
    again.output_ids = array("q", [*again.output_ids[: kept - 1], 6])
    rollback.recount_reasoning(scheduler, again)
    for token in again.output_ids:
        processor._maybe_update_reasoning_tokens(fresh, token)
    assert counts(again) == counts(fresh)
    for token in (8, 6, 4):  # a match that began before goes on
        for req in (again, fresh):
            processor._maybe_update_reasoning_tokens(req, token)
        assert counts(again) == counts(fresh)


def test_versions_of_weights_are_forgotten_with_the_tokens_they_gave():
    world = World()
    req = world.decoding(3)
    req.weight_version_events = [WeightVersionEvent("1", 1), WeightVersionEvent("2", 3)]
    rollback.to_row(world.scheduler, (), req, 2, RowResult(9, 1.0, None))
    req.output_ids.append(9)
    spans = compute_weight_version_spans(req.weight_version_events, "3", len(req.output_ids))
    assert [(span.version, span.start, span.end) for span in spans] == [("1", 0, 1), ("3", 1, 3)]
