"""An abort names one request; SGLang's own function, over queues that are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from sglang.srt.managers.schedule_batch import ReqKvInfo


class Req(SimpleNamespace):
    """What SGLang's abort looks at."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, rid: str) -> None:
        super().__init__(rid=rid, to_finish=None, grammar=None, kv=ReqKvInfo())
        self.weight_version_events: list[Any] = []
        self.output_ids: list[int] = []

    def finished(self) -> bool:
        return False

    def set_finish_with_abort(self, sentence: str) -> None:
        self.to_finish = sentence


@pytest.mark.parametrize(
    ("rid", "abort_all", "ended"),
    [
        ("job-1", False, {"job-1"}),
        ("job", False, set()),
        ("", True, {"job-1", "job-10", "job-11", "job-2"}),
    ],
)
@pytest.mark.parametrize("place", ["running", "waiting", "grammar", "chunked", "held"])
def test_an_abort_ends_the_request_of_that_id(monkeypatch, place, rid, abort_all, ended):
    from sglang.srt.constrained.grammar_manager import GrammarManager
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.managers import scheduler as scheduler_module
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.scheduler import Scheduler

    from margingate.runtime.request import aborts, lifecycle

    reqs = [Req(name) for name in ("job-1", "job-10", "job-11", "job-2")]
    there = {place: reqs}
    gone: set[str] = set()
    grammar = GrammarManager.__new__(GrammarManager)
    grammar.grammar_queue = there.get("grammar", [])
    published = SimpleNamespace(weight_version="1", pp_size=1)

    def send(message: Any, _req: Any) -> None:
        gone.add(message.rid)

    for name in ("get_serving", "get_parallel"):
        monkeypatch.setattr(scheduler_module, name, lambda: published)
    scheduler: Any = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=there.get("running", [])),
        last_batch=None,
        waiting_queue=list(there.get("waiting", [])),
        grammar_manager=grammar,
        chunked_req=reqs[1] if place == "chunked" else None,
        _pending_chunked_abort_req=None,
        mm_receiver=None,
        dllm_config=None,
        disaggregation_mode=DisaggregationMode.NULL,
        tree_cache=None,
        enable_continuous_input_polling=False,
        beam_coordinator=SimpleNamespace(retire_group=lambda _req: None),
        send_abort_output=send,
        ipc_channels=SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=send)),
        _release_aborted_request=lambda _req: None,
    )
    for name in ("collect_inflight_reqs", "_collect_inflight_batches"):
        setattr(scheduler, name, getattr(Scheduler, name).__get__(scheduler))

    def abort(_requests: Any, _tree: Any, wanted: Any) -> None:
        gone.update(req.rid for req in there.get("held", []) if wanted(req))

    monkeypatch.setattr(lifecycle, "abort", abort)
    asked = AbortReq(rid=rid, abort_all=abort_all)
    aborts.abort_request(cast(Any, None), Scheduler.abort_request, scheduler, asked)
    assert [req.rid for req in reqs] == ["job-1", "job-10", "job-11", "job-2"]
    gone |= {req.rid for req in reqs if req.to_finish}
    if place == "chunked":
        assert (scheduler._pending_chunked_abort_req is not None) is abort_all
    else:
        assert gone == ended
