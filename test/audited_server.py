"""A K/V pool with numbers in it, and an auditor with the scheduler as it sees it."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo

from margingate.config import GateConfig
from margingate.core.audit import Recorded
from margingate.runtime.observe.replay import Part
from margingate.runtime.request.record import GateRequest
from margingate.runtime.verify.verifier import RowLogprobs, RowResult


def recorded(rid: str = "a", size: int = 3, generation: int = 0) -> Recorded:
    return Recorded(rid, array("q", range(size - 1)), array("q", [7]), generation=generation)


DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Pool:
    """A K/V pool of 2 layers, 16 slots and 2 heads of 4, with numbers in it."""

    start_layer, layer_num = 1, 2

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.buffers = [
            [torch.randn((16, 2, 4), generator=generator).to(dtype) for _ in "kv"] for _ in range(2)
        ]

    def get_kv_buffer(self, layer: int) -> list[torch.Tensor]:
        return self.buffers[layer - 1]


class Server:
    """An auditor, and the scheduler as it sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parts: list[list[int]]) -> None:
        from margingate.runtime.observe import audit

        self.module = audit
        self.called_after = 99  # looks for messages that find none
        self.told: list[str] = []
        self.closed = 0
        socket = SimpleNamespace(poll=self._poll)
        self.pool = Pool()
        pages = torch.arange(32).view(4, 8) % 16
        self.scheduler: Any = SimpleNamespace(
            server_args=SimpleNamespace(random_seed=5),
            ipc_channels=SimpleNamespace(recv_from_tokenizer=socket, recv_from_rpc=None),
            weight_updater=SimpleNamespace(offload_tags=set(), _session=None),
            token_to_kv_pool_allocator=SimpleNamespace(
                available_size=lambda: 4, get_kvcache=lambda: self.pool
            ),
            req_to_token_pool=SimpleNamespace(req_to_token=pages),
            tree_cache=SimpleNamespace(evictable_size=lambda: 4),
        )
        self.canonical = 3  # rows
        self.fingerprint: Any = SimpleNamespace(generation=2)
        requests: Any = SimpleNamespace(
            observers=SimpleNamespace(audited=self.told.append),
            canonical_columns=lambda req: (
                len(req.origin_input_ids) + self.canonical - 1 if self.canonical else 0
            ),
        )
        config, checks = GateConfig(audit_rate=1.0, prefill_chunk=8), cast(Any, None)
        self.auditor = audit.Auditor(self.scheduler, config, checks, requests, self.fingerprint)
        self.audits = self.auditor.audits
        monkeypatch.setattr(audit, "Replay", self._made_up)
        self.parts = parts
        self.margins, self.logprobs = [0.25, 0.5, 0.75], [-1.0, -2.0, -3.0]
        self.columns = self.auditor._columns.of(pages[1, :5])  # the replay's

    def _made_up(self, _sched: Any, _checks: Any, _chunk: int, recorded: Any, _columns: Any) -> Any:
        known = 0 if recorded.columns is None else len(recorded.columns)
        return SimpleNamespace(parts=lambda: self._replay(known), rows_of=lambda: "2+1, 1")

    def _replay(self, known: int) -> Any:
        """The first part has the prompt's 3 columns, the last one those of the answer."""
        done, last = 0, len(self.parts) - 1
        try:
            for i, tokens in enumerate(self.parts):
                rows = []
                for token in tokens:
                    found = RowLogprobs(self.logprobs[done], None, None)
                    rows.append(RowResult(token, self.margins[done], found))
                    done += 1
                spans = {0: (0, 3), last: (3, 5)}
                first, end = spans.get(i, (0, 0))
                asked = first < min(end, known)
                yield Part(rows, first, self.columns[first : min(end, known)] if asked else None)
        finally:
            self.closed += 1

    def _poll(self, _timeout: int, _flags: int) -> int:
        self.called_after -= 1
        return int(self.called_after < 0)

    def end(
        self,
        reason: Any = "stop",
        output: tuple[int, ...] = (5, 6, 7),
        rid: str = "r",
        canonical: tuple[int, ...] = (1, 1, 1),
        **more: Any,
    ) -> None:
        gate = GateRequest("key", True)
        gate.begins(2, tokens=0)
        for margin, mark in zip((0.25, 0.5, 0.75), canonical, strict=True):
            gate.note_row(margin, flagged=False, canonical=bool(mark))
        gate.draw = more.pop("draw", None)
        ids = array("q", output)
        req = SimpleNamespace(
            rid=rid,
            finished_reason=reason,
            output_ids_through_stop=ids,
            origin_input_ids=array("q", [1, 2, 3]),
            gate=gate,
            grammar=None,
            sampling_params=SimpleNamespace(logit_bias=None),
            kv=ReqKvInfo(req_pool_idx=1),
            return_logprob=True,
            logprob=SimpleNamespace(output_token_logprobs_val=[-1.0, -2.0, -3.0]),
        )
        vars(req).update(more)
        self.auditor.freed(req)
        for layer in self.pool.buffers:
            for part in layer:
                part.zero_()  # whoever gets the slots writes to them
        req.kv.req_pool_idx = None
        self.auditor.ended(req)
        ids[:] = array("q", [0] * len(ids))  # what is recorded is a copy

    @property
    def found(self) -> tuple[int, ...]:
        """Requests, and those with a token, with bits alone, and with each kind that differ."""
        audits = self.audits
        return (audits.audited, audits.mismatches, audits.bit_mismatches, *audits.by_kind.values())
