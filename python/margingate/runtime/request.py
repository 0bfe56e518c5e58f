"""What the gate keeps with each SGLang request: is it gated, its counts, its withheld end."""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from margingate.config import GateConfig
from margingate.runtime.penalties import Penalties, take
from margingate.runtime.seeds import LARGEST_SEED, Draw, draw_of

SWITCH = "deterministic"
FAULT_ROWS = "gate_fault_rows"
FORCED_IDS = "gate_forced_ids"
COLUMNS = "gate_columns"
# A gated prompt's columns are canonical; it must not meet the columns of a batched prefill.
CACHE_NAMESPACE = "margingate:"
_UNGATED = "not-"
_serial = itertools.count(1)


@dataclass(slots=True)
class Counts:
    """Per request and, summed, per scheduler. Rows and tokens; seconds for `drain_s`."""

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
    flags: bytearray = field(default_factory=bytearray)  # by row: was it flagged
    canonical: bytearray = field(default_factory=bytearray)  # by row: was it, as it was emitted
    columns: Any = None  # digests of its columns, where an audit will want them
    prompt: str = ""  # a digest of its token ids
    forced: tuple[int, ...] = ()  # --gate-study: what is emitted, by row
    choices: list[tuple[Any, ...]] = field(default_factory=list)  # --gate-study: see study.force
    columns_wanted: ColumnsWanted | None = None  # --gate-study
    drift: dict[str, Any] | None = None  # --gate-study: of its columns from those kept
    generation: int = 0  # of the weights it was admitted with
    injected_first: int | None = None  # what prefill chose before a fault replaced it
    grammar_start: Any = None  # a copy of SGLang's grammar object before the first token
    failed: bool = False  # by an exception of ours: it is about to end, see guard
    grammar_failed: bool = False  # it could not be copied, walked or asked: see constraints

    def forget_rows(self, kept: int) -> None:
        """Drop what is known of the rows after the first `kept`."""
        del self.margins[kept:]
        del self.flags[kept:]
        del self.canonical[kept:]

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


def attach(req: Any, config: GateConfig) -> None:
    """Set `req.gate` from the request's own parameters, and its radix-tree namespace.

    Mutates the parameters of a gated request: its penalties are the gate's from here on.
    """
    gate = _classify(req, config)
    req.gate = gate
    gate.prompt = digest(req.origin_input_ids)
    if config.study:
        gate.columns_wanted = _columns_wanted(req)
    if gate.gated:
        gate.penalties = take(req.sampling_params)
        req.extra_key = CACHE_NAMESPACE + (req.extra_key or "")
    elif (req.extra_key or "").startswith((CACHE_NAMESPACE, _UNGATED)):
        req.extra_key = _UNGATED + req.extra_key  # also those that have it: no two may meet


def clip(req: Any) -> None:
    """Once SGLang has cut `max_new_tokens`: the least length, which the gate has, is no more."""
    penalties, room = req.gate.penalties, req.sampling_params.max_new_tokens
    if penalties is not None and penalties.min_new_tokens > room:
        req.gate.penalties = replace(penalties, min_new_tokens=room)


def without_room(req: Any) -> str:
    """Once SGLang has cut `max_new_tokens`: the sentence for faults that can be nowhere."""
    if not req.gate.faults or req.sampling_params.max_new_tokens > 0:
        return ""
    return (
        f"{FAULT_ROWS} is {sorted(req.gate.faults)}, but a prompt of {len(req.origin_input_ids)} "
        "tokens leaves no room for an answer: shorten the prompt, or raise --context-length."
    )


