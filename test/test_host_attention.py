"""Attention with sinks on the host, held to the oracle in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from margingate.runtime.compat.host.attention import (
    HostAttention,
    attend,
    attends_row_by_row,
    torch_attention,
)
from margingate_kernels import Rules, attention_reference

HEADS, KV_HEADS, LANES, SCALE = 4, 2, 16, 0.25
SINKS = torch.tensor([-4.0, 0.0, 2.0, 6.0])


def random(tokens: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, heads, LANES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sinks", [None, SINKS, SINKS.bfloat16()])
@pytest.mark.parametrize("window", [None, -1, 0, 1, 15, 200])
def test_the_oracle(window: int | None, sinks: torch.Tensor | None) -> None:
    q, k, v = random(60, HEADS, 1), random(60, KV_HEADS, 2), random(60, KV_HEADS, 3)
    rules = Rules(None if window == -1 else window, 0.0, sinks)
    want = attention_reference(q, k, v, SCALE, rules)
    got = attend(q, k, v, SCALE, window=window, sinks=sinks)
    assert torch.allclose(got.double(), want, atol=1e-5)
    last = attend(q[-1:], k, v, SCALE, window=window, sinks=sinks)
    assert torch.allclose(last.double(), want[-1:], atol=1e-5)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), SCALE, window=window, sinks=sinks)
    assert half.dtype == torch.bfloat16 and (half.double() - want).norm() < 0.02 * want.norm()


class Pool:
    """One layer's columns."""

    def __init__(self, slots: int) -> None:
        self.k, self.v = (torch.full((slots, KV_HEADS, LANES), torch.nan) for _ in range(2))

    def set_kv_buffer(self, _layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        k, v = (x.view(-1, KV_HEADS, LANES) for x in (k, v))
        self.k[where.loc], self.v[where.loc] = k, v

    def get_key_buffer(self, _layer: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, _layer: int) -> torch.Tensor:
        return self.v


def make_backend(slots: int, table: torch.Tensor) -> Any:
    backend = cast(Any, object.__new__(HostAttention))
    backend.token_to_kv_pool = Pool(slots)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=table)
    backend.swa_out_cache_loc, backend.use_sliding_window_kv_pool = None, False
    return backend


def test_requests_of_a_batch_are_prefilled_and_decoded_each_by_itself() -> None:
    """Two prompts in one forward, the second in two chunks; then a step of both, and padding."""
    lengths, window = (7, 30), 12
    q, k, v = random(99, HEADS, 4), random(99, KV_HEADS, 5), random(99, KV_HEADS, 6)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(7))
    table = torch.zeros(3, 40, dtype=torch.int32)
    table[1, :8], table[2, :31] = slots[:8].int(), slots[8:39].int()
    backend = make_backend(40, table)
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=HEADS,
        qk_head_dim=LANES,
        scaling=SCALE,
        sliding_window_size=window,
    )
    # Numbers of the first request are rows 0 to 7, those of the second 8 to 38.
    own = {1: torch.arange(8), 2: torch.arange(8, 39)}

    def run(name: str, parts: list[tuple[int, int, int]], padding: int = 0) -> torch.Tensor:
        """Positions from a to b of requests (request, a, b)."""
        rows = torch.cat([own[r][a:b] for r, a, b in parts])
        batch = SimpleNamespace(
            out_cache_loc=torch.cat([table[r, a:b].long() for r, a, b in parts]),
            seq_lens=torch.tensor([b for _, _, b in parts]),
            req_pool_indices=torch.tensor([r for r, _, _ in parts]),
            extend_seq_lens=torch.tensor([b - a for _, a, b in parts]),
        )
        more = torch.zeros(padding, HEADS, LANES)
        asked = torch.cat([q[rows], more]).flatten(1)
        forward = getattr(backend, f"forward_{name}")
        columns = k[rows].flatten(1), v[rows].flatten(1)
        found: torch.Tensor = forward(asked, *columns, layer, batch, sinks=SINKS)
        return found.view(-1, HEADS, LANES)

    def oracle(request: int, a: int, b: int) -> torch.Tensor:
        seen = own[request][:b]
        return attention_reference(q[seen], k[seen], v[seen], SCALE, Rules(window, 0.0, SINKS))[a:]

    first = run("extend", [(1, 0, lengths[0]), (2, 0, 20)])
    want = torch.cat([oracle(1, 0, 7), oracle(2, 0, 20)])
    assert torch.allclose(first.double(), want, atol=1e-5)
    second = run("extend", [(2, 20, 30)])
    assert torch.allclose(second.double(), oracle(2, 20, 30), atol=1e-5)
    step = run("decode", [(1, 7, 8), (2, 30, 31)], padding=2)
    want = torch.cat([oracle(1, 7, 8), oracle(2, 30, 31)])
    assert torch.allclose(step[:2].double(), want, atol=1e-5)
    assert torch.equal(run("decode", [(2, 30, 31)])[0], step[1]), "alone"


def test_only_a_model_with_sinks_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchNativeAttnBackend, "__init__", lambda self, runner: None)
    for sinks, kind in ((True, HostAttention), (False, TorchNativeAttnBackend)):
        config = SimpleNamespace(has_attention_sinks=sinks)
        made = torch_attention(SimpleNamespace(model_config=config))
        assert type(made) is kind and attends_row_by_row(made)
    assert not attends_row_by_row(object())
