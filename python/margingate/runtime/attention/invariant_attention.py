"""margingate's attention kernels inside SGLang's Triton backend, which stays as it is around them.

Their bits depend on a row's own keys alone, in prefill as in decode: see
`margingate_kernels.attention`. SGLang's backend calls the functions that it holds as attributes;
those are replaced on one instance.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from margingate.config import GateError
from margingate.runtime.attention.layer_rules import attention_layers, rules_of, window_of
from margingate.runtime.attention.window_lists import WindowLists
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.instance_patches import ON_TRITON, check_instance
from margingate.runtime.compat.kv import window_pool
from margingate_kernels import (
    Chunks,
    Columns,
    DecodeWorkspace,
    Paged,
    Rules,
    decode_attention,
    decode_workspace,
    extend_attention,
    plan_decode,
    segments_of,
    with_window,
)
from margingate_kernels.attention import ARITHMETIC, Segments

logger = logging.getLogger(__name__)

Workspaces = Mapping[int | None, DecodeWorkspace]  # a plan for each window; they share their sums

MOST_ROWS = 512  # of a batch, without making room for more
SHARED = 2  # pools of tokens that a batch may see: what requests share is in the pool once


class OwnAttention:
    """The kernels and their workspace, for one attention backend."""

    def __init__(self, backend: Any, runner: Any) -> None:
        """Mutates `backend`: from here on its attention is these kernels.

        Before its decode graphs are made; `unfit` must have nothing to say.

        Raises:
            GateError: the backend lacks something that is replaced.
        """
        for patch in ON_TRITON:
            check_instance(backend, patch)
        layers = attention_layers(runner.model)
        self._heads, self._head_size = layers[0].tp_q_head_num, layers[0].qk_head_dim
        self._first = first_with(layers)
        self._start = min(self._first.values())  # the layer with which a forward begins
        self._page_table = runner.req_to_token_pool.req_to_token
        self._device = runner.device
        self._context = segments_of(runner.model_config.context_len, self._head_size)
        lengths = (runner.model_config.context_len, self._head_size)
        self._longest = max(segments_of(*lengths, window) for window in self._first)
        self._pool = segments_of(runner.token_to_kv_pool.size, self._head_size)
        graphs = settings.view(runner.server_args).cuda_graph_config.decode.max_bs or 0
        self._workspaces = self._make_workspaces(max(MOST_ROWS, graphs))
        self.room = self._room()  # tokens that rows of a decode forward may see together, at least
        self._lists = self._make_lists(backend, runner)
        self._larger: Workspaces | None = None  # graphs hold addresses of the first
        self.seen: dict[int, Rules] = {}  # what each layer asked for, by its number
        self._backend = backend
        self._sums: Segments | None = None
        self._most_keys = 0  # of a sequence of the present prefill forward; 0: not known
        self._layer: Any = None
        self._batch: Any = None
        self._parts: list[slice] = []  # of the rows of the present decode forward
        self._ran = {"decode": False, "prefill": False}
        self._decode, self._extend = backend.forward_decode, backend.forward_extend
        backend.forward_decode, backend.forward_extend = self.forward_decode, self.forward_extend
        backend.decode_attention_fwd = self._attend_rows
        backend.extend_attention_fwd = self._attend_chunks
        backend.max_kv_splits = 1  # of the buffers that its own kernels would fill
        backend.get_num_kv_splits = _no_splits
        backend.margingate = self

    def confirm(self, *, prefill: bool) -> None:
        """After forwards of both kinds. Raises GateError where the kernels did not run."""
        for name in ("decode", "prefill") if prefill else ("decode",):
            if not self._ran[name]:
                raise GateError(
                    f"--deterministic-gate replaced {name} attention, but SGLang did not call it: "
                    "choose --attention-backend flashinfer, or --gate-fast-path stock."
                )

    def share_keys(self) -> None:
        """From here on programs share a row's keys where a prefill has few rows and many keys.

        Their bits are those of one loop over the keys, which the caller has measured.
        """
        self._sums = next(iter(self._workspaces.values())).segments

    def _room(self) -> int:
        any_plan = next(iter(self._workspaces.values()))
        capacity, rows = len(any_plan.segments.records), _rows(self._workspaces)
        if capacity >= rows * self._longest:
            return rows * self._context * any_plan.blocks.segment
        return max(capacity - rows, 1) * any_plan.blocks.segment

    def fits(self, batch: Any) -> bool:
        """Whether there is room for all that the rows of a decode batch see, as in a CUDA graph."""
        keys = batch.seq_lens_sum
        return (int(batch.seq_lens.sum()) if keys is None else keys) <= self.room

    def record(self) -> list[int]:
        """What the bits depend on."""
        blocks = next(iter(self._workspaces.values())).blocks
        return [ARITHMETIC, blocks.keys, blocks.segment]

    def _make_lists(self, backend: Any, runner: Any) -> WindowLists | None:
        """None where all layers have one pool."""
        windows = [window for window in self._first if window is not None]
        if not windows or not window_pool.is_split(runner.token_to_kv_pool):
            return None
        return WindowLists(backend, runner, windows, self._head_size)

    def _make_workspaces(self, rows: int) -> Workspaces:
        """Room for the layers that see most, and a plan for each window."""
        segments = min(rows * self._longest, SHARED * self._pool + self._longest + rows)
        whole = decode_workspace(rows, segments, self._heads, self._head_size, self._device)
        return {w: whole if w is None else with_window(whole, w) for w in self._first}

    def _workspaces_for(self, rows: int) -> Workspaces:
        if rows <= _rows(self._workspaces):
            return self._workspaces
        if self._larger is None or rows > _rows(self._larger):
            self._larger = self._make_workspaces(1 << (rows - 1).bit_length())
        return self._larger

    def _parts_of(self, batch: Any, rows: int) -> list[slice]:
        """The rows of a decode batch that attend together: all, where there is room."""
        if rows == 1 or self.fits(batch):
            return [slice(0, rows)]
        return list(parts(batch.seq_lens_cpu.tolist(), self.room))

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """In place of the backend's: notes the layer, and lets the backend do the rest."""
        self._layer = layer
        if layer.layer_id == self._start:
            self._parts = self._parts_of(forward_batch, forward_batch.batch_size)
        return self._decode(q, k, v, layer, forward_batch, *args, **kwargs)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """In place of the backend's: notes layer and batch, and lets the backend do the rest."""
        self._layer, self._batch = layer, forward_batch
        if self._sums is not None and layer.layer_id == self._start:
            self._most_keys = _most_keys(forward_batch)
        return self._extend(q, k, v, layer, forward_batch, *args, **kwargs)

    def _attend_rows(  # noqa: PLR0917
        self,
        q: torch.Tensor,
        k_buffer: torch.Tensor,
        v_buffer: torch.Tensor,
        out: torch.Tensor,
        indptr: torch.Tensor,
        slots: torch.Tensor,
        _attn_logits: Any,
        _attn_lse: Any,
        _splits: Any,
        _max_splits: int,
        scale: float,
        *_scales: float,
        **extras: Any,
    ) -> None:
        """In place of the backend's decode kernel."""
        rules = self._rules(extras)
        self._ran["decode"] = True
        workspace = self._workspaces_for(len(q))[rules.window]
        ends = None
        if rules.window is not None:
            metadata = self._backend.forward_metadata
            if self._lists is not None:  # SGLang's list, made longer, of the windows' own pool
                ends = indptr
            else:  # SGLang's list for a window leaves out its first key
                slots = metadata.kv_indices
            indptr = metadata.kv_indptr
        is_first = self._layer.layer_id == self._first[rules.window]
        for part in self._parts:
            rows = slice(part.start, part.stop + 1)
            its = indptr[rows]
            if is_first or len(self._parts) > 1:
                plan_decode(its, workspace, *(() if ends is None else (ends[rows],)))
            paged = Paged(k_buffer, v_buffer, slots, its)
            decode_attention(q[part], paged, scale, out[part], workspace, rules)

    def _attend_chunks(  # noqa: PLR0917
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        k_buffer: torch.Tensor,
        v_buffer: torch.Tensor,
        starts: torch.Tensor,
        _indptr: torch.Tensor,
        _indices: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        _mask_indptr: Any,
        longest: int,
        _k_scale: float,
        _v_scale: float,
        scale: float,
        **extras: Any,
    ) -> None:
        """In place of the backend's extend kernel: all keys are in the pool by now."""
        rules = self._rules(extras)
        if mask is not None or not causal:
            raise RuntimeError("margingate: prefill attention with a mask of its own is not served")
        self._ran["prefill"] = True
        batch = self._batch
        starts = starts[: len(batch.req_pool_indices) + 1]
        if rules.window is not None and self._lists is not None:
            chunks = self._lists.chunks(starts, batch, longest)
        else:
            table, rows = self._page_table, batch.req_pool_indices
            prefixes = batch.extend_prefix_lens
            chunks = Chunks(table, rows, starts, prefixes, longest, self._most_keys)
        columns = Columns(k_buffer, v_buffer, k, v)
        extend_attention(q, columns, chunks, scale, out, rules, self._sums)

    def _rules(self, extras: Mapping[str, Any]) -> Rules:
        """Those of the present layer, with the sinks that it passes."""
        rules = rules_of(self._layer, extras)
        self.seen[self._layer.layer_id] = rules
        return rules


