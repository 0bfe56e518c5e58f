"""The two best tokens of each logit row, their margin and the best one's log-probability.

The margin is what MarginGate reads after each decode step (arXiv 2605.30218): a row whose
margin is small, or NaN, may sample another token under another batch shape.

What a row means, for the kernel and the oracle alike:

* Equal logits rank by token id, lowest first. `-0.0` equals `0.0`.
* NaN ranks as `-inf`, so ids stay in range, but makes the row's margin and logprob NaN.
* `-inf` (a masked token) is a value like any other. With one finite logit the margin is
  `+inf`; a row of `-inf` alone has id 0, margin NaN and logprob NaN.
* `+inf` is a value like any other: one gives margin `+inf`, two give NaN; logprob is NaN.
* A vocabulary of one has runner-up -1, taken as a logit of `-inf`: margin `+inf`, logprob 0.
"""

from typing import NamedTuple

import torch

from margingate_kernels import top2_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 16384  # columns; under 32768, from where on torch splits CPU work over threads


class Top2(NamedTuple):
    """Per-row result of `softmax_top2` over R rows."""

    ids: torch.Tensor  # int64 [R]; the greedy token, lowest id among equals
    runner_up: torch.Tensor  # int64 [R]; the greedy token of the rest; -1 if there is no rest
    margin: torch.Tensor  # float32 [R]; logit of ids minus logit of runner_up, >= 0 or NaN
    logprob: torch.Tensor  # float32 [R]; log softmax at ids, natural log, <= 0 or NaN


class Top2Workspace(NamedTuple):
    """Scratch between the kernel's two launches; holds nothing between calls."""

    values: torch.Tensor  # float32 [rows, parts, 3]
    ids: torch.Tensor  # int32 [rows, parts, 2]


def empty_top2(rows: int, device: torch.device | str) -> Top2:
    """Uninitialised result buffers for `rows` rows, to pass as `out`."""
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    margin = torch.empty(rows, dtype=torch.float32, device=device)
    return Top2(ids, torch.empty_like(ids), margin, torch.empty_like(margin))


def top2_workspace(rows: int, vocab: int, device: torch.device | str) -> Top2Workspace:
    """Scratch for up to `rows` rows; `vocab` is the width ranked (`valid_vocab` where given)."""
    parts = top2_triton.part_count(vocab)
    return Top2Workspace(
        torch.empty((rows, parts, 3), dtype=torch.float32, device=device),
        torch.empty((rows, parts, 2), dtype=torch.int32, device=device),
    )


def softmax_top2(
    logits: torch.Tensor,
    out: Top2 | None = None,
    workspace: Top2Workspace | None = None,
    *,
    valid_vocab: int | None = None,
) -> Top2:
    """Rank each row's two best tokens in one pass over the logits.

    On CUDA two Triton launches, elsewhere on the CPU the torch oracle. The bits of a row's
    result depend on that row, the widths, the dtype and whether the rows start on 16-byte
    boundaries; never on the number of rows or on other rows. With `out` and `workspace` given
    the CUDA path neither allocates nor synchronises and may be captured into a graph, once a
    first call outside the capture has compiled it.

    Args:
        logits: float32, bfloat16 or float16 [R, V], last dim contiguous, any row stride, R >= 0,
            V >= 1. Fastest where V, the row stride and the address are multiples of 16 bytes.
            Not mutated.
        out: buffers as from `empty_top2(R)`; overwritten and returned.
        workspace: as from `top2_workspace(rows >= R, valid_vocab or V)`; overwritten. Calls that
            may overlap on the device need one each. Unused on the CPU.
        valid_vocab: rank only columns [0, valid_vocab); the rest (padding) may hold anything.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or `valid_vocab`.

    Source: MarginGate, arXiv 2605.30218.
    """
    valid = _check_logits(logits, valid_vocab)
    _check_out(out, logits)
    _check_workspace(workspace, logits, valid)
    if logits.device.type == "cpu":
        result = softmax_top2_reference(logits, valid_vocab=valid)
        return result if out is None else _copy_into(out, result)
    return launch_top2(logits, out, workspace, valid)


def launch_top2(
    logits: torch.Tensor, out: Top2 | None, workspace: Top2Workspace | None, valid_vocab: int
) -> Top2:
    """Run the jit body on arguments already checked; `softmax_top2` is the public way in.

    Also the way in for Triton's interpreter, which runs the body on CPU tensors.
    """
    rows = logits.shape[0]
    if out is None:
        out = empty_top2(rows, logits.device)
    if workspace is None:
        workspace = top2_workspace(rows, valid_vocab, logits.device)
    if rows:
        top2_triton.launch(logits, tuple(out), tuple(workspace), valid_vocab)
    return out


@torch.no_grad()
def softmax_top2_reference(logits: torch.Tensor, *, valid_vocab: int | None = None) -> Top2:
    """The torch oracle of `softmax_top2`: same arguments, errors and meaning, on any device.

    Ids and margin equal the kernel's bit for bit; logprob to 2e-6 + 4e-7 * |logprob|.
    """
    valid = _check_logits(logits, valid_vocab)
    out = empty_top2(len(logits), logits.device)
    for row, values in enumerate(logits[:, :valid]):
        ids, runner_up, margin, logprob = _reference_row(values)
        out.ids[row], out.runner_up[row] = ids, runner_up
        out.margin[row], out.logprob[row] = margin, logprob
    return out


