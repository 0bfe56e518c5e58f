"""Decode attention is split by a row's own length alone."""

from __future__ import annotations

import pytest
import torch

from margingate.config import GateError
from margingate.runtime.attention.fixed_split import MOST_SPLITS, SPLIT_TILE, fix_split, split_of


class TritonAttnBackend:
    """The attributes that the gate touches."""

    def __init__(self, splits: int, context: int = 20_000) -> None:
        self.max_kv_splits = splits
        self.max_context_len = context
        self.device = "cpu"


class FlashInferAttnBackend:
    decode_use_tensor_cores = False
    disable_cuda_graph_kv_split = False
    decode_split_tile_size = None


class FlashAttentionBackend:
    pass


def splits(backend: TritonAttnBackend, lengths: list[int]) -> list[int]:
    found = torch.empty(len(lengths), dtype=torch.int32)
    uneven = torch.zeros(1, dtype=torch.int32)
    backend.get_num_kv_splits(found, torch.tensor(lengths), uneven)
    assert uneven.item() == 0, "rows keep their order among the kernel's programs"
    return found.tolist()


def test_the_splits_of_a_row_do_not_depend_on_the_others():
    backend = TritonAttnBackend(8)
    fix_split(backend)
    lengths = [1, SPLIT_TILE, SPLIT_TILE + 1, 700, 5000, 20_000]
    together = splits(backend, lengths)
    assert together == [splits(backend, [length])[0] for length in lengths]
    assert together[:3] == [1, 1, 2] and together[-2:] == [MOST_SPLITS] * 2
    assert backend.max_kv_splits == MOST_SPLITS and splits(backend, [0]) == [1]


def test_more_splits_can_be_asked_for_and_short_contexts_need_fewer():
    many = TritonAttnBackend(64)
    fix_split(many)
    assert splits(many, [20_000]) == [64] and split_of(many) == [SPLIT_TILE, 64]
    short = TritonAttnBackend(8, context=3 * SPLIT_TILE)
    fix_split(short)
    assert short.max_kv_splits == 3


def test_flashinfer_graphs_do_not_split():
    backend = FlashInferAttnBackend()
    fix_split(backend)
    assert backend.decode_use_tensor_cores and backend.disable_cuda_graph_kv_split
    assert backend.decode_split_tile_size is None and split_of(backend)[1] == 1
    fix_split(backend)  # one that was made with tensor cores
    assert backend.decode_split_tile_size


def test_another_backend_is_refused():
    with pytest.raises(GateError, match="does not know the attention backend FlashAttention"):
        fix_split(FlashAttentionBackend())
