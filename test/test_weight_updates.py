"""Weights are not replaced where the flush that follows would end the scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

from margingate.runtime.observe import fingerprint


@pytest.mark.parametrize(
    ("idle", "flush", "done"), [(False, True, False), (False, False, True), (True, True, True)]
)
def test_an_update_that_flushes_is_refused_while_requests_wait(idle, flush, done):
    scheduler = SimpleNamespace(is_fully_idle=lambda: idle)
    hashed: Any = SimpleNamespace(weights_changed=lambda **_: None)
    called = []

    def update(*_args):
        called.append(1)
        return SimpleNamespace(success=True, message="")

    received = UpdateWeightFromDiskReqInput(model_path="here", flush_cache=flush)
    answer = fingerprint.weights_change(hashed, scheduler, update, None, received)
    assert answer.success == done and bool(called) == done
