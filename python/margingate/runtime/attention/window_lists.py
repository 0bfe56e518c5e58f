"""Which slots of the window pool a forward reads, where layers with a window have their own.

They are looked up as a forward is prepared, and nowhere later: SGLang's scheduler gives columns up
while a forward runs, and a row would read whatever the mapping says by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from margingate.config import GateError
from margingate.runtime.compat.instance_patches import ON_TWO_POOLS, check_instance
from margingate.runtime.compat.kv import window_pool
from margingate_kernels import Chunks, listed_keys


class WindowLists:
    """The lists of one attention backend, for the kernels that take its own one's place."""

    def __init__(self, backend: Any, runner: Any, windows: Iterable[int], head_size: int) -> None:
        """Mutates `backend`, before its decode graphs are made.

        SGLang lists the slots of each decode row's window as it prepares a step, in a graph too.
        Here the lists are made as long as the kernels read.

        Args:
            windows: of the layers, in keys before a row's own; at least one.

        Raises:
            GateError: the backend lacks something that is replaced, or a window is wider than what
                SGLang keeps of it.
        """
        for patch in ON_TWO_POOLS:
            check_instance(backend, patch)
        widest = max(windows)
        if backend.sliding_window_size is None or widest > backend.sliding_window_size:
            raise GateError(
                f"a layer sees {widest} tokens before its own, but SGLang keeps "
                f"{backend.sliding_window_size} in the K/V pool of layers with a window: use "
                "--disable-hybrid-swa-memory."
            )
        self._backend, self._pool = backend, runner.token_to_kv_pool
        self._page_table = runner.req_to_token_pool.req_to_token
        self.keys = backend.sliding_window_size = listed_keys(widest, head_size, runner.device)
        self._prepare = backend.init_forward_metadata
        backend.init_forward_metadata = self.prepare
        self._prepared: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def prepare(self, forward_batch: Any) -> None:
        """In place of the backend's: after it, looks up what a prefill reads."""
        self._prepare(forward_batch)
        self._prepared = None
        if forward_batch.forward_mode.is_extend():
            lists = self._lists_of(forward_batch)
            self._prepared = (self._backend.forward_metadata, *lists)

    def chunks(self, starts: torch.Tensor, forward_batch: Any, longest: int) -> Chunks:
        """Those of the prefill that was prepared last, by slots of the window pool.

        Args:
            starts: as in `Chunks`.
            longest: at least the tokens of the longest sequence.

        Raises:
            RuntimeError: it was prepared in a way that this does not know.
        """
        if self._prepared is None or self._prepared[0] is not self._backend.forward_metadata:
            raise RuntimeError(
                "margingate: a prefill whose slots in the pool of windows were not looked up"
            )
        _, slots, rows = self._prepared
        return Chunks(slots, rows, starts, forward_batch.extend_prefix_lens, longest)

    def _lists_of(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots, int32 [slots, 1] behind each other, and of each sequence where key 0 would be.

        int64 [sequences]. A sequence has its chunk's slots here, and those of `keys` keys before.
        """
        counts = batch.extend_seq_lens_cpu
        longest = int(batch.extend_seq_lens.max()) if counts is None else max(counts)
        width = longest + self.keys
        firsts = (batch.extend_prefix_lens.to(torch.int64) - self.keys).clamp(min=0)
        offsets = torch.arange(width, device=firsts.device)
        positions = (firsts[:, None] + offsets).clamp(max=self._page_table.shape[1] - 1)
        whole = self._page_table[batch.req_pool_indices[:, None], positions].to(torch.int64)
        slots = window_pool.windows_of(self._pool, whole).to(torch.int32).flatten()
        rows = torch.arange(len(firsts), device=firsts.device) * width - firsts
        return slots.as_strided((len(slots), 1), (1, 1)), rows
