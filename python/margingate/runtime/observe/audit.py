"""Finished requests are replayed while nothing else runs, and compared: tokens, and bits.

Besides the tokens these are compared bit by bit, for the rows and columns that promise theirs:
margins, log-probs where the client asked for them, and digests of the K/V columns. What a request
had is noted when it ends, its columns' digests on the device just before their slots may be
written again. A replay (`replay`) lives within one idle turn of the scheduler's loop and leaves
nothing behind. Between two forwards it looks for messages to the scheduler; if there is one it
gives way, and starts anew another time.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
import zmq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.utils import is_health_check_generate_req

from margingate.confidence import miss_bound
from margingate.config import GateConfig
from margingate.core.audit import Audits, Bits, Recorded
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.kv import columns, tree
from margingate.runtime.compat.model import weights
from margingate.runtime.observe.fingerprint import Fingerprint
from margingate.runtime.observe.replay import Part, Replay
from margingate.runtime.probe.startup_checks import StartupChecks
from margingate.runtime.request.observer import Observer
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import is_gated
from margingate.runtime.sampling import constraints
from margingate.runtime.verify.column_bits import ColumnBits
from margingate.runtime.verify.verifier import RowResult

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95  # of the bound, one-sided


class Auditor(Observer):
    """Notes what ended, and replays it; all on the scheduler's thread."""

    def __init__(
        self,
        scheduler: Any,
        config: GateConfig,
        checks: StartupChecks,
        requests: OpenRequests,
        fingerprint: Fingerprint,
    ) -> None:
        assert config.prefill_chunk is not None
        self._scheduler, self._checks, self._chunk = scheduler, checks, config.prefill_chunk
        self._requests, self._fingerprint = requests, fingerprint
        seed = settings.view(scheduler.server_args).random_seed or 0
        self.audits = Audits(config.audit_rate, seed)
        self._columns = ColumnBits(self._scheduler.token_to_kv_pool_allocator.get_kvcache())
        if self.audits.rate > 0:
            # SciPy takes a while to load, and weights to reach the device: now, not while requests
            # are served.
            _bound(0, 1)
            table = self._scheduler.req_to_token_pool.req_to_token
            self._columns.of(table[0, :1].to(torch.int64))

    # -- while requests are served

    def freed(self, req: Any) -> None:
        """Digest the canonical columns of a request that ends, if it is gated and chosen.

        It is the last moment at which they are its own: its slots are free but hold what they
        held; forwards that are launched later write to them later. Nothing waits for the device.
        """
        if not is_gated(req) or not columns.holds(req):
            return
        if self.audits.rate == 0 or not self._is_audited(req):
            return
        count = min(self._requests.canonical_columns(req), _columns_of(req))
        table = self._scheduler.req_to_token_pool.req_to_token
        try:
            req.gate.columns = self._columns.of(table[columns.row(req), :count].to(torch.int64))
        except torch.OutOfMemoryError:
            logger.warning("margingate: no memory to digest the columns of request %s", req.rid)

    def ended(self, req: Any) -> None:
        """Note the request if it is chosen."""
        if not self._is_audited(req):
            return
        gate, rows = req.gate, len(req.output_ids_through_stop)
        columns = gate.columns
        # Of rows that are not canonical the client may have the fast path's.
        canonical = 0 if columns is None else max(len(columns) - len(req.origin_input_ids) + 1, 0)
        self.audits.add(
            Recorded(
                req.rid,
                array("q", req.origin_input_ids),
                array("q", req.output_ids_through_stop),
                gate.draw,
                gate.weights[0].generation,  # if it saw others, none is the present one
                # A draw's margin may have been computed in a batch that filters, and is not noted.
                margins=gate.margins[:rows] if gate.draw is None else array("f"),
                promised=gate.were_canonical(rows),
                logprobs=_logprobs(req, min(canonical, rows)),
                columns=columns,
            )
        )
        gate.columns = None

    def _is_audited(self, req: Any) -> bool:
        """Whether it is chosen; none with images, constrained, aborted, a score, a health check."""
        reason = req.finished_reason
        if reason is None or isinstance(reason, FINISH_ABORT) or is_health_check_generate_req(req):
            return False
        if not req.output_ids_through_stop or req.gate.media:  # a score; its images are gone
            return False
        return not constraints.constrained(req) and self.audits.chooses(req.rid)

    # -- while none are

    def idle(self) -> bool:
        """Replay one request, if one waits; returns whether. Only when SGLang is fully idle."""
        if not self.audits.waiting or self._is_called():
            return False
        if self._scheduler.weight_updater.offload_tags:  # the memory was given back
            return False
        if weights.session_is_open(self._scheduler):  # they may be written meanwhile
            return False
        recorded = self.audits.take(self._fingerprint.generation)
        if recorded is None:
            return False
        if not self._fits(recorded):
            self.audits.dropped += 1
            return False
        replay = Replay(self._scheduler, self._checks, self._chunk, recorded, self._columns)
        with closing(replay.parts()) as parts:
            self._compare(recorded, parts, replay)
        self._requests.observers.audited(recorded.rid)
        return True

    def _is_called(self) -> bool:
        """Whether a message waits for the scheduler: a request, an abort, a flush."""
        channels = self._scheduler.ipc_channels
        sockets = (channels.recv_from_tokenizer, channels.recv_from_rpc)
        return any(socket is not None and socket.poll(0, zmq.POLLIN) for socket in sockets)

    def _fits(self, recorded: Recorded) -> bool:
        """Whether there is room, counting what the radix tree can give up."""
        return recorded.size - 1 <= tree.room(self._scheduler)

    def _compare(self, recorded: Recorded, parts: Iterable[Part], replay: Replay) -> None:
        """Hold what the replay gives, a part for each forward, to what was noted."""
        held = _Comparison(recorded, self._columns.width)
        for part in parts:
            held.take(part)
            if held.wrong_token is not None:
                break
            if held.done < len(recorded.output) and not held.wrong and self._is_called():
                self.audits.interrupted(recorded)
                return
        mismatch = held.wrong_token is not None
        self.audits.compared(held.done, mismatch=mismatch, bits=held.bits, kinds=held.wrong)
        if mismatch:
            self._report_token(held)
        elif held.wrong:
            self._report_bits(held, replay)

    @staticmethod
    def _report_token(held: _Comparison) -> None:
        logger.warning(
            "margingate: an audit of request %s found token %d to be %d where its client got %d: "
            "raise --gate-threshold, or use --gate-guarantee exact.",
            held.recorded.rid,
            held.done,
            held.wrong_token,
            held.recorded.output[held.done - 1],
        )

    @staticmethod
    def _report_bits(held: _Comparison, replay: Replay) -> None:
        logger.warning(
            "margingate: an audit of request %s found the same tokens with other bits, first in "
            "%s, of a prompt of %d tokens that it prefilled in forwards of %s rows: a forward gave "
            "other bits than it was measured to give; please report it.",
            held.recorded.rid,
            " and ".join(f"{kind} {place}" for kind, place in held.wrong.items()),
            len(held.recorded.prompt),
            replay.rows_of(),
        )


