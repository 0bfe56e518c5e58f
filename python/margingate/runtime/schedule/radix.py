"""The radix tree of a gated server: gated requests share canonical prompt columns only.

A column's bits depend on how it was computed. Where gated prompts are prefilled alone on an
absolute grid of C tokens, a full chunk [kC, (k+1)C) has the same bits whoever computed it; a last,
shorter chunk and decoded columns have not, and stay out of the tree. Where prefill was found to
give a column the same bits in any forward, all of a prompt is shared; where decode does too, so is
the canonical part of an answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, default_radix_cache_factory

from margingate.runtime.compat.server_args import gate_config
from margingate.runtime.probe.check_prefill import Prefill
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import is_gated


def build(context: TreeCacheBuildContext) -> Any:
    """Radix-cache factory for `--radix-cache-backend margingate`."""
    config = gate_config(context.server_args)
    if config is None or context.disable_radix_cache:
        return default_radix_cache_factory(replace(context))
    assert config.prefill_chunk is not None
    return GateRadixCache(context.params, config.prefill_chunk)


class GateRadixCache(RadixCache):
    """SGLang's tree; for gated requests hits and insertions end on the grid."""

    def __init__(self, params: Any, chunk: int) -> None:
        super().__init__(params)
        self.chunk = chunk  # tokens
        self._requests: OpenRequests | None = None  # whose canonical columns enter; None: none

    def share(self, prefill: Prefill, requests: OpenRequests) -> None:
        """Adopt what was measured; before the first request."""
        if prefill.together:
            self.chunk = 1
        self._requests = requests if prefill.as_decoded else None

    def _grid(self, length: int) -> int:
        return length // self.chunk * self.chunk

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        """As SGLang's; a gated request's hit is cut to the grid."""
        match = super().match_prefix(params)
        hit = len(match.device_indices)
        if not is_gated(params.req) or hit == self._grid(hit):
            return match
        return super().match_prefix(replace(params, key=params.key[: self._grid(hit)]))

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """After a prefill forward: insert the full chunks, keep the rest with the request.

        Mutates the request's slot row (duplicates are freed and replaced by the tree's), its
        prefix_indices, last_node and cache_protected_len.
        """
        if not is_gated(req) or self.disable:
            super().cache_unfinished_req(req, chunked=chunked)
            return
        tokens = req.get_fill_ids()
        # After a failure of ours its columns are its own: nothing says how they were computed.
        shared = 0 if req.gate.failed else self._grid(len(tokens))
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        if shared > req.cache_protected_len:
            self._share(req, RadixKey(tokens[:shared], req.extra_key), row, chunked)
        req.prefix_indices = row[: len(tokens)].to(torch.int64, copy=True)

    def _add(self, req: Any, key: RadixKey, row: torch.Tensor, chunked: bool = False) -> None:
        """Give `key`'s columns to the tree; free the request's own where it has them already."""
        values = row[: len(key)].to(torch.int64, copy=True)
        priority = getattr(req, "priority", 0) or 0
        inserted = self.insert(
            InsertParams(key=key, value=values, chunked=chunked, priority=priority)
        )
        owned = req.cache_protected_len
        self.token_to_kv_pool_allocator.free_segment(
            row[owned : inserted.prefix_len], start_pos=owned
        )

    def _share(self, req: Any, key: RadixKey, row: torch.Tensor, chunked: bool) -> None:
        """Put `key`'s columns into the tree, or take the tree's where it has them already."""
        owned, end = req.cache_protected_len, len(key)
        self._add(req, key, row, chunked)
        match = self.match_prefix(MatchPrefixParams(key=key))
        assert len(match.device_indices) == end, "the tree lost columns it was just given"
        self.req_to_token_pool.write(
            (req.req_pool_idx, slice(owned, end)), match.device_indices[owned:]
        )
        self.inc_lock_ref(match.last_device_node)
        self.dec_lock_ref(req.last_node)
        req.last_node, req.cache_protected_len = match.last_device_node, end

    def cache_finished_req(
        self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        """A gated request's shared chunks are in the tree since prefill; free all its others.

        Its answer's canonical columns enter now, where they have the bits of a prefill.
        """
        if not is_gated(req) or self.disable:
            super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
            return
        owned = req.cache_protected_len
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        if is_insert and self._requests is not None and not req.gate.failed:
            end = min(self._requests.canonical_columns(req), kv_len_to_handle)
            if end > owned:
                tokens = (req.origin_input_ids + req.output_ids)[:end]
                self._add(req, RadixKey(tokens, req.extra_key), row)
                owned = end
        self.token_to_kv_pool_allocator.free_segment(row[owned:kv_len_to_handle], start_pos=owned)
        if req.last_node is not None:
            self.dec_lock_ref(req.last_node)
