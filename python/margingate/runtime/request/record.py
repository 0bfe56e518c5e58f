"""What the gate keeps with each SGLang request: is it gated, its counts, its withheld end."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from margingate.config import GateConfig
from margingate.runtime.request.sampling_params import Draw, Penalties

SWITCH = "deterministic"
FAULT_ROWS = "gate_fault_rows"
FORCED_IDS = "gate_forced_ids"
COLUMNS = "gate_columns"
# A gated prompt's columns are canonical; it must not meet the columns of a batched prefill.
CACHE_NAMESPACE = "margingate:"
_CANONICAL, _FLAGGED = 1, 2  # marks of a row
INFO_KEY = "gate"  # of the record in `meta_info` and in OpenAI's `metadata`


@dataclass(slots=True)
class Counts:
    """Per request and, summed, per scheduler. Rows and tokens; names in `_s` count seconds."""

    steps: int = 0  # rows emitted, prefill's included
    flagged: int = 0  # rows whose margin asked for verification
    replayed: int = 0  # rows verified only because a flagged row brought them along
    verified: int = 0  # rows computed by verify passes
    flips: int = 0  # mismatches repaired
    missed: int = 0  # mismatches at rows already sent: the client's token stands
    rolled_back: int = 0  # tokens dropped by flips, the replaced ones included
    repaired: int = 0  # K/V columns rewritten in place
    passes: int = 0  # verify passes; per request: passes it had rows in
    retractions: int = 0  # times its columns were taken and replayed
    drain_s: float = 0.0  # stopped, waiting for its last rows
    settle_s: float = 0.0  # emitted tokens waiting to be settled, drain included

    def add(self, other: Counts) -> None:
        """Add another record's numbers to this one's."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Hold:
    """The end of a stopped request, withheld until its rows are settled."""

    reason: Any  # SGLang's BaseFinishReason
    length: int | None
    since: float  # time.monotonic, seconds


@dataclass(frozen=True, slots=True)
class Kept:
    """What a retracted request keeps; its columns are replayed after the next prefill."""

    tokens: array[int]
    logprobs: dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class ColumnsWanted:
    """--gate-study: keep a request's K/V columns when it ends, or compare them with kept ones."""

    key: str
    keep: bool


class WeightsSeen(NamedTuple):
    """Weights that were in memory while a request was computed."""

    generation: int
    tokens: int  # of its output that are from before


