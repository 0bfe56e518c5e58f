"""Decode attention whose K/V split depends on a row's own length, and on nothing else."""

from __future__ import annotations

import logging
from typing import Any

import torch

from margingate.config import GateError
from margingate.runtime.attention import invariant_attention, layer_rules
from margingate.runtime.compat.host.attention import attends_row_by_row
from margingate.runtime.compat.instance_patches import ON_FLASHINFER, check_instance

logger = logging.getLogger(__name__)

SPLIT_TILE = 64  # tokens of K/V that a Triton split covers, until a row has MOST_SPLITS
MOST_SPLITS = (
    16  # or more, by --triton-attention-num-kv-splits; blocks that a short row leaves idle
)
FLASHINFER_TILE = 2048  # tokens that a FlashInfer split covers in a step without a graph


def fix_split(backend: Any, runner: Any = None) -> None:
    """Make decode attention's K/V split a function of the sequence length alone.

    Before its decode graphs are made. Triton's gets margingate's kernels where they serve the model
    of `runner`, which are faster and do the same for prefill; elsewhere a rule for its own.

    Raises:
        GateError: a backend that this is not known of, or that cannot do what a layer asks for.
    """
    name = type(backend).__name__
    reason = "no model runner" if runner is None else layer_rules.unfit(backend, runner)
    if runner is not None:
        layer_rules.refuse_others(backend, runner)
    if attends_row_by_row(backend):
        return  # a loop over the rows, each with its own length
    if name == "TritonAttnBackend":
        if reason:
            logger.info("margingate: SGLang's Triton attention with a fixed split: %s.", reason)
            _fix_triton(backend)
        else:
            invariant_attention.OwnAttention(backend, runner)
        return
    if name == "FlashInferAttnBackend":
        for patch in ON_FLASHINFER:
            check_instance(backend, patch)
        # Graphs made from here on use tensor cores and no split (FlashInfer's graphs know no
        # fixed split size). Other steps give other bits, so a runner uses graphs only or none.
        if backend.decode_use_tensor_cores:  # else its wrappers outside of graphs cannot
            backend.decode_split_tile_size = FLASHINFER_TILE
        backend.decode_use_tensor_cores = True
        backend.disable_cuda_graph_kv_split = True
        return
    raise GateError(
        f"--gate-fast-path invariant does not know the attention backend {name}: use "
        "--attention-backend triton or flashinfer, or --gate-fast-path stock."
    )


def _fix_triton(backend: Any) -> None:
    """Make the number of splits of a Triton decode a function of the sequence length alone."""
    most = max(MOST_SPLITS, backend.max_kv_splits)
    lengths = torch.arange(backend.max_context_len + 1, device=backend.device)
    splits = ((lengths + SPLIT_TILE - 1) // SPLIT_TILE).clamp(1, most).to(torch.int32)
    backend.max_kv_splits = int(splits[-1])

    def get_num_kv_splits(
        num_kv_splits: torch.Tensor, seq_lens: torch.Tensor, uneven_batch: Any = None
    ) -> None:
        torch.index_select(splits, 0, seq_lens, out=num_kv_splits)

    backend.get_num_kv_splits = get_num_kv_splits


def split_of(backend: Any) -> list[int]:
    """What a row's split depends on besides its length, for a backend after `fix_split`."""
    own = invariant_attention.of(backend)
    if own is not None:
        return own.record()
    return [SPLIT_TILE, getattr(backend, "max_kv_splits", 1)]