@dataclass(slots=True)
class _Comparison:
    """A replay held to what was noted, up to the first token that differs."""

    recorded: Recorded
    width: int  # bits of a column
    done: int = 0  # tokens compared
    wrong_token: int | None = None  # the replay's, for the last one compared
    bits: Bits = field(default_factory=Bits)
    wrong: dict[str, int] = field(default_factory=dict)  # by kind: the first row (1) or column (0)

    def take(self, part: Part) -> None:
        """Compare one forward's columns and rows."""
        if part.columns is not None:
            self._take_columns(part.first, part.columns)
        for row in part.rows:
            self._take_row(row)
            if self.wrong_token is not None:
                return

    def _take_columns(self, first: int, columns: torch.Tensor) -> None:
        noted = self.recorded.columns[first : first + len(columns)].cpu()
        self.bits.columns += len(columns)
        self.bits.bits += len(columns) * self.width
        if differ := (noted != columns).nonzero().flatten().tolist():
            self.wrong.setdefault("column", first + differ[0])

    def _take_row(self, row: RowResult) -> None:
        recorded, i = self.recorded, self.done
        self.done += 1
        if row.token != recorded.output[i]:
            self.wrong_token = row.token
            return
        if i < len(recorded.margins) and recorded.promised[i]:
            self.bits.margins += 1
            self._take_float("margin", row.margin, recorded.margins, i)
        if i < len(recorded.logprobs) and row.logprobs is not None:
            self.bits.logprobs += 1
            self._take_float("log-prob", row.logprobs.token, recorded.logprobs, i)

    def _take_float(self, kind: str, value: float, noted: array[float], i: int) -> None:
        self.bits.bits += 32
        if array("f", [value]).tobytes() != noted[i : i + 1].tobytes():
            self.wrong.setdefault(kind, i + 1)


def _columns_of(req: Any) -> int:
    """Columns of prompt and answer; the last token has none."""
    return len(req.origin_input_ids) + max(len(req.output_ids_through_stop) - 1, 0)


def _logprobs(req: Any, rows: int) -> array[float]:
    """Log-probs of the first `rows` tokens as the client has them; empty without."""
    if not req.return_logprob:
        return array("f")
    return array("f", req.logprob.output_token_logprobs_val[:rows])


def observers(auditor: Auditor) -> tuple[Observer, ...]:
    """The auditor, where there is something to audit."""
    return (auditor,) if auditor.audits.rate > 0 else ()


def report(audits: Audits) -> dict[str, Any]:
    """For `/server_info`."""
    return {
        "rate": audits.rate,
        "waiting": audits.waiting,
        "audited": audits.audited,
        "tokens": audits.tokens,
        "mismatches": audits.mismatches,
        **asdict(audits.bits),
        "bit_mismatches": audits.bit_mismatches,
        "bit_mismatches_by_kind": dict(audits.by_kind),
        "dropped": audits.dropped,
        "mismatch_bound": bound(audits),
        "confidence": CONFIDENCE,
    }


def bound(audits: Audits) -> float:
    """With CONFIDENCE, the share of requests that an audit would find wrong is at most this."""
    return _bound(audits.mismatches, audits.audited)


@lru_cache(maxsize=1)
def _bound(mismatches: int, audited: int) -> float:
    return miss_bound(mismatches, audited, CONFIDENCE)
