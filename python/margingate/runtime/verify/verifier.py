"""The verifier micro-batch: a decode forward of a fixed number of rows over existing slots.

A row is (the request's row of the page table, position + 1, the token at that position, the slot
that the position owns already). Each layer writes the K/V of all rows before it attends, so a
later row of the same request reads the earlier rows' new columns, and the pass itself rewrites
the columns. With the number of rows fixed, a row's bits do not depend on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from margingate.config import GateConfig, GateError
from margingate.runtime.attention import invariant_attention, layer_rules, verify_backend
from margingate.runtime.compat.compute.forward import DecodeRows, context, decode_batch, fence
from margingate.runtime.compat.host.attention import attends_row_by_row
from margingate.runtime.compat.kv import routed_experts, window_pool
from margingate.runtime.compat.kv.routed_experts import ChosenExperts
from margingate.runtime.request.sampling_params import Draw
from margingate.runtime.sampling import logprobs
from margingate.runtime.sampling.constraints import Constraint
from margingate.runtime.sampling.seeds import logprob_temperature, stack
from margingate_kernels import seeded_top2, softmax_top2


@dataclass(frozen=True, slots=True)
class RowInput:
    """One row of a verify pass."""

    pool_index: int  # row of req_to_token
    position: int  # of the input token; its column is rewritten
    token: int  # the input token's id
    logprobs: tuple[int, tuple[int, ...] | None] | None = None  # top-k and token ids wanted
    draw: Draw | None = None  # None: greedy
    constraint: Constraint | None = None
    shift: int = 0  # of its rotary position from its position, which images of its prompt make


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of one verified row (natural log, float32 values)."""

    token: float
    top: tuple[list[float], list[int]] | None
    ids: list[float] | None


@dataclass(frozen=True, slots=True)
class RowResult:
    """What the verifier says of one row."""

    token: int
    margin: float
    logprobs: RowLogprobs | None


