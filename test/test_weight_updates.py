"""Weights are not replaced where the flush that follows would end the scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import io_struct

from margingate.runtime.observe import fingerprint

KINDS = [
    ("UpdateWeightFromDiskReqInput", "UpdateWeightFromDiskReqOutput"),
    ("UpdateWeightsFromDistributedReqInput", "UpdateWeightsFromDistributedReqOutput"),
    ("UpdateWeightsFromTensorReqInput", "UpdateWeightsFromTensorReqOutput"),
    ("UpdateWeightsFromIPCReqInput", "UpdateWeightsFromIPCReqOutput"),
]


@pytest.mark.parametrize(("asked", "answered"), KINDS)
@pytest.mark.parametrize(
    ("idle", "flush", "done"), [(False, True, False), (False, False, True), (True, True, True)]
)
def test_an_update_that_flushes_is_refused_while_requests_wait(asked, answered, idle, flush, done):
    scheduler = SimpleNamespace(is_fully_idle=lambda: idle)
    hashed: Any = SimpleNamespace(weights_changed=lambda **_: None)
    called = []

    def update(*_args):
        called.append(1)
        return SimpleNamespace(success=True, message="")

    kind = getattr(io_struct, asked)
    received = kind.__new__(kind)  # each has fields of its own besides
    received.flush_cache = flush
    answer = fingerprint.weights_change(hashed, scheduler, update, None, received)
    assert answer.success == done and bool(called) == done
    if not done:
        assert isinstance(answer, getattr(io_struct, answered)) and "flush_cache" in answer.message
