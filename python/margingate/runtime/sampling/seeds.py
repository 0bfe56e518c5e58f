"""Sampling with a seed: which rows of a batch are drawn by the gate, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from margingate.runtime.request.sampling_params import Draw
from margingate_kernels import Draws, seeded_top2

# SGLang's `sampling_seed` tensor holds the seeds of the gate's rows, and this for all others. It is
# None while a batch has none of ours, so that greedy batches do no work for it.
NO_SEED = -1
# Whether a row is ours, and whether its draw leaves tokens out, which takes a sort.
_OTHER, _PLAIN, _FILTERED = range(3)
_KINDS = "gate_kinds"  # on SamplingBatchInfo: by row, one of these
_GROUPS = "gate_groups"  # on the tensor of seeds, which goes with SGLang's copies of its batch


class Group(NamedTuple):
    """Rows of a batch that are drawn by the gate in the same way."""

    rows: torch.Tensor | None  # int64, on the batch's device; None: all
    filtered: bool  # whether one of them may leave tokens out


_UNKNOWN = (Group(None, filtered=True),)


def from_schedule_batch(_result: Any, info: Any, batch: Any, _vocab: int) -> None:
    """AFTER SamplingBatchInfo.adjusted_from_schedule_batch: set the seeds of a new batch."""
    # Without seeds until they are on the device: what raises must not leave half of them.
    info.sampling_seed = None
    _set_kinds(info, [_OTHER] * len(batch.reqs))
    draws = [getattr(getattr(req, "gate", None), "draw", None) for req in batch.reqs]
    kinds = [_kind(draw) for draw in draws]
    if any(kinds):
        seeds = [NO_SEED if draw is None else draw.seed for draw in draws]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(info.temperatures.device)
        _set_kinds(info, kinds)


def merge_batch(_result: Any, info: Any, other: Any) -> None:
    """AFTER SamplingBatchInfo.adjusted_merge_batch: SGLang joins seeds, but not with None."""
    mine, theirs = _kinds(info), _kinds(other)
    if info.sampling_seed is None and other.sampling_seed is not None:
        none = torch.full((len(mine),), NO_SEED, device=other.sampling_seed.device)
        info.sampling_seed = torch.cat([none, other.sampling_seed])
    elif info.sampling_seed is not None and other.sampling_seed is None:
        none = torch.full((len(theirs),), NO_SEED, device=info.sampling_seed.device)
        info.sampling_seed = torch.cat([info.sampling_seed, none])
    _set_kinds(info, mine + theirs)


def filter_batch(_result: Any, info: Any, keep: list[int], _keep_on_device: Any) -> None:
    """AFTER SamplingBatchInfo.adjusted_filter_batch."""
    kinds = _kinds(info)
    kept = [kinds[i] for i in keep]
    if not any(kept):
        info.sampling_seed = None
    _set_kinds(info, kept)


def _kind(draw: Draw | None) -> int:
    if draw is None:
        return _OTHER
    return _FILTERED if draw.filters else _PLAIN


def _kinds(info: Any) -> list[int]:
    kinds: list[int] | None = getattr(info, _KINDS, None)
    if kinds is None:  # its hook failed before it had any
        kinds = [_OTHER] * len(info.temperatures)
        info.sampling_seed = None
    return kinds


def _set_kinds(info: Any, kinds: list[int]) -> None:
    setattr(info, _KINDS, kinds)
    if (seeds := info.sampling_seed) is not None:
        setattr(seeds, _GROUPS, tuple(_groups(kinds, seeds.device)))


def _groups(kinds: list[int], device: torch.device) -> Iterator[Group]:
    for kind in (_PLAIN, _FILTERED):
        rows = [i for i, of_row in enumerate(kinds) if of_row == kind]
        if len(rows) == len(kinds):
            yield Group(None, kind == _FILTERED)
        elif rows:
            of_batch = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
            yield Group(of_batch, kind == _FILTERED)


def groups(seeds: torch.Tensor) -> Sequence[Group]:
    """The rows of a batch with such seeds that are drawn by the gate; no wait for the device."""
    found: Sequence[Group] = getattr(seeds, _GROUPS, _UNKNOWN)
    return found


def batch_draws(
    info: Any, seeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None
) -> Draws:
    """These rows of a batch; None: all."""
    columns = (
        *(seeds, positions.to(torch.int64), info.temperatures.view(-1)),
        *(info.top_ks, info.top_ps, info.min_ps),
    )
    return Draws(*(each if rows is None else each[rows] for each in columns))


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


def compile_draws(vocabulary: int, device: Any) -> None:
    """On a GPU, draw from all tokens once: no request waits for the compiler then."""
    if torch.device(device).type != "cpu":
        draws = stack([Draw(0, 1.0, TOP_K_ALL, 1.0, 0.0)], [0], device)
        seeded_top2(torch.zeros(1, vocabulary, device=device), draws, filtered=False)


def logprob_temperature(draw: Draw | None) -> float:
    """What SGLang scales logits by before it reports log-probs of a row."""
    return 1.0 if draw is None or SGLANG_RETURN_ORIGINAL_LOGPROB else draw.temperature
