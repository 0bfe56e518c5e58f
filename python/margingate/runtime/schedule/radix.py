"""The radix tree of a gated server: gated requests share canonical columns only.

A column's bits depend on how it was computed. Where gated prompts are prefilled alone on an
absolute grid of C tokens, a full chunk [kC, (k+1)C) has the same bits whoever computed it; a last,
shorter chunk and decoded columns have not, and stay out of the tree. Where prefill was found to
give a column the same bits in any forward, all of a prompt is shared; where decode does too, so is
the canonical part of an answer.

Columns of replaced weights serve nobody: the tree goes on under the next version, gated requests
and others alike, and what a request computed across the change stays out.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
)

from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.compat.kv.tree import LimitedRadixCache, LimitedWindowCache, Limits
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import is_gated


def build(context: TreeCacheBuildContext) -> Any:
    """Radix-cache factory for `--radix-cache-backend margingate`."""
    config = gate_config(context.server_args)
    if config is None or context.disable_radix_cache:
        return default_radix_cache_factory(replace(context))
    assert config.prefill_chunk is not None
    if not context.is_hybrid_swa:
        return GateRadixCache(context.params, config.prefill_chunk)
    make: Any = partial(GateWindowCache, chunk=config.prefill_chunk)
    return create_unified_radix_cache(context, cache_class=make)


class GateTree(Limits):
    """What the gate has either tree do: for gated requests hits and insertions end on the grid."""

    def __init__(self, params: Any, chunk: int) -> None:
        super().__init__(params)
        self.chunk = chunk  # tokens
        self._requests: OpenRequests | None = None  # the open ones; None: before the first
        self._answers = False  # whether their canonical columns enter

    def share(self, prefill: Prefill, requests: OpenRequests) -> None:
        """Adopt what was measured; before the first request."""
        if prefill.together:
            self.chunk = 1
        self._requests, self._answers = requests, prefill.as_decoded

    def usable(self, req: Any, hit: int) -> int:
        """A gated request's hit ends on the grid."""
        return self._grid(hit) if is_gated(req) else hit

    def shareable(self, req: Any, length: int) -> int:
        """Of a gated request: the full chunks of its prompt, also where its first token ends it; at
        its end the canonical columns of its answer too, where they have the bits of a prefill. Of
        one with columns of replaced weights, none.
        """
        if _is_mixed(req):
            return 0
        if not is_gated(req):
            return length
        if req.gate.failed:  # its columns are its own: nothing says how they were computed
            return 0
        if self._requests is not None and self._answers and req.finished():
            return min(self._requests.canonical_columns(req), length)
        return self._grid(min(len(req.origin_input_ids), length))

    def _grid(self, length: int) -> int:
        return length // self.chunk * self.chunk


class GateRadixCache(GateTree, LimitedRadixCache):
    """SGLang's tree over one pool."""


class GateWindowCache(GateTree, LimitedWindowCache):
    """SGLang's tree over two pools."""

    def replayable_from(self, req: Any) -> int:
        """Of a gated request: behind its canonical columns, as far as they go without a gap."""
        if not is_gated(req):
            return sys.maxsize
        return 0 if self._requests is None else self._requests.canonical_columns(req)


def _is_mixed(req: Any) -> bool:
    gate = getattr(req, "gate", None)
    return gate is not None and bool(gate.mixed)
