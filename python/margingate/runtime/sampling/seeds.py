"""Sampling with a seed: which rows of a batch are drawn by the gate, and how."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB

from margingate.runtime.request.sampling_params import Draw
from margingate_kernels import Draws

# SGLang's `sampling_seed` tensor holds the seeds of the gate's rows, and this for all others. It is
# None while a batch has none of ours, so that greedy batches do no work for it.
NO_SEED = -1
_SEEDED = "gate_seeded"  # on SamplingBatchInfo: by row, is it ours
# On the tensor of seeds, which goes with SGLang's copies of its batch: int64 on its device, the
# rows that are ours. None, or without it, all are drawn.
_ROWS = "gate_rows"


def from_schedule_batch(_result: Any, info: Any, batch: Any, _vocab: int) -> None:
    """AFTER SamplingBatchInfo.adjusted_from_schedule_batch: set the seeds of a new batch."""
    # Without seeds until they are on the device: what raises must not leave half of them.
    info.sampling_seed = None
    _set_seeded(info, [False] * len(batch.reqs))
    draws = [getattr(getattr(req, "gate", None), "draw", None) for req in batch.reqs]
    seeded = [draw is not None for draw in draws]
    if any(seeded):
        seeds = [NO_SEED if draw is None else draw.seed for draw in draws]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(info.temperatures.device)
        _set_seeded(info, seeded)


def merge_batch(_result: Any, info: Any, other: Any) -> None:
    """AFTER SamplingBatchInfo.adjusted_merge_batch: SGLang joins seeds, but not with None."""
    mine, theirs = _seeded(info), _seeded(other)
    if info.sampling_seed is None and other.sampling_seed is not None:
        none = torch.full((len(mine),), NO_SEED, device=other.sampling_seed.device)
        info.sampling_seed = torch.cat([none, other.sampling_seed])
    elif info.sampling_seed is not None and other.sampling_seed is None:
        none = torch.full((len(theirs),), NO_SEED, device=info.sampling_seed.device)
        info.sampling_seed = torch.cat([info.sampling_seed, none])
    _set_seeded(info, mine + theirs)


def filter_batch(_result: Any, info: Any, keep: list[int], _keep_on_device: Any) -> None:
    """AFTER SamplingBatchInfo.adjusted_filter_batch."""
    seeded = _seeded(info)
    kept = [seeded[i] for i in keep]
    if not any(kept):  # before its rows are noted on the device
        info.sampling_seed = None
    _set_seeded(info, kept)


def _seeded(info: Any) -> list[bool]:
    rows: list[bool] | None = getattr(info, _SEEDED, None)
    if rows is None:  # its hook failed before it had any
        rows = [False] * len(info.temperatures)
        info.sampling_seed = None
    return rows


def _set_seeded(info: Any, rows: list[bool]) -> None:
    setattr(info, _SEEDED, rows)
    seeds = info.sampling_seed
    if seeds is None:
        return
    if all(rows):
        setattr(seeds, _ROWS, None)
        return
    ours = torch.tensor([i for i, is_ours in enumerate(rows) if is_ours], dtype=torch.int64)
    setattr(seeds, _ROWS, ours.to(seeds.device, non_blocking=True))


def rows_of(seeds: torch.Tensor) -> torch.Tensor | None:
    """The rows of a batch with such seeds that are drawn by the gate, int64; None: all."""
    rows: torch.Tensor | None = getattr(seeds, _ROWS, None)
    return rows


def batch_draws(
    info: Any, seeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None
) -> Draws:
    """These rows of a batch; None: all."""
    columns = (
        *(seeds, positions.to(torch.int64), info.temperatures.view(-1)),
        *(info.top_ks, info.top_ps, info.min_ps),
    )
    return Draws(*(each if rows is None else each[rows] for each in columns))


def filters(info: Any) -> bool:
    """Whether any row of a batch may leave tokens out; no wait for the device."""
    return bool(info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling)


def stack(draws: list[Draw], positions: list[int], device: Any) -> Draws:
    """The draws of single rows, for the verifier."""
    columns = (
        ([draw.seed for draw in draws], torch.int64),
        (positions, torch.int64),
        ([draw.temperature for draw in draws], torch.float32),
        ([draw.top_k for draw in draws], torch.int64),
        ([draw.top_p for draw in draws], torch.float32),
        ([draw.min_p for draw in draws], torch.float32),
    )
    return Draws(*(torch.tensor(values, dtype=dtype).to(device) for values, dtype in columns))


def logprob_temperature(draw: Draw | None) -> float:
    """What SGLang scales logits by before it reports log-probs of a row."""
    return 1.0 if draw is None or SGLANG_RETURN_ORIGINAL_LOGPROB else draw.temperature
