"""The experts of each K/V column: entered by whoever wrote it last, read as its request ends."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.state_capturer import routed_experts as of_sglang
from sglang.srt.state_capturer.base import BaseDeviceCache, BaseTopkCapturer

from margingate.config import GateConfig
from margingate.runtime.compat.kv import routed_experts
from margingate.runtime.request import admission, lifecycle
from margingate.runtime.request.forward_record import ForwardRecord, MergedPass, record_on
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest
from margingate.runtime.schedule.stream import SettledStream
from margingate.runtime.verify.merged_passes import MergedPasses
from margingate.runtime.verify.verifier import RowInput, Verifier
from margingate_kernels import Top2

SLOTS, ROWS, LAYERS, CHOSEN = 12, 6, 3, 2
PAGES = torch.tensor([[0] * 8, [7, 5, 9, 2, 4, 0, 0, 0]])  # the second request has 5 columns
TREE = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=PAGES))


@pytest.fixture
def capturer() -> Iterator[Any]:
    """SGLang's, in place; a row of the device's buffer holds its own number."""
    made = object.__new__(BaseTopkCapturer)
    made.topk_size = CHOSEN
    numbers = torch.arange(1, ROWS + 1, dtype=torch.int32)[:, None, None]
    shared = numbers.expand(ROWS, LAYERS, CHOSEN + 1).clone()  # and a shared expert behind them
    made.device_cache = SimpleNamespace(buffer=shared)
    made.host_cache = SimpleNamespace(buffer=torch.zeros(SLOTS, LAYERS, CHOSEN, dtype=torch.int32))
    of_sglang.set_global_experts_capturer(cast(Any, made))
    yield made
    of_sglang.set_global_experts_capturer(None)


def held(capturer: Any) -> dict[int, int]:
    """What each slot has, where it has anything; all layers and places have the same."""
    rows = capturer.host_cache.buffer.flatten(1)
    assert torch.equal(rows.amin(1), rows.amax(1))
    return {slot: int(value) for slot, value in enumerate(rows[:, 0]) if value}


def request(**changes: Any) -> Any:
    """Of three tokens and an answer of three, whose columns are in PAGES[1]."""
    values = {
        "return_routed_experts": True,
        "routed_experts_start_len": 0,
        "routed_experts": None,
        "origin_input_ids": array("q", [1, 2, 3]),
        "output_ids_through_stop": array("q", [4, 5, 6]),
        "kv": SimpleNamespace(holds_kv=True, req_pool_idx=1),
        "finished_reason": FINISH_LENGTH(3),
        "gate": GateRequest("a", True),
    }
    return SimpleNamespace(**(values | changes))


def test_rows_of_a_forward_are_entered_behind_its_first_ones(capturer):
    chosen = routed_experts.of_last_forward(torch.tensor([9, 2]), 3)
    capturer.device_cache.buffer.zero_()  # the next forward runs before they are entered
    assert held(capturer) == {}
    assert [len(each) for each in chosen.to_cpu()] == [2, 2]
    chosen.store()
    assert held(capturer) == {9: 4, 2: 5}


def test_they_are_what_sglangs_routers_chose(capturer):
    """And a probe's rows, more than SGLang has room for, leave nothing."""
    capturer.device_cache = BaseDeviceCache(ROWS, LAYERS, CHOSEN, "cpu", "experts")
    with get_context().override_server_args(), get_parallel().override(tp_rank=0, tp_size=1):
        router = TopK(CHOSEN, layer_id=2)
        chosen = router(torch.zeros(ROWS, 4), torch.randn(ROWS, 8)).topk_ids
        with routed_experts.unrecorded():
            router(torch.zeros(16, 4), torch.randn(16, 8))
    routed_experts.of_last_forward(torch.tensor([3, 8]), 1).store()
    kept = capturer.host_cache.buffer
    assert torch.equal(kept[[3, 8], 2], chosen[1:3].int())
    assert not kept[:, :2].any()


def test_the_later_forward_of_a_slot_stands(capturer):
    first, second = (routed_experts.of_last_forward(torch.tensor([7]), row) for row in (0, 4))
    first.store()
    second.store()
    assert held(capturer) == {7: 5}


def test_nothing_is_recorded_meanwhile(capturer):
    with pytest.raises(ZeroDivisionError), routed_experts.unrecorded():
        assert not routed_experts.are_kept()
        _ = 1 // 0
    assert routed_experts.are_kept()


def test_a_pass_enters_what_it_chose_for_the_slots_that_it_wrote(capturer, monkeypatch):
    verifier = object.__new__(Verifier)
    verifier.rows, verifier.device, verifier._pins, verifier._page_table = 4, "cpu", False, PAGES
    rows = [RowInput(1, position, 50) for position in (1, 2, 3)]
    monkeypatch.setattr(Verifier, "that_fit", lambda _self, rows: iter((rows[:2], rows[2:])))
    monkeypatch.setattr("margingate.runtime.verify.verifier.decode_batch", lambda *_: None)
    verifier.runner, verifier._attends_row_by_row = None, False
    uploads: list[int] = []
    upload = Verifier._on_device

    def on_device(self: Verifier, rows: Any) -> Any:
        uploads.append(len(rows))
        return upload(self, rows)

    def forward(self: Verifier, rows: Any, count: int) -> torch.Tensor:
        self.batch(rows, count)
        return torch.zeros(len(rows), 5)

    monkeypatch.setattr(Verifier, "_on_device", on_device)
    monkeypatch.setattr(Verifier, "forward", forward)
    verifier.run(rows)
    assert held(capturer) == {5: 1, 9: 2, 2: 1}
    assert uploads == [4, 4], "each forward's rows, with its padding, once"