class Verifier:
    """Runs verify passes of exactly `rows` rows on the model of `model_runner`."""

    def __init__(
        self, model_runner: Any, rows: int, *, graphs: Any = None, backend: Any = None
    ) -> None:
        """
        Args:
            graphs: SGLang's decode graph runner, or one of our own; None: no graphs.
            backend: for forwards without a graph; None: the model runner's.
        """
        self.runner = model_runner
        self._graphs = graphs
        self.backend = backend or model_runner.attn_backend
        self.rows = rows
        self.device = model_runner.device
        self._pins = torch.device(self.device).type == "cuda"
        self._slots = torch.empty(0, dtype=torch.int64)  # of the last batch's rows and padding
        self._page_table = model_runner.req_to_token_pool.req_to_token
        # SGLang's torch-native attention loops over the rows it is told of; padding rows are
        # there for the GEMMs, whose bits depend on the number of rows, and need no attention.
        self._attends_row_by_row = attends_row_by_row(self.backend)

    def run(self, rows: Sequence[RowInput]) -> list[RowResult]:
        """Verify 1 to `self.rows` rows; those of one request adjacent, positions ascending.

        Rewrites the K/V columns of the rows' positions in place, and the record of the experts that
        they were computed with. Padding rows read and write the
        reserved slot 0 only.
        """
        found: list[RowResult] = []
        for some in self.that_fit(rows):
            found += self.choose(self.forward(some, self.rows), some)
            experts = self.experts_of(some)
            if experts is not None:
                experts.store()
        return found

    def experts_of(self, rows: Sequence[RowInput], first: int = 0) -> ChosenExperts | None:
        """What the forward that ran last chose for `rows`, its rows from `first` on; None where
        nobody keeps it.
        """
        if not routed_experts.are_kept():
            return None
        return routed_experts.of_last_forward(self._slots[: len(rows)], first)

    def that_fit(self, rows: Sequence[RowInput]) -> Iterator[Sequence[RowInput]]:
        """The rows in groups whose keys the attention's workspace has room for; mostly one."""
        own = invariant_attention.of(self.backend)
        room = math.inf if own is None else own.room
        for part in invariant_attention.parts([row.position + 1 for row in rows], room):
            yield rows[part]

    @staticmethod
    def choose(logits: torch.Tensor, rows: Sequence[RowInput]) -> list[RowResult]:
        """Token, margin and log-probs of each row by its logits, [>= len(rows), vocab].

        Logits of rows with a constraint are changed in place.
        """
        for i, row in enumerate(rows):
            if row.constraint is not None:
                row.constraint.apply(logits[i : i + 1])
        best = softmax_top2(logits)
        tokens, margins = best.ids.tolist(), best.margin.tolist()
        for i, token, margin in _drawn(logits, rows):
            tokens[i], margins[i] = token, margin
        wanted = _logprobs(logits, rows, tokens)
        return [RowResult(tokens[i], margins[i], wanted.get(i)) for i, _ in enumerate(rows)]

    @torch.no_grad()  # logits of a step that carries a pass are scaled in place by a sampler
    def forward(
        self,
        rows: Sequence[RowInput],
        count: int,
        *,
        beside: ForwardBatch | None = None,
        graph: bool = True,
    ) -> torch.Tensor:
        """One decode forward of `rows`, padded to `count`. Returns logits [>= len(rows), vocab].

        They may be a view of a buffer that the next forward overwrites.

        Args:
            beside: a decode batch whose rows come first.
            graph: replay a CUDA graph, where there is one for it.
        """
        batch = self.batch(rows, count, beside)
        if graph and self._graphs is not None and self._graphs.can_run_graph(batch):
            logits = self._graphs.execute(batch).next_token_logits
            if beside is None:
                fence(self.runner)
            return logits
        with context(self.runner, self.backend, batch):
            self.backend.init_forward_metadata(batch)
            output = self.runner.model.forward(batch.input_ids, batch.positions, batch)
        return output.next_token_logits

    @property
    def most_rows(self) -> float:
        """Rows of a forward without a graph."""
        return places(self.runner, self.backend)

    def graph_sizes(self, largest: int) -> list[int]:
        """Row counts that have a decode graph, up to `largest`; empty without graphs."""
        sizes = [] if self._graphs is None else sorted(self._graphs.capture_bs)
        return [size for size in sizes if size <= largest]

    @property
    def has_graphs(self) -> bool:
        """Whether passes replay a CUDA graph."""
        return self._graphs is not None

    def batch(
        self, rows: Sequence[RowInput], count: int, beside: ForwardBatch | None = None
    ) -> ForwardBatch:
        """A decode batch of `rows`, behind those of `beside`, padded to `count`.

        Its slots are kept for `experts_of`.
        """
        others = 0 if beside is None else beside.batch_size
        padding = [RowInput(0, 0, 0)] * (count - others - len(rows))
        made = self._on_device((*rows, *padding))
        self._slots = made.slots
        if beside is not None:
            made = made.behind(beside)
        attended = others + len(rows) if self._attends_row_by_row else count
        return decode_batch(self.runner, made, attended, beside)

    def _on_device(self, rows: Sequence[RowInput]) -> DecodeRows:
        fields = torch.tensor(
            [
                [row.pool_index for row in rows],
                [row.position for row in rows],
                [row.position + row.shift for row in rows],
                [row.token for row in rows],
            ],
            dtype=torch.int64,
            pin_memory=self._pins,
        )
        # From pinned memory, so that a step that carries a pass waits for no earlier one.
        on_device = fields.to(self.device, non_blocking=True).unbind()
        pool, positions, rotary, tokens = on_device
        slots = self._page_table[pool, positions].to(torch.int64)
        return DecodeRows(pool, positions, rotary, tokens, slots, fields[1] + 1)


