"""What may happen to requests over the pools of `radix_world`, as hypothesis draws it."""

from __future__ import annotations

import operator
from typing import NamedTuple

from hypothesis import strategies as st
from radix_world import LONGEST, REQUESTS, World
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

PROMPTS = st.builds(  # answers go 0, 1, 0, 1 too: what one says may be what another is asked
    lambda length, tail: (*((0, 1) * 7)[:length], *tail),
    st.integers(1, 14),
    st.sampled_from([(), (), (1, 1), (0, 0, 1)]),
)


class Step(NamedTuple):
    """Something that happens to one of the requests; what does not fit it becomes what does."""

    what: str
    which: int
    prompt: tuple[int, ...]
    gated: bool
    count: int  # of tokens in a chunk, or to be evicted
    rows: list[bool]  # to be decoded, whether each is canonical
    insert: bool
    known: bool
    ends: bool  # with its first token, where it is prefilled


MOSTLY = st.sampled_from([True, True, True, False])
KINDS = ("arrive", "go on", "go on", "go on", "verify", "finish", "abort", "evict", "update")
STEPS = st.builds(
    Step,
    what=st.sampled_from(KINDS),
    which=st.integers(0, REQUESTS - 1),
    prompt=PROMPTS,
    gated=MOSTLY,
    count=st.integers(1, 9),
    rows=st.lists(MOSTLY, min_size=1, max_size=4),
    insert=MOSTLY,
    known=MOSTLY,
    ends=MOSTLY.map(operator.not_),
)


def take(world: World, step: Step) -> None:
    if step.what == "evict":
        world.tree.evict(EvictParams(num_tokens=4 * step.count))
        return
    if step.what == "update":
        world.update()
        return
    if not world.live or (step.what == "arrive" and len(world.live) < REQUESTS):
        world.arrive(step.prompt, step.gated)
        return
    req = world.live[step.which % len(world.live)]
    if not world.is_prefilled(req) and (step.what != "abort" or not req.kv.holds_kv):
        world.prefill(req, step.count, ends=step.ends)
    elif step.what in ("finish", "abort"):  # an abort may come between two chunks
        world.finish(req, step.insert, step.known)
    elif step.what == "verify" and req.gate.gated:
        world.verify(req)
    else:
        for canonical in step.rows[: LONGEST - len(world.tokens(req))]:
            world.decode(req, canonical)