def test_a_pass_of_a_server_that_keeps_none_looks_at_none(monkeypatch):
    verifier = object.__new__(Verifier)
    monkeypatch.setattr(Verifier, "_on_device", pytest.fail)
    assert verifier.experts_of([RowInput(0, 1, 2)]) is None


@pytest.mark.parametrize("agrees", [True, False])
def test_a_step_enters_those_of_the_pass_that_it_carried_whatever_the_verdict(capturer, agrees):
    passes: Any = SimpleNamespace(matches=lambda *_: agrees, enter=lambda *_: None)
    merged = MergedPasses(cast(Any, None), cast(Any, None), passes, cast(Any, None), serves=True)
    one = torch.ones(1)
    chosen = routed_experts.of_last_forward(torch.tensor([2]), 1)
    result = SimpleNamespace(logits_output=SimpleNamespace())
    row: Any = SimpleNamespace(index=2, rid="a")
    carried = MergedPass((row,), "delay", 0.0, Top2(one, one, one, one), chosen)
    record_on(result.logits_output).merged = carried
    merged.process_results(result)
    assert held(capturer) == {2: 2}
    assert bool(merged.waiting) != agrees


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU")
def test_experts_come_to_the_cpu_with_the_margins(capturer):
    one = torch.ones(1, device="cuda")
    chosen = routed_experts.of_last_forward(torch.tensor([2]), 1)
    record = ForwardRecord(merged=MergedPass((), "delay", 0.0, Top2(one, one, one, one), chosen))
    record.to_cpu()
    assert len(record.copied) == 3


def test_a_request_has_the_experts_of_its_columns_as_it_ends(capturer):
    capturer.host_cache.buffer += torch.arange(SLOTS, dtype=torch.int32)[:, None, None]
    req = request()
    routed_experts.keep(req, TREE)
    assert req.routed_experts[:, 0, 0].tolist() == [7, 5, 9, 2, 4]
    req.routed_experts_start_len = 3
    routed_experts.keep(req, TREE)
    assert req.routed_experts[:, 0, 0].tolist() == [2, 4]


@pytest.mark.parametrize(
    "changes",
    [{"return_routed_experts": False}, {"kv": SimpleNamespace(holds_kv=False)}],
    ids=["wants none", "has no columns"],
)
def test_a_request_without_has_none(capturer, changes):
    req = request(**changes)
    routed_experts.keep(req, TREE)
    assert req.routed_experts is None


def test_columns_are_freed_after_they_were_read_and_whatever_is_raised(capturer, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(routed_experts, "keep", lambda *_: calls.append("read"))
    monkeypatch.setattr(lifecycle, "release_columns", lambda *_a, **_k: calls.append("freed"))
    requests: Any = SimpleNamespace(mark_ended=lambda _req: None)
    req = request(time_stats=SimpleNamespace(set_completion_time=lambda: None))
    req.multimodal_inputs = None
    lifecycle.end(requests, TREE, req)
    monkeypatch.setattr(routed_experts, "keep", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        lifecycle.end(requests, TREE, req)
    assert calls == ["read", "freed", "freed"]


def rows(count: int) -> torch.Tensor:
    return torch.zeros(count, LAYERS, CHOSEN)


def test_an_abort_cuts_them_to_the_tokens_that_are_sent(capturer):
    req = request(finished_reason=FINISH_ABORT(), routed_experts=rows(9))
    routed_experts.fit(req)
    assert len(req.routed_experts) == 5
    req.output_ids_through_stop = []
    routed_experts.fit(req)
    assert len(req.routed_experts) == 2
    req.routed_experts = None
    routed_experts.fit(req)
    assert req.routed_experts is None


@pytest.mark.parametrize("found", [None, rows(4), rows(6)], ids=["none", "fewer", "more"])
def test_other_rows_than_tokens_are_not_sent(capturer, found):
    with pytest.raises(RuntimeError, match=r"experts of \d tokens, and 5 were to be sent"):
        routed_experts.fit(request(routed_experts=found))


def test_the_end_of_a_gated_request_is_looked_at(capturer):
    nothing = cast(Any, None)
    fingerprint: Any = SimpleNamespace(of=lambda _seen: {})
    requests = OpenRequests(GateConfig(rows=4))
    stream = SettledStream(GateConfig(rows=4), requests, nothing, fingerprint)
    more = {"output_ids": [4, 5, 6], "return_logprob": False, "finished": lambda: True}
    more |= {"finished_reason": FINISH_LENGTH(3), "finished_output": False, "send_token_offset": 0}
    sent: list[Any] = []
    good, bad = request(routed_experts=rows(5), **more), request(**more)
    stream.send(lambda _streamer, reqs, *_: sent.extend(reqs), nothing, [bad, good], False, None)
    assert sent == [bad, good] and isinstance(good.finished_reason, FINISH_LENGTH)
    assert bad.finished_reason.status_code == 500 and bad.finished_len == 0, "and no token of it"


def test_who_wants_them_of_a_server_that_keeps_none_is_told_so(capturer):
    req = request()
    assert admission.without_experts(req) == ""
    with routed_experts.unrecorded():
        said = admission.without_experts(req)
        assert "keeps no experts: start it with --enable-return-routed-experts" in said
        assert admission.without_experts(request(return_routed_experts=False)) == ""
        assert admission.without_experts(request(gate=GateRequest("a", False))) == ""
