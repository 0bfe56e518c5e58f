"""Attention with sinks on the host, in torch operators, where SGLang's own kernel is not built."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

TORCH_NATIVE = "TorchNativeAttnBackend"


def attends_row_by_row(backend: Any) -> bool:
    """Whether a backend loops over the requests that it is told of, each by itself."""
    return any(each.__name__ == TORCH_NATIVE for each in type(backend).__mro__)


def torch_attention(runner: Any) -> TorchNativeAttnBackend:
    """SGLang's torch-native attention, and for a model with sinks one that knows them."""
    sinks = runner.model_config.has_attention_sinks
    return HostAttention(runner) if sinks else TorchNativeAttnBackend(runner)


class HostAttention(TorchNativeAttnBackend):
    """SGLang's torch-native attention with sinks, which it leaves out.

    One function serves decode and prefill, a request at a time, in float32.
    """

    def forward_extend(  # noqa: PLR0917
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> torch.Tensor:
        """Rows of prompts. Writes their columns; sinks [heads] come with the call."""
        counts = forward_batch.extend_seq_lens.tolist()
        return self._attend(q, k, v, layer, forward_batch, counts, save=save_kv_cache, **more)

    def forward_decode(  # noqa: PLR0917
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> torch.Tensor:
        """A row a request, as `forward_extend`."""
        counts = [1] * len(forward_batch.seq_lens)
        return self._attend(q, k, v, layer, forward_batch, counts, save=save_kv_cache, **more)

    def _attend(  # noqa: PLR0917
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        counts: list[int],
        *,
        save: bool,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        pool, slots = self.token_to_kv_pool, self.req_to_token_pool.req_to_token
        if save:
            where = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            pool.set_kv_buffer(layer, where, k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        rows = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out, first = torch.zeros_like(rows), 0
        lengths, requests = forward_batch.seq_lens.tolist(), forward_batch.req_pool_indices.tolist()
        for count, length, request in zip(counts, lengths, requests, strict=False):
            seen, own = slots[request, :length].long(), slice(first, first + count)
            if self.use_sliding_window_kv_pool and layer.sliding_window_size >= 0:
                seen = pool.translate_loc_from_full_to_swa(seen)  # SGLang's two, without the gate
            given = attend(
                *(rows[own], keys[seen], values[seen], layer.scaling),
                window=layer.sliding_window_size,
                sinks=sinks,
            )
            out[own] = given
            first += count
        return out.view(len(out), -1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The last rows of one sequence over all of its keys, causal; in float32, rounded once.

    Args:
        q: [rows, heads, lanes], of the last `rows` positions.
        k, v: [length, K/V heads, lanes].
        scale: of scores.
        window: keys before its own that a row sees; None or below 0: all.
        sinks: [heads], a score that a row also divides by, and no value.

    Returns:
        [rows, heads, lanes] of q's dtype.
    """
    (rows, heads, lanes), (length, kv_heads, _) = q.shape, k.shape
    grouped = q.float().view(rows, kv_heads, heads // kv_heads, lanes)
    scores = torch.einsum("rhgd,thd->hgrt", grouped, k.float()) * scale
    ends = torch.arange(length - rows, length, device=q.device)[:, None]
    behind = ends - torch.arange(length, device=q.device)
    hidden = behind < 0 if window is None or window < 0 else (behind < 0) | (behind > window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.float().reshape(kv_heads, -1, 1, 1).expand(-1, -1, rows, 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.softmax(dim=-1)[..., :length]
    mixed = torch.einsum("hgrt,thd->rhgd", shares, v.float())
    return mixed.reshape(rows, heads, lanes).to(q.dtype)
