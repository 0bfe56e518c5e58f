"""What the check at start concludes from made-up prompts, and that it leaves nothing behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from margingate.core.rowclass import RowPlan
from margingate.runtime.compat.process import ranks
from margingate.runtime.probe.checks import check_prefill
from margingate.runtime.probe.checks.check_prefill import LONGEST, Prefill, measure
from margingate.runtime.probe.operators import unpacked
from margingate.runtime.probe.planning import execute
from margingate.runtime.verify import internal_prefill

VOCABULARY, LAYERS, SLOTS = 100, 2, 2000
ALONE, TOGETHER, DECODED = Prefill(), Prefill(together=True), Prefill(True, as_decoded=True)


class World:
    """A scheduler, its pools and a verifier whose columns and logits follow from the tokens.

    What a forward gives is changed in the last bit by `noise(kind, requests, start, rows)`: of a
    prefill by how many share it, where it starts and its rows, of a verify pass ("decode") by its
    first position.
    """

    def __init__(self, noise: Callable[..., bool] = lambda *_: False, rows: int = 16) -> None:
        self.noise, self.rows = noise, rows
        self.server_args = SimpleNamespace(
            chunked_prefill_size=8192, max_prefill_tokens=16384, tp_size=1
        )
        self.max_req_len = SLOTS - 1
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Module()))
        self.model_config = SimpleNamespace(vocab_size=VOCABULARY)
        self.req_to_token_pool = SimpleNamespace(
            req_to_token=torch.zeros(8, SLOTS).int(), available_size=lambda: len(self.idle)
        )
        self.keys = [torch.zeros(SLOTS, 2) for _ in range(LAYERS)]
        cache = SimpleNamespace(
            start_layer=1,
            layer_num=LAYERS,
            get_kv_buffer=lambda layer: (self.keys[layer - 1], -self.keys[layer - 1]),
        )
        self.token_to_kv_pool_allocator = SimpleNamespace(
            get_kvcache=lambda: cache, available_size=lambda: len(self.free)
        )
        self.free, self.idle = list(range(1, SLOTS)), list(range(1, 8))
        self.forwards: list[list[tuple[str, int, int]]] = []
        self.passes: list[tuple[int, int]] = []
        self.released: list[str] = []
        self.room = SLOTS  # tokens of a verify pass

    # -- of the scheduler

    def extend(self, _scheduler: Any, parts: Sequence[tuple[Any, int, int]]) -> torch.Tensor:
        self.forwards.append([(req.rid, start, end) for req, start, end in parts])
        logits = []
        for req, start, end in parts:
            assert start < end, "an empty forward"
            if not req.kv.holds_kv:
                req.kv.req_pool_idx = self.idle.pop()
            tokens = list(req.full_untruncated_fill_ids)
            self.allocate(req, start, end)
            rows = sum(end - start for _, start, end in parts)
            other = self.noise("prefill", len(parts), start, rows)
            logits += [self.compute(req.kv.req_pool_idx, range(start, end), tokens, other)[-1]]
        return torch.stack(logits)

    def allocate(self, req: Any, start: int, end: int) -> None:
        slots = [self.free.pop() for _ in range(end - start)]
        table = self.req_to_token_pool.req_to_token
        table[req.kv.req_pool_idx, start:end] = torch.tensor(slots).int()
        req.held = end

    def extend_columns(self, _scheduler: Any, req: Any, count: int) -> bool:
        if len(self.free) < count:
            return False
        self.allocate(req, req.held, req.held + count)
        return True

    def release(self, _scheduler: Any, req: Any) -> None:
        self.released.append(req.rid)
        if req.kv.holds_kv:
            row = req.kv.req_pool_idx
            self.free += self.req_to_token_pool.req_to_token[row, : req.held].tolist()
            self.idle.append(row)
            req.kv.req_pool_idx = None

    def compute(
        self, pool: int, positions: Sequence[int], tokens: Sequence[int], other: bool
    ) -> list[torch.Tensor]:
        """Writes the columns and gives the logits; each token's column depends on it alone."""
        logits = []
        for position in positions:
            slot = int(self.req_to_token_pool.req_to_token[pool, position])
            token = float(tokens[position]) + 1e-3 * other
            self.keys[0][slot] = self.keys[1][slot] = token
            logits.append(torch.full((VOCABULARY,), token))
        return logits

    # -- of the verifier

    def that_fit(self, rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
        size = max(min(self.room, len(rows)), 1)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))

    def forward(self, rows: Sequence[Any], count: int) -> torch.Tensor:
        self.passes.append((len(rows), count))
        tokens = {row.position: row.token for row in rows}
        positions, other = [*tokens], self.noise("decode", 1, rows[0].position, count)
        logits = self.compute(rows[0].pool_index, positions, tokens, other)
        padding = [torch.full((VOCABULARY,), torch.nan)] * (count - len(rows))
        return torch.stack(logits + padding)

    def check(self) -> None:
        """Everything is free again."""
        assert sorted(self.free) == list(range(1, SLOTS)) and len(self.idle) == 7