def _reference_row(values: torch.Tensor) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """The oracle on one row [V], as the entries of Top2.

    Rows one by one and in pieces that torch works on with one thread, so that neither the rows
    nor the threads decide the order of a sum; on busy cores it is also many times faster.
    """
    pieces = [piece.float() for piece in values.split(_PIECE)]
    ranked = [piece.masked_fill(piece.isnan(), -torch.inf) for piece in pieces]
    best, first = _best_and_id(ranked, taken=-1)
    ranked[first // _PIECE][first % _PIECE] = -torch.inf
    second, runner_up = _best_and_id(ranked, taken=first)
    margin = best - second + 0.0  # turns the -0.0 of -0.0 - 0.0 into 0.0
    if any(piece.isnan().any() for piece in pieces):
        margin = torch.full_like(margin, torch.nan)
    # In float64, so that the kernel is held to the true value; softmax takes a row on one thread.
    probability = torch.softmax(torch.cat([piece.double() for piece in pieces]), 0)[first]
    return first, runner_up, margin, probability.log().float()


def _best_and_id(pieces: list[torch.Tensor], taken: int) -> tuple[torch.Tensor, int]:
    """The maximum of a row and the lowest id that has it, `taken` aside; -1 if none does.

    nonzero states the order of what it returns; max and argmax leave equal values open.
    """
    best = torch.stack([piece.max() for piece in pieces]).max()
    for index, piece in enumerate(pieces):
        ids = (piece == best).nonzero().flatten() + index * _PIECE
        ids = ids[ids != taken]
        if len(ids):
            return best, int(ids[0])
    return best, -1


def _copy_into(out: Top2, result: Top2) -> Top2:
    for target, source in zip(out, result, strict=True):
        target.copy_(source)
    return out


def _check_logits(logits: torch.Tensor, valid_vocab: int | None) -> int:
    """The number of columns to rank; raises on anything the kernel cannot read."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}; pass a torch.Tensor.")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits has dtype {logits.dtype}; cast to float32, bfloat16 or float16.")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; pass [rows, vocab], vocab >= 1.")
    vocab = logits.shape[1]
    if logits.stride(1) != 1 and vocab > 1:
        raise ValueError(
            f"logits has stride {logits.stride(1)} along the vocabulary; pass logits.contiguous()."
        )
    if logits.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits is on {logits.device}; move it to a CUDA device or the CPU.")
    return vocab if valid_vocab is None else _check_valid_vocab(valid_vocab, vocab)


def _check_valid_vocab(valid_vocab: int, vocab: int) -> int:
    if not isinstance(valid_vocab, int):
        raise TypeError(f"valid_vocab is a {type(valid_vocab).__name__}; pass an int or None.")
    if not 1 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab is {valid_vocab}; pass 1 to {vocab}, the width of logits.")
    return valid_vocab


def _check_out(out: Top2 | None, logits: torch.Tensor) -> None:
    if out is None:
        return
    if not isinstance(out, Top2):
        raise TypeError(f"out is a {type(out).__name__}; pass empty_top2(rows, device).")
    rows = logits.shape[0]
    dtypes = (torch.int64, torch.int64, torch.float32, torch.float32)
    for name, buffer, dtype in zip(Top2._fields, out, dtypes, strict=True):
        _check_buffer(f"out.{name}", buffer, dtype, logits.device, "empty_top2(rows, device)")
        if buffer.shape != (rows,):
            raise ValueError(
                f"out.{name} has shape {list(buffer.shape)}; pass [{rows}], one entry a row."
            )


def _check_workspace(
    workspace: Top2Workspace | None, logits: torch.Tensor, valid_vocab: int
) -> None:
    if workspace is None:
        return
    if not isinstance(workspace, Top2Workspace):
        raise TypeError(
            f"workspace is a {type(workspace).__name__}; pass top2_workspace(rows, vocab, device)."
        )
    rows, parts = logits.shape[0], top2_triton.part_count(valid_vocab)
    make = f"top2_workspace({rows}, {valid_vocab}, device)"
    kinds = ((torch.float32, 3), (torch.int32, 2))
    for name, buffer, (dtype, fields) in zip(Top2Workspace._fields, workspace, kinds, strict=True):
        _check_buffer(f"workspace.{name}", buffer, dtype, logits.device, make)
        if buffer.shape[1:] != (parts, fields) or buffer.shape[0] < rows:
            raise ValueError(
                f"workspace.{name} has shape {list(buffer.shape)}, not at least "
                f"[{rows}, {parts}, {fields}]; pass {make}."
            )


def _check_buffer(
    name: str, buffer: torch.Tensor, dtype: torch.dtype, device: torch.device, make: str
) -> None:
    if buffer.dtype != dtype:
        raise TypeError(f"{name} has dtype {buffer.dtype}, not {dtype}; pass {make}.")
    if buffer.device != device:
        raise ValueError(f"{name} is on {buffer.device}, logits on {device}; pass {make}.")
    if not buffer.is_contiguous():
        raise ValueError(f"{name} has strides {buffer.stride()}, not contiguous; pass {make}.")