@dataclass(slots=True)
class GateRequest:
    """The gate's state of one request; SGLang's `Req` carries it as `req.gate`."""

    key: str  # unique in this process, even where clients reuse a request id
    gated: bool
    ungated_because: str = ""
    refusal: str = ""
    draw: Draw | None = None  # None: greedy
    penalties: Penalties | None = None  # SGLang's own parameters are neutral then
    faults: frozenset[int] = frozenset()
    counts: Counts = field(default_factory=Counts)
    hold: Hold | None = None
    waits_since: float | None = None  # time.monotonic of the oldest token that is not settled
    kept: Kept | None = None
    margins: array[float] = field(default_factory=lambda: array("f"))  # by row, logits
    marks: bytearray = field(default_factory=bytearray)  # by row; those behind its end: _CANONICAL
    columns: Any = None  # digests of its columns, where an audit will want them
    prompt: str = ""  # a digest of its token ids
    prompt_length: int = 0  # tokens of it
    media: bool = False  # it has images, video or sound
    shift: int = 0  # of its decode rows' rotary positions, which images make
    forced: tuple[int, ...] = ()  # --gate-study: what is emitted, by row
    choices: list[tuple[Any, ...]] = field(default_factory=list)  # --gate-study: see study.force
    columns_wanted: ColumnsWanted | None = None  # --gate-study
    drift: dict[str, Any] | None = None  # --gate-study: of its columns from those kept
    weights: list[WeightsSeen] = field(default_factory=list)  # in order
    mixed: bool = False  # it holds columns of weights that were replaced
    stands: int = 0  # tokens of replaced weights: the present ones have no say in them
    injected_first: int | None = None  # what prefill chose before a fault replaced it
    grammar_start: Any = None  # a copy of SGLang's grammar object before the first token
    failed: bool = False  # by an exception of ours: it is about to end, see guard
    grammar_failed: bool = False  # it could not be copied, walked or asked: see constraints

    def begins(self, generation: int, tokens: int) -> None:
        """Its columns are computed from the first on, by the weights of this generation.

        `tokens`: of its output that it has already, and that are computed with again.
        """
        self.mixed = False
        ends = [*(later.tokens for later in self.weights[1:]), tokens]
        pairs = zip(self.weights, ends, strict=False)
        self.weights = [seen for seen, end in pairs if end > seen.tokens]  # which gave some of them
        if not self.weights or self.weights[-1].generation != generation:
            self.weights.append(WeightsSeen(generation, tokens))
        self.stands = tokens if len(self.weights) > 1 else 0

    def crosses(self, generation: int, tokens: int) -> None:
        """It holds columns, and has `tokens` of its output, as the weights are replaced."""
        self.mixed = True
        self.weights.append(WeightsSeen(generation, tokens))
        self.stands = tokens

    def generations(self, tokens: int) -> list[int]:
        """Of the weights that computed its columns or a token of its output of so many."""
        return [
            seen.generation for i, seen in enumerate(self.weights) if i == 0 or seen.tokens < tokens
        ]

    def note_row(self, margin: float, *, flagged: bool, canonical: bool) -> None:
        """A row was emitted, with this margin in logits. Of one that is canonical and not flagged,
        as most are, `margins` alone may be told.
        """
        if flagged or not canonical:
            if untold := len(self.margins) - len(self.marks):
                self.marks.extend(bytes([_CANONICAL]) * untold)
            self.marks.append(_FLAGGED * flagged | _CANONICAL * canonical)
        self.margins.append(margin)

    def was_flagged(self, row: int) -> bool:
        """Whether the row (from 1) was, as it was emitted; False for one that is not there."""
        return row <= len(self.marks) and bool(self.marks[row - 1] & _FLAGGED)

    def were_canonical(self, rows: int) -> bytes:
        """Of each of the first `rows`, 1 if it was canonical as it was emitted, else 0."""
        marks = self.marks[:rows].ljust(min(rows, len(self.margins)), bytes([_CANONICAL]))
        return bytes(mark & _CANONICAL for mark in marks)

    def forget_rows(self, kept: int) -> None:
        """Drop what is known of the rows after the first `kept`."""
        del self.margins[kept:]
        del self.marks[kept:]
        self.weights = [seen._replace(tokens=min(seen.tokens, kept)) for seen in self.weights]

    def summary(self, config: GateConfig) -> dict[str, Any]:
        """For `meta_info["gate"]`."""
        if not self.gated:
            choices = {"choices": self.choices} if config.study else {}
            said = {"gated": False, "because": self.ungated_because, "prompt": self.prompt}
            return said | choices | self._drift()
        return {
            "gated": True,
            "guarantee": config.guarantee,
            "fast_path": config.fast_path,
            "policy": config.policy,
            "threshold": config.threshold,
            "prompt": self.prompt,
            **({} if self.draw is None else {"seed": self.draw.seed}),
            **({"simulated": True} if config.simulates else {}),
            **asdict(self.counts),
            **self._drift(),
        }

    def _drift(self) -> dict[str, Any]:
        return {} if self.drift is None else {"columns": self.drift}


LOGPROB_LISTS = (
    "output_token_logprobs_val",
    "output_token_logprobs_idx",
    "output_top_logprobs_val",
    "output_top_logprobs_idx",
    "output_token_ids_logprobs_val",
    "output_token_ids_logprobs_idx",
)


def logprob_lists(req: Any) -> dict[str, list[Any]]:
    """The request's output log-prob lists that are kept (some stay empty), by name."""
    if not req.return_logprob:
        return {}
    lists = {name: getattr(req.logprob, name) for name in LOGPROB_LISTS}
    return {name: values for name, values in lists.items() if values}


def is_gated(req: Any) -> bool:
    """Whether this SGLang request is gated; False for requests made before the gate was up."""
    gate = getattr(req, "gate", None)
    return gate is not None and gate.gated


def gated_of(reqs: Iterable[Any]) -> list[Any]:
    """Those of these SGLang requests that are gated. Runs for each row of each step."""
    return [req for req in reqs if (gate := getattr(req, "gate", None)) is not None and gate.gated]


def not_an_object(custom: Any) -> str:
    """The sentence that refuses custom_params that are no object; empty for one."""
    return "" if isinstance(custom, dict) else f"custom_params is {custom!r}: give an object."


def not_a_switch(value: Any) -> str:
    """The sentence that refuses a value of the switch; empty for true and false."""
    return (
        ""
        if isinstance(value, bool)
        else f"custom_params.{SWITCH} is {value!r}: give true or false."
    )