@pytest.fixture(autouse=True)
def covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "covers_prefill", lambda: True)


def run(world: World, monkeypatch: pytest.MonkeyPatch, wanted: bool = True) -> Prefill:
    for name in ("extend", "release"):
        monkeypatch.setattr(check_prefill, name, getattr(world, name))
    monkeypatch.setattr(check_prefill.rollback, "extend_columns", world.extend_columns)
    found = measure(world, world, wanted)
    world.check()
    return found


def test_nothing_is_run_where_it_is_not_wanted_or_plans_do_not_reach_so_far(monkeypatch, caplog):
    world = World()
    with caplog.at_level(logging.INFO):
        assert run(world, monkeypatch, wanted=False) == ALONE
        assert "prefilled alone, as --gate-prefill or --gate-fast-path has it" in caplog.text
        monkeypatch.setattr(execute, "covers_prefill", lambda: False)
        assert run(world, monkeypatch) == ALONE
    assert "prefilled alone, since operators are not measured for prefills here" in caplog.text
    assert not world.forwards and not world.passes


def test_what_agrees_everywhere_holds_everywhere(monkeypatch, caplog):
    world = World()
    with caplog.at_level(logging.INFO):
        assert run(world, monkeypatch) == DECODED
    assert "prefilled together; decoded columns have the same bits" in caplog.text
    alone, beside, largest, *more, rest = world.forwards
    chunks, drawn = more[:4], more[4:]
    assert alone == [("margingate-alone", 0, LONGEST)]
    assert [(start, end) for _, start, end in beside] == [(0, 300), (0, LONGEST), (0, 5)]
    assert [(start, end) for _, start, end in largest] == [(0, SLOTS - 2 - LONGEST), (0, LONGEST)]
    cuts = [(start, end) for ((_, start, end),) in chunks]
    assert cuts == [(0, 100), (100, 450), (450, 899), (899, 900)], "one row is left for the end"
    ends = [each[-1] for each in drawn if each[-1][2] == LONGEST]
    assert ends and all(rid == "margingate-drawn" for rid, *_ in ends)
    assert "row counts of prefill drawn anew" in caplog.text
    assert rest == [("margingate-decoded", 0, LONGEST - 16)] and world.passes == [(16, 16)]
    assert DECODED.record() == {"together": True, "as_decoded": True}


NOISE: dict[str, Callable[[str, int, int], bool]] = {
    "beside others": lambda kind, count, start, rows: kind == "prefill" and count > 1,
    "in the largest": lambda kind, count, start, rows: kind == "prefill" and rows > 1500,
    "in later chunks": lambda kind, count, start, rows: kind == "prefill" and start > 0,
    "in one row at the end": lambda kind, count, start, rows: kind == "prefill" and start == 899,
    "in decode": lambda kind, count, start, rows: kind == "decode",
}


@pytest.mark.parametrize(
    ("differs", "expected"), zip(NOISE, [ALONE, ALONE, ALONE, ALONE, TOGETHER]), ids=NOISE
)
def test_what_differs_is_not_used(differs, expected, monkeypatch, caplog):
    world = World(NOISE[differs])
    with caplog.at_level(logging.INFO):
        assert run(world, monkeypatch) == expected
    assert ("prefilled together" if expected.together else "prefilled alone") in caplog.text
    assert "other (or it was not asked)" in caplog.text
    assert world.passes, "ranks run the same forwards, whatever the first ones said"


@pytest.mark.parametrize(
    ("module", "name", "held"),
    [
        (execute, "_prefill_plans", {1: RowPlan(((64, 128),))}),
        (unpacked, "_kinds", {1: unpacked.UnpackedLayers(None)}),
    ],
)
def test_decoded_columns_are_others_where_some_layers_run_otherwise_in_prefills(
    module, name, held, monkeypatch
):
    """The few rows of this check may not show it: some classes differ in one row of thousands."""
    monkeypatch.setattr(module, name, held)
    world = World()
    assert run(world, monkeypatch) == TOGETHER
    assert world.passes, "ranks run the same forwards"