def digest(ids: Iterable[int]) -> str:
    """16 hexadecimal digits of token ids; ids that no vocabulary has included."""
    try:
        content = array("q", ids).tobytes()
    except (OverflowError, TypeError):  # refused: it stands for no answer
        return ""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _classify(req: Any, config: GateConfig) -> GateRequest:
    key = f"{next(_serial)}:{req.rid}"
    params = req.sampling_params
    custom = params.custom_params or {}
    if refusal := not_an_object(custom):
        return GateRequest(key, False, "refused", refusal)
    wanted = custom.get(SWITCH, config.default == "on")
    faults = custom.get(FAULT_ROWS, ())
    forced = custom.get(FORCED_IDS, ())
    refusal = (
        _malformed(wanted, faults, config)
        or _not_forcible(forced, req, config)
        or _outside_vocabulary(req.origin_input_ids, req.vocab_size)
    )
    if refusal:
        return GateRequest(key, False, "refused", refusal)
    ungated = (
        (not wanted, f"{SWITCH} is false" if SWITCH in custom else f"{SWITCH} is not set"),
        (config.policy == "observe", "policy observe"),
        (params.top_k > 1 and params.sampling_seed is None, "sampling has no seed"),
        (params.max_new_tokens == 0, "no token is generated"),
    )
    for applies, because in ungated:
        if applies:
            return GateRequest(key, False, because, forced=tuple(forced))
    draw = draw_of(params)
    if draw is not None and (refusal := _not_drawable(draw, params.n)):
        return GateRequest(key, False, "refused", refusal)
    if refusal := _not_yet_served(req):
        return GateRequest(key, False, "refused", refusal)
    return GateRequest(key, True, draw=draw, faults=frozenset(faults))


def _not_drawable(draw: Draw, copies: int) -> str:
    if type(draw.seed) is not int or not 0 <= draw.seed <= LARGEST_SEED:
        return f"sampling_seed is {draw.seed!r}: give a whole number from 0 to {LARGEST_SEED}."
    if copies > 1:
        return (
            f"n is {copies} with sampling_seed {draw.seed}, which would give the same answer "
            f"{copies} times: send {copies} requests with a seed each, or drop the seed."
        )
    return ""


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


def _malformed(wanted: Any, faults: Any, config: GateConfig) -> str:
    if sentence := not_a_switch(wanted):
        return sentence
    if faults and not config.inject_faults:
        return f"custom_params.{FAULT_ROWS} needs a server started with --gate-inject-faults."
    rows = isinstance(faults, list | tuple) and all(type(row) is int for row in faults)
    return "" if rows else f"custom_params.{FAULT_ROWS} is {faults!r}: give a list of row numbers."


def _not_forcible(forced: Any, req: Any, config: GateConfig) -> str:
    if forced and not (config.study and config.policy == "observe"):
        return (
            f"custom_params.{FORCED_IDS} needs a server started with --gate-study and "
            "--gate-policy observe."
        )
    if not isinstance(forced, list | tuple) or any(type(token) is not int for token in forced):
        return f"custom_params.{FORCED_IDS} is {forced!r}: give a list of token ids."
    return _outside_vocabulary(forced, req.vocab_size, f"custom_params.{FORCED_IDS}")


def _columns_wanted(req: Any) -> ColumnsWanted | None:
    """From {"keep": key} or {"against": key}; anything else is not asking."""
    custom = req.sampling_params.custom_params
    wanted = custom.get(COLUMNS) if isinstance(custom, dict) else None
    if not isinstance(wanted, dict) or len(wanted) != 1:
        return None
    ((what, key),) = wanted.items()
    return ColumnsWanted(str(key), what == "keep") if what in ("keep", "against") else None


def _outside_vocabulary(ids: Any, size: int, name: str = "input_ids") -> str:
    if not ids or not size or (min(ids) >= 0 and max(ids) < size):
        return ""
    bad = next(token for token in ids if not 0 <= token < size)
    return f"{name} holds {bad}, but the model's vocabulary is 0 to {size - 1}."


def _not_yet_served(req: Any) -> str:
    feature = _unserved(req)
    if not feature:
        return ""
    return (
        f"this request uses {feature}, which the deterministic gate cannot roll back yet: drop it, "
        f'or send "{SWITCH}": false, in sampling_params or beside OpenAI\'s parameters, to be '
        "served without the gate."
    )


def _unserved(req: Any) -> str:
    """The first feature of the request that the gate does not serve, or an empty string."""
    features = (
        (req.custom_logit_processor is not None, "custom_logit_processor"),
        (req.input_embeds is not None, "input_embeds"),
        (req.positional_embed_overrides is not None, "embedding overrides"),
        (req.lora_id is not None, "a LoRA adapter"),
        (req.session is not None, "a session"),
        (bool(req.return_hidden_states), "return_hidden_states"),
        (req.return_sampling_mask, "return_sampling_mask"),
    )
    return next((name for applies, name in features if applies), "")


def now() -> float:
    """Seconds on the clock that holds are timed with."""
    return time.monotonic()
