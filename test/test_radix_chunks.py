"""Chunks of prompts by SGLang's admission over its own pools, with the gate's around it."""

from __future__ import annotations

import pytest
import radix_world
from radix_turns import Turn
from radix_world import ALONE, CHUNK, PROMPT, TOGETHER, World
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult

server = radix_world.server
world = radix_world.world


@pytest.mark.parametrize("world", [ALONE, TOGETHER], indirect=True)
def test_sglang_cuts_a_gated_prompt_where_the_grid_says(world: World, monkeypatch):
    """The server's own chunks have 6 tokens. A lock that the adder takes is the request's."""
    world.answer(PROMPT)
    req, beside = world.arrive((*PROMPT[:9], 1, 2, 3, 4, 5, 6, 7)), world.arrive((7, 8))
    for each in (req, beside):
        world.tree.unlock(each.lock)  # as they wait
    turn = Turn(world, monkeypatch)
    turn.add(req)
    assert turn.spans == [(8, 12) if world.alone else (9, 15)]
    assert turn.adder.new_chunked_req is req and req.lock.node is req.last_node
    assert turn.add(beside) is AddReqResult.OTHER and len(turn.spans) == 1
    world.tree.unlock(req.lock)
    for each in (req, beside):
        each.lock = world.tree.lock(each.last_node)


def test_a_chunk_that_finds_no_room_is_parked_and_goes_on_later(world: World, monkeypatch):
    req = world.arrive(tuple(range(30, 40)))
    world.prefill(req)
    turn = Turn(world, monkeypatch)
    turn.adder.memory_budget.current_offset = world.allocator.available_size() - CHUNK + 1
    assert turn.go_on(req) is req and not turn.spans
    assert req.extend_end == req.prefix_len == CHUNK, "SGLang stashes nothing of a parked chunk"
    turn.adder.memory_budget.current_offset -= 1
    assert turn.go_on(req) is req and turn.spans == [(CHUNK, 2 * CHUNK)]


def test_shorter_prompts_that_wait_leave_a_gated_chunk_whole(world: World, monkeypatch):
    """SGLang keeps room for them, with --schedule-policy shortest-prefill-first."""
    req, waits = world.arrive(tuple(range(30, 40))), world.arrive((7, 8))
    world.prefill(req)
    turn = Turn(world, monkeypatch)
    policy = schedule_policy.SchedulePolicy(
        "shortest-prefill-first", world.tree, False, False, False
    )
    limit = policy.shortest_prefill_chunk_limit(req, [waits], CHUNK, 1)
    assert limit == CHUNK - 2
    turn.adder.chunked_req_limit = limit
    assert turn.go_on(req) is req and turn.spans == [(CHUNK, 2 * CHUNK)]