def test_columns_of_every_layer_count_and_so_do_logits(monkeypatch):
    for part in ("logits", "first layer", "last layer"):
        world, extend = World(), World.extend

        def changed(scheduler, parts, world=world, part=part, extend=extend):
            logits = extend(world, scheduler, parts)
            req = parts[-1][0]
            if len(world.forwards) > 1 and len(parts) == 1 and part == "logits":
                return logits + 1
            if len(world.forwards) > 1 and len(parts) == 1:
                slot = int(world.req_to_token_pool.req_to_token[req.kv.req_pool_idx, 7])
                world.keys[0 if part == "first layer" else 1][slot] += 1
            return logits

        world.extend = changed
        assert run(world, monkeypatch) == ALONE, part


def test_a_pass_that_does_not_fit_at_once_goes_in_parts(monkeypatch):
    world = World()
    world.room = 6
    assert run(world, monkeypatch) == DECODED
    assert world.passes == [(6, 16), (6, 16), (4, 16)]


def test_without_slots_for_the_decoded_rows_they_are_not_taken_to_agree(monkeypatch):
    world = World()
    world.extend_columns = lambda *_: False
    assert run(world, monkeypatch) == TOGETHER
    assert not world.passes


@pytest.mark.parametrize("failing", [1, 2, 3, 5, 7])
def test_slots_are_free_again_whatever_is_raised(failing, monkeypatch):
    world, extend = World(), World.extend

    def raising(scheduler, parts):
        logits = extend(world, scheduler, parts)
        if len(world.forwards) == failing:
            raise RuntimeError("out of memory")
        return logits

    world.extend = raising
    with pytest.raises(RuntimeError, match="out of memory"):
        run(world, monkeypatch)
    world.check()
    assert world.released


@pytest.mark.parametrize("chunk", [1, 8, 12, 20, 64, 1000, 8192, -1, None])
@pytest.mark.parametrize("longest", [20, 60, 700, SLOTS - 1])
def test_the_prompt_fits_into_small_chunks_and_pools(chunk, longest, monkeypatch):
    """Three prompts at once are no more tokens than the server has slots for."""
    world = World(rows=256)
    world.server_args.chunked_prefill_size, world.max_req_len = chunk, longest
    assert run(world, monkeypatch) == DECODED
    forwards = [each for each in world.forwards if each[-1][0] != "margingate-drawn"]
    drawn = [each for each in world.forwards if each[-1][0] == "margingate-drawn"]
    most = [sum(end - start for _, start, end in parts) for parts in forwards]
    largest = most.pop(2)
    rows = max(sum(end - start for _, start, end in parts) for parts in drawn)
    assert rows <= (SLOTS - 2 if chunk in (None, -1) else max(chunk, 8))
    assert max(most) <= max(longest, 16)
    assert largest <= (SLOTS - 2 if chunk in (None, -1) else max(chunk, 8)), "as many as may be"
    whole = world.forwards[0][0][2]
    assert 8 <= whole <= LONGEST
    assert chunk not in (64, 1000) or whole < chunk
    count = world.passes[0][0]
    assert count == min(256, whole // 2) and world.passes[0][1] == 256


def test_an_internal_request_is_gated_and_carries_its_prompt():
    req = internal_prefill.internal_request("margingate-x", [5, 6, 7])
    assert req.gate.gated and list(req.full_untruncated_fill_ids) == [5, 6, 7]
    freed: list[Any] = []
    internal_prefill.release(SimpleNamespace(tree_cache=freed), req)
    assert not req.kv.holds_kv and not freed, "it has no slots yet"


def test_ranks_use_what_all_of_them_found(monkeypatch):
    world = World()
    world.server_args.tp_size, world.tp_cpu_group = 2, "group"
    said: list[list[bool]] = []

    def gather(into: list[Any], flags: list[bool], group: str) -> None:
        if isinstance(flags, int):
            into[:] = [flags, flags + 1]  # the seed of what is drawn: the first rank's counts
            return
        said.append(flags)
        into[:] = [flags, [True] if len(flags) == 1 else [*[True] * 4, False]]

    monkeypatch.setattr(ranks.torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(ranks.torch.distributed, "get_world_size", lambda _group: 2)
    assert run(world, monkeypatch) == TOGETHER
    assert said[0] == [True] and said[-1] == [True] * 5
