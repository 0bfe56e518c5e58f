"""Weights are not replaced under requests that wait, and a session of updates is one change."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput, UpdateWeightFromDiskReqInput
from sglang.srt.managers.scheduler_components import weight_updater

from margingate.runtime.hooks import handlers
from margingate.runtime.observe import fingerprint
from margingate.runtime.observe.fingerprint import STALE, UPDATING, Fingerprint


def scheduler(*, idle: bool = True, session: Any = None) -> Any:
    updater = SimpleNamespace(_session=session)
    return SimpleNamespace(is_fully_idle=lambda: idle, weight_updater=updater)


KINDS = [
    ("UpdateWeightFromDiskReq", {"model_path": "here"}),
    ("UpdateWeightsFromDistributedReq", {"names": [], "dtypes": [], "shapes": []}),
    ("UpdateWeightsFromTensorReq", {"serialized_named_tensors": []}),
    ("UpdateWeightsFromIPCReq", {"zmq_handles": {}}),
]


@pytest.mark.parametrize(("kind", "more"), KINDS)
@pytest.mark.parametrize(
    ("idle", "flush", "done"), [(False, True, False), (False, False, True), (True, True, True)]
)
def test_an_update_that_flushes_is_refused_while_requests_wait(kind, more, idle, flush, done):
    hashed: Any = SimpleNamespace(weights_changed=lambda **_: None)
    called = []

    def update(*_args):
        called.append(1)
        return SimpleNamespace(success=True, message="")

    received = getattr(io_struct, f"{kind}Input")(flush_cache=flush, **more)
    answer = fingerprint.weights_change(hashed, scheduler(idle=idle), update, None, received)
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
