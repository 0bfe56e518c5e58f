"""Weights are not replaced under requests that wait, and a session of updates is one change."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput, UpdateWeightFromDiskReqInput
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import weight_updater

from margingate.runtime.hooks import handlers
from margingate.runtime.observe import fingerprint
from margingate.runtime.observe.fingerprint import STALE, UPDATING, Fingerprint


def scheduler(*, waiting: int = 0, running: int = 0, paused: bool = False) -> Any:
    """As much of one as SGLang's own flush looks at; with requests that wait or run."""
    made: Any = SimpleNamespace(
        weight_updater=SimpleNamespace(_session=None),
        running_batch=SimpleNamespace(is_empty=lambda: not running),
        last_batch=None,
        chunked_req=None,
        enable_overlap=False,
        enable_hisparse=False,
        enable_hierarchical_cache=False,
        enable_lmcache=False,
        waiting_queue=[SimpleNamespace(kv=ReqKvInfo())] * waiting,
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        dllm_manager=SimpleNamespace(any_staging_reqs=lambda: False),
        disaggregation_mode=DisaggregationMode.NULL,
        _pp_microbatches_drained=lambda: True,
        _engine_paused=paused,
    )
    made.is_fully_idle = lambda **named: Scheduler.is_fully_idle(made, **named)
    return made


KINDS = [
    ("UpdateWeightFromDiskReq", {"model_path": "here"}),
    ("UpdateWeightsFromDistributedReq", {"names": [], "dtypes": [], "shapes": []}),
    ("UpdateWeightsFromTensorReq", {"serialized_named_tensors": []}),
    ("UpdateWeightsFromIPCReq", {"zmq_handles": {}}),
]


@pytest.mark.parametrize(("kind", "more"), KINDS)
@pytest.mark.parametrize(
    ("state", "flush", "done"),
    [
        ({}, True, True),
        ({"running": 1}, True, False),
        ({"running": 1}, False, True),
        ({"running": 1, "paused": True}, True, False),
        ({"waiting": 1}, True, False),
        ({"waiting": 1, "paused": True}, True, True),
    ],
)
def test_an_update_whose_flush_sglang_would_refuse_changes_nothing(kind, more, state, flush, done):
    """It would replace the weights first. Requests that a pause retracted hold no columns."""
    hashed: Any = SimpleNamespace(weights_changed=lambda **_: None)
    called = []

    def update(*_args):
        called.append(1)
        return SimpleNamespace(success=True, message="")

    received = getattr(io_struct, f"{kind}Input")(flush_cache=flush, **more)
    answer = fingerprint.weights_change(hashed, scheduler(**state), update, None, received)
    assert answer.success == done and bool(called) == done
    if not done:
        assert (
            isinstance(answer, getattr(io_struct, f"{kind}Output"))
            and "flush_cache" in answer.message
        )


@pytest.mark.parametrize("success", [True, False])
def test_a_flush_that_sglang_refuses_leaves_columns_of_the_old_weights(success):
    told: list[Any] = []
    hashed: Any = SimpleNamespace(weights_changed=lambda **named: told.append(named))
    received = UpdateWeightFromDiskReqInput(model_path="here", flush_cache=True)
    answer = SimpleNamespace(success=success, message="")
    fingerprint.weights_change(hashed, scheduler(), lambda *_: answer, None, received)
    assert told == [{"flushed": success, "updating": False}]


class Updater:
    """SGLang's own begin and end over no runners, with the gate's hooks around them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._session, self.tp_cpu_group = None, None
        self.digests = 0
        self.settled: list[int] = []
        monkeypatch.setattr(weight_updater.torch.distributed, "barrier", lambda group: None)
        gate = SimpleNamespace(
            scheduler=SimpleNamespace(weight_updater=self),
            fingerprint=Fingerprint({"a": 1}, self._digest, lambda: True),
            verify_everything=lambda: self.settled.append(gate.fingerprint.generation),
        )
        monkeypatch.setattr(handlers, "_controller", gate)
        self.fingerprint = gate.fingerprint

    def _digest(self) -> str:
        self.digests += 1
        return f"weights {self.digests}"

    def _select_runners(self, _selector: str) -> list[Any]:
        return []

    def begin(self) -> Any:
        sglangs = weight_updater.SchedulerWeightUpdaterManager.begin_weight_update
        return handlers.begin_weight_update(sglangs, self, BeginWeightUpdateReqInput())

    def end(self) -> Any:
        sglangs = weight_updater.SchedulerWeightUpdaterManager.end_weight_update
        return handlers.weights_change(sglangs, self, SimpleNamespace())


def test_weights_that_change_without_a_word_between_begin_and_end_are_noticed(monkeypatch):
    """Other processes may write them. What waits is settled first, and nothing is promised then."""
    updater = Updater(monkeypatch)
    before, first = updater.fingerprint.of(), updater.fingerprint.generation
    assert before["fingerprint"] and updater.digests == 1
    assert updater.begin().success and updater.settled == [first]
    within = updater.fingerprint.admit()
    assert updater.digests == 1 and within != first
    assert updater.fingerprint.of(within)["fingerprint_because"] == UPDATING
    assert updater.end().success
    assert updater.fingerprint.of()["fingerprint_because"] == STALE
    after = updater.fingerprint.admit()
    assert updater.digests == 2 and updater.fingerprint.of(after)["fingerprint"]
    assert updater.fingerprint.of() != before
    assert updater.fingerprint.of(within)["fingerprint"] is None, "it was served across the change"


def test_a_session_that_is_open_already_stays_open(monkeypatch):
    updater = Updater(monkeypatch)
    assert updater.begin().success and not updater.begin().success
    assert updater.fingerprint.of()["fingerprint_because"] == UPDATING
