"""A prefill batch of SGLang's own adder over the pools of `radix_world`, as the gate admits it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from radix_world import ALONE, CHUNK, TOGETHER, World
from sglang.srt.managers import schedule_batch, schedule_policy
from sglang.srt.managers.schedule_policy import PrefillAdder

from margingate.runtime.schedule.prefill_admission import Admission


class Turn:
    """One prefill batch that SGLang makes up: its own adder, under the gate's admission."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        features = SimpleNamespace(enable_encoder_swa_bounded_replay=False)
        monkeypatch.setattr(schedule_policy, "get_exec", lambda: SimpleNamespace(features=features))
        self.admission = Admission(ALONE if world.alone else TOGETHER, CHUNK)
        running = schedule_batch.ScheduleBatch(reqs=[])
        self.adder = PrefillAdder(1, world.tree, world.allocator, running, 0.5, 4096, 6)

    def add(self, req: Any, chunked: bool = False) -> Any:
        return self.admission.add_one_req(PrefillAdder.add_one_req, self.adder, req, chunked, None)

    def go_on(self, req: Any) -> Any:
        return self.admission.add_chunked_req(PrefillAdder.add_chunked_req, self.adder, req)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(req.prefix_len, req.extend_end) for req in self.adder.can_run_list]
