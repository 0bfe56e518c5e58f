"""Weights are not replaced where the flush that follows would end the scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import io_struct

from margingate.runtime.observe import fingerprint

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
    scheduler = SimpleNamespace(is_fully_idle=lambda: idle)
    hashed: Any = SimpleNamespace(weights_changed=lambda **_: None)
    called = []

    def update(*_args):
        called.append(1)
        return SimpleNamespace(success=True, message="")

    received = getattr(io_struct, f"{kind}Input")(flush_cache=flush, **more)
    answer = fingerprint.weights_change(hashed, scheduler, update, None, received)
    assert answer.success == done and bool(called) == done
    if not done:
        assert (
            isinstance(answer, getattr(io_struct, f"{kind}Output"))
            and "flush_cache" in answer.message
        )
