"""Which prompts may share a prefill forward, and where a gated prompt is cut.

Where a row's bits were found not to depend on what shares its forward, gated prompts share it, and
SGLang decides as always. Elsewhere a gated prompt is prefilled alone, in chunks cut on an absolute
grid. Then the forward that computes a column has the same shape and the same rows whatever waits
beside the request and however much of its prefix was cached (hits are cut to the grid too).
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult

from margingate.runtime.compat.kv import columns, tree
from margingate.runtime.compat.model import vision
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.request import guard
from margingate.runtime.request.record import is_gated


class Admission:
    """Which prompts may be in the next prefill forward."""

    def __init__(self, prefill: Prefill, chunk: int) -> None:
        """`chunk`: tokens of a forward on the grid."""
        self._together, self._chunk = prefill.together, chunk

    def add_one_req(
        self, original: Any, adder: Any, req: Any, has_chunked_req: bool, align: int | None
    ) -> Any:
        """AROUND PrefillAdder.add_one_req: keep gated requests apart, where they must be."""
        if _lacks_room_to_replay(adder, req, self._chunk):
            return AddReqResult.NO_TOKEN
        beside = [*adder.can_run_list, req]
        if len(beside) > 1 and self._may_not_meet(beside):
            return AddReqResult.OTHER
        if self._together:
            return original(adder, req, has_chunked_req, align)
        return self._add_alone(original, adder, req, has_chunked_req, align)

    def _may_not_meet(self, reqs: list[Any]) -> bool:
        """Whether the last of these prompts, of which each may be served and the others share a
        prefill forward, may not share it.
        """
        if _embeddings_meet_tokens(reqs) or _items_meet_others(reqs):
            return True
        if not self._together or not any(map(is_gated, reqs)):
            return False
        return _media_meet_others(reqs) or _some_are_replaced(reqs)

    def _add_alone(
        self, original: Any, adder: Any, req: Any, has_chunked_req: bool, align: int | None
    ) -> Any:
        if has_chunked_req and not adder.can_run_list:
            return AddReqResult.OTHER  # a parked chunk; SGLang takes it to be in any batch it makes
        if any(is_gated(other) for other in adder.can_run_list):
            return AddReqResult.OTHER
        if not is_gated(req):
            return original(adder, req, has_chunked_req, align)
        if has_chunked_req:  # a prompt is half done and goes first
            return AddReqResult.OTHER
        if adder.can_run_list:
            return AddReqResult.OTHER  # nothing overtakes it, or it might wait for ever
        adder.rem_chunk_tokens = self._chunk
        result = original(adder, req, has_chunked_req, align)
        return AddReqResult.OTHER if adder.can_run_list else result

    def add_chunked_req(self, original: Any, adder: Any, req: Any) -> Any:
        """AROUND PrefillAdder.add_chunked_req: never shrink a gated chunk; park it instead."""
        if not is_gated(req) or self._together:
            return original(adder, req)
        need = min(self._chunk, _left(req))
        lacks = need > adder.cur_rem_tokens or 0 < adder.rem_total_tokens < need
        if lacks or _lacks_windows(adder, need):
            columns.park(req)
            return req
        adder.rem_chunk_tokens = self._chunk
        adder.chunked_req_limit = None  # of shortest-prefill-first: less, by what waits
        return original(adder, req)


def refuse_failed(original: Any, adder: Any, req: Any, *rest: Any, **named: Any) -> Any:
    """After a failure of `add_one_req`: the next turn takes the request as a refused one."""
    if not req.gate.gated or req.gate.kept is not None:
        return original(adder, req, *rest, **named)
    guard.refuse(req)
    return AddReqResult.OTHER


def _lacks_room_to_replay(adder: Any, req: Any, chunk: int) -> bool:
    """Whether a retracted request would be retracted again: its kept tokens come on top.

    SGLang counts the prompt, and of what is to come a few thousand tokens at most.
    """
    kept = req.gate.kept
    if kept is None:
        return False
    running = adder.running_batch
    if not adder.can_run_list and (running is None or running.is_empty()):
        return False  # there is not more room to wait for
    more = max(req.sampling_params.max_new_tokens - len(kept.tokens), 0)
    needed = _left(req) + len(kept.tokens) + min(more, CLIP_MAX_NEW_TOKENS)
    return bool(needed >= adder.rem_total_tokens) or _lacks_windows_to_replay(adder, req, chunk)


def _lacks_windows_to_replay(adder: Any, req: Any, chunk: int) -> bool:
    """Whether its kept tokens would find no room in the pool of windows, where there is one.

    All of them have columns there while they are replayed. Of a prompt that is computed, no more
    than a chunk and a window have; those that the tree has of it cannot be given up meanwhile.
    """
    if not adder.is_hybrid_swa:
        return False
    with tree.hit_held(adder.tree_cache, req) as window:
        computed = min(_left(req), chunk + window)
        return _lacks_windows(adder, computed + len(req.gate.kept.tokens))


def _embeddings_meet_tokens(reqs: list[Any]) -> bool:
    """Whether some prompts are in embeddings and others are not, gated or not.

    SGLang gives such a forward the embeddings of the first alone, and its scheduler ends.
    """
    return (reqs[0].input_embeds is None) != (reqs[-1].input_embeds is None)


def _items_meet_others(reqs: list[Any]) -> bool:
    """Whether some prompts are of several items (--enable-mis) and others are not, gated or not.

    SGLang asserts that a forward of scores has none of the others, and its scheduler ends.
    """
    first, last = (each.multi_item_delimiter_indices for each in (reqs[0], reqs[-1]))
    return (first is None) != (last is None)


def _some_are_replaced(reqs: list[Any]) -> bool:
    """Whether gated prompts would be in a forward with embeddings that replace tokens, of others.

    SGLang then looks up the tokens of all rows, and hands the model embeddings. Some models do to
    tokens what they do not to those: GraniteMoeHybrid multiplies by a number.
    """
    return any(each.positional_embed_overrides is not None for each in reqs)


def _media_meet_others(reqs: list[Any]) -> bool:
    """Whether gated prompts would be in a forward with media that they have not, or without gate.

    With media a forward runs other code for all of its rows, and what a video makes of that was
    measured by nobody.
    """
    alike = {vision.has_media(each) for each in reqs}
    return len(alike) > 1 or (alike == {True} and not all(map(is_gated, reqs)))


def _lacks_windows(adder: Any, tokens: int) -> bool:
    """Whether there is a pool of windows and it has no room for so many; SGLang spares one slot."""
    return bool(adder.is_hybrid_swa) and int(adder.memory_budget.remaining_swa) <= tokens


def _left(req: Any) -> int:
    """Tokens of the prompt that are still to be prefilled."""
    return len(req.full_untruncated_fill_ids) - columns.prefix(req)