def build(model_runner: Any, config: GateConfig) -> Verifier:
    """The verifier that `config` asks for.

    On the invariant path SGLang's own decode, graphs included, is canonical and verifies. On the
    stock path a CPU's attention is, row by row; a GPU's is not, so the verifier brings its own.
    """
    assert config.rows is not None
    _refuse_rows(config.rows, places(model_runner, model_runner.attn_backend))
    if config.invariant:
        graphs = model_runner.decode_cuda_graph_runner
        if graphs is not None and max(graphs.capture_bs) < config.rows:
            # Without a graph the backend may split long rows otherwise than within one.
            raise GateError(
                f"--gate-rows is {config.rows}, but the largest decode graph has "
                f"{max(graphs.capture_bs)} rows: lower it, or raise --cuda-graph-max-bs-decode."
            )
        if graphs is not None and graphs.disable_padding and config.rows not in graphs.capture_bs:
            raise GateError(
                f"--gate-rows is {config.rows}, but no decode graph has as many rows, and with "
                "--disable-cuda-graph-padding none of more serves a verify pass: drop that option, "
                "or name this number in --cuda-graph-bs-decode."
            )
        return Verifier(model_runner, config.rows, graphs=graphs)
    if model_runner.device == "cpu" or config.policy == "observe":
        if config.policy != "observe":
            layer_rules.refuse_others(model_runner.attn_backend, model_runner)
        return Verifier(model_runner, config.rows)
    backend, graphs = verify_backend.build(model_runner, config.rows)
    return Verifier(model_runner, config.rows, graphs=graphs, backend=backend)


def places(runner: Any, backend: Any) -> float:
    """For rows of a forward without a graph. SGLang's backends for GPUs keep as many as the server
    runs requests; torch-native attention keeps none, and needs none.
    """
    return math.inf if attends_row_by_row(backend) else runner.req_to_token_pool.size


def _refuse_rows(rows: int, requests: float) -> None:
    if rows > requests:
        raise GateError(
            f"--gate-rows is {rows}, but the server runs {requests} requests at most, and no pass "
            "has more rows: lower it, or raise --max-running-requests."
        )


@contextmanager
def scratch_rows(runner: Any, count: int) -> Iterator[None]:
    """Page-table row 1 holds slots 1 to `count` meanwhile. Only before the first request."""
    table = runner.req_to_token_pool.req_to_token
    before = table[1, :count].clone()
    table[1, :count] = torch.arange(1, count + 1, dtype=table.dtype, device=table.device)
    try:
        with window_pool.scratch(runner.token_to_kv_pool, count):
            yield
    finally:
        table[1, :count] = before


def _drawn(logits: torch.Tensor, rows: Sequence[RowInput]) -> Iterator[tuple[int, int, float]]:
    """Index, token and margin of the rows that are drawn with a seed."""
    seeded = [i for i, row in enumerate(rows) if row.draw is not None]
    if seeded:
        draws = [draw for row in rows if (draw := row.draw) is not None]
        positions = [rows[i].position for i in seeded]
        filtered = any(draw.filters for draw in draws)
        drawn = seeded_top2(
            logits[seeded], stack(draws, positions, logits.device), filtered=filtered
        )
        yield from zip(seeded, drawn.ids.tolist(), drawn.margin.tolist(), strict=True)


def _logprobs(
    logits: torch.Tensor, rows: Sequence[RowInput], tokens: Sequence[int]
) -> dict[int, RowLogprobs]:
    """Log-probs by row index, for the rows that want them; computed over these at once."""
    wanted = [(i, row.logprobs) for i, row in enumerate(rows) if row.logprobs is not None]
    if not wanted:
        return {}
    asked = [i for i, _ in wanted]
    temperatures = [[logprob_temperature(rows[i].draw)] for i in asked]
    scale = torch.tensor(temperatures, device=logits.device)
    found = logprobs.of_logits(logits[asked], scale)
    chosen = found.gather(-1, torch.tensor([[tokens[i]] for i in asked], device=found.device))
    top = logprobs.ranked(found, max(k for _, (k, _) in wanted))
    values, ids = top.values.tolist(), top.indices.tolist()
    return {
        i: RowLogprobs(
            token,
            (values[n][:k], ids[n][:k]) if k > 0 else None,
            None if given is None else found[n, list(given)].tolist(),
        )
        for n, ((i, (k, given)), [token]) in enumerate(zip(wanted, chosen.tolist(), strict=True))
    }
