"""The forwards that a replay asks of the scheduler."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo

from margingate.core.audit import Recorded, pieces
from margingate.runtime.observe.replay import Part, Replay
from margingate.runtime.verify.verifier import RowResult


class Forwards:
    """What a replay asks of the scheduler, written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
        from margingate.runtime.observe import replay

        self.prefills: list[list[tuple[str, int, int]]] = []
        self.released: list[str] = []
        self.verified: list[tuple[int, int]] = []
        self.asked: list[list[int]] = []
        verifier = SimpleNamespace(rows=2, choose=self._choose, run=self._run)
        self.scheduler: Any = SimpleNamespace(
            server_args=SimpleNamespace(chunked_prefill_size=-1, max_prefill_tokens=16),
            model_config=SimpleNamespace(vocab_size=50),
            req_to_token_pool=SimpleNamespace(
                available_size=lambda: 4, req_to_token=torch.arange(64).view(1, 64)
            ),
            token_to_kv_pool_allocator=SimpleNamespace(
                available_size=lambda: 60, get_kvcache=lambda: None
            ),
            tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        )
        prefill = SimpleNamespace(together=together)
        self.checks: Any = SimpleNamespace(verifier=verifier, prefill=prefill)
        monkeypatch.setattr(replay, "extend", self._extend)
        monkeypatch.setattr(replay, "internal_request", self._request)
        monkeypatch.setattr(replay, "release", lambda _, req: self.released.append(req.rid))
        monkeypatch.setattr(replay.rollback, "extend_columns", lambda *_: True)

    @staticmethod
    def _request(name: str, prompt: Any) -> Any:
        return SimpleNamespace(rid=name, kv=ReqKvInfo(req_pool_idx=0), prompt=list(prompt))

    def _extend(self, _scheduler: Any, parts: Any) -> torch.Tensor:
        self.prefills.append([(req.rid, start, end) for req, start, end in parts])
        assert all(end <= len(req.prompt) for req, _, end in parts)
        return torch.arange(len(parts)).view(-1, 1)

    def _choose(self, logits: torch.Tensor, rows: Any) -> list[RowResult]:
        assert logits.shape == (1, 1) and logits.item() == len(self.prefills[-1]) - 1
        return self._run(rows)

    def _run(self, rows: Any) -> list[RowResult]:
        self.verified += [(row.position, row.token) for row in rows]
        return [RowResult(7, 0.5, None) for _ in rows]

    def parts(self, prompt: int = 20, columns: Any = None) -> list[Part]:
        answer = Recorded("a", array("q", range(prompt)), array("q", [30, 31, 32, 33]))
        if columns is not None:
            answer = replace(answer, columns=columns)
        digests = SimpleNamespace(of=lambda slots: self.asked.append(slots.tolist()) or slots)
        return list(Replay(self.scheduler, self.checks, 8, answer, digests).parts())


def test_a_replay_prefills_in_other_row_counts_beside_others_and_frees_all(monkeypatch):
    forwards = Forwards(monkeypatch, together=True)
    found = forwards.parts(columns=torch.zeros(22, dtype=torch.int64))
    own = [parts[-1] for parts in forwards.prefills]
    planned = pieces("a", 20, 16)
    assert own == [("audit-a", piece.start, piece.end) for piece in planned]
    beside = [sum(end for _, _, end in parts[:-1]) for parts in forwards.prefills]
    assert beside == [piece.others for piece in planned] and any(beside)
    assert len(forwards.released) == 1 + sum(map(bool, beside))
    assert forwards.verified == [(19, 19), (20, 30), (21, 31), (22, 32)]
    assert [row.token for part in found for row in part.rows] == [7] * 4
    asked = [slot for slots in forwards.asked for slot in slots]
    assert asked == list(range(22)), "a column that was not promised was compared, or one was not"


def test_a_replay_keeps_to_the_grid_where_bits_depend_on_the_forward(monkeypatch):
    forwards = Forwards(monkeypatch, together=False)
    forwards.parts()
    assert forwards.prefills == [[("audit-a", s, e)] for s, e in ((0, 8), (8, 16), (16, 20))]
    assert not forwards.asked and forwards.released == ["audit-a"]


@pytest.mark.parametrize(("room", "requests"), [(24, 4), (26, 4), (60, 1)])
def test_company_takes_no_room_that_is_not_there(monkeypatch, room, requests):
    forwards = Forwards(monkeypatch, together=True)
    forwards.scheduler.token_to_kv_pool_allocator.available_size = lambda: room
    forwards.scheduler.req_to_token_pool.available_size = lambda: requests
    forwards.parts()
    most = min(max(room - 24, 0), 16 if requests > 1 else 0)
    beside = [end for parts in forwards.prefills for _, _, end in parts[:-1]]
    assert all(count <= most for count in beside) and bool(beside) == bool(most)