def _no_splits(num_kv_splits: torch.Tensor, seq_lens: Any, uneven_batch: Any = None) -> None:
    """Leave them: only the kernel that is replaced would read them, and this runs each step."""


def _most_keys(batch: Any) -> int:
    """Of any sequence of a forward; 0 where only the device could tell."""
    lengths = batch.seq_lens_cpu
    return 0 if lengths is None else max(lengths.tolist(), default=0)


def first_with(layers: Sequence[Any]) -> dict[int | None, int]:
    """The number of the first layer that has each window: the one before which it is planned."""
    first: dict[int | None, int] = {}
    for layer in sorted(layers, key=lambda each: int(each.layer_id)):
        first.setdefault(window_of(layer), int(layer.layer_id))
    return first


def _rows(workspaces: Workspaces) -> int:
    return len(next(iter(workspaces.values())).segments.firsts) - 1


def parts(lengths: Sequence[int], room: float) -> Iterator[slice]:
    """Rows in groups that see no more than `room` keys together, or of one row."""
    first = keys = 0
    for i, length in enumerate(lengths):
        keys += length
        if keys > room and i > first:
            yield slice(first, i)
            first, keys = i, length
    yield slice(first, len(lengths))


def can_run_graph(original: Any, graphs: Any, batch: Any) -> bool:
    """AROUND DecodeCudaGraphRunner.can_run_graph: not where the rows see more than it has room for.

    Requests that share a prefix may see many times what the pool holds. Such a step runs without a
    graph, and attends to some rows at a time.
    """
    own = of(graphs.attn_backend)
    if own is None or own.fits(batch):
        return bool(original(graphs, batch))
    _warn_once(own.room)
    return False


@functools.cache
def _warn_once(room: int) -> None:
    logger.warning(
        "margingate: requests that share a prefix see more than the %d tokens that attention in a "
        "CUDA graph has room for: such decode steps run without one, which is slower, and answers "
        "are the same; a lower --max-running-requests avoids it.",
        room,
    )


def of(backend: Any) -> OwnAttention | None:
    """The kernels of this backend, where it has them."""
    found: OwnAttention | None = getattr(backend, "margingate", None)
    return found
