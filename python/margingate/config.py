"""The gate's options: one frozen record, validated once, from which the command line is made."""

from __future__ import annotations

import json
import math
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from margingate.core.ledger import GUARANTEES, REPAIRS
from margingate.core.policy import POLICIES
from margingate.errors import GateError
from margingate.option_checks import (
    check_choice,
    check_endpoint,
    check_range,
    check_router_threshold,
    check_share,
    check_switch,
)

FAST_PATHS = ("invariant", "stock")
DEFAULTS = ("on", "off")
OVERLAPS = ("auto", "off", "on")
PROBES = ("cached", "fresh")
PREFILLS = ("auto", "alone")
MAX_ROWS = 1024
# YAML reads `off` without quotes as False, and SGLang passes that on as text.
_SWITCHED = {True: "on", False: "off", "true": "on", "false": "off"}


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    """A dataclass field that is also the command-line option `--gate-<name>`.

    Args:
        extra: `choices` of a text; `metavar` of any other value; `parse`, which makes it of text
            and raises ValueError; `auto`, what the text "auto" stands for where it is a value.
    """
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True)
class GateConfig:
    """What the gate does. Builtins only: it travels to the scheduler inside SGLang's arguments.

    `threshold` is a number of logits here: `make_config` resolves 'auto', this class refuses it.
    `rows` and `prefill_chunk` are None until the device is known.

    Raises:
        GateError: at construction, for any value that is out of range.
    """

    policy: str = _option(
        "margin",
        "margin: verify rows whose margin is below the threshold; always: verify every row; "
        "observe: record margins and change nothing.",
        choices=POLICIES,
    )
    threshold: float = _option(
        0.5,
        "Flag a row when its top-1 minus top-2 logit is below this; 'auto' takes the value from "
        "--gate-calibration.",
        metavar="LOGITS|auto",
        parse=float,
        auto="auto",  # until `make_config` has read the calibration file
    )
    router_threshold: float | None = _option(
        None,
        "For a mixture of experts with --gate-fast-path stock: flag a row as well when, in any "
        "layer, the last expert chosen and the next one are closer than this: in logits of the "
        "router, and with a correction bias in its scores.",
        metavar="MARGIN",
        parse=float,
    )
    calibration: str | None = _option(
        None, "Calibration file for --gate-threshold auto.", metavar="FILE"
    )
    default: str = _option(
        "on",
        "on: greedy requests, and those that sample with a seed, are gated unless they set "
        "'deterministic' (or custom_params['deterministic']) to false; off: only those that set "
        "it to true.",
        choices=DEFAULTS,
    )
    guarantee: str = _option(
        "sparse",
        "sparse: a row above the threshold is settled at once; exact: a row is settled only when "
        "it was computed canonically, so streaming waits for its replay.",
        choices=GUARANTEES,
    )
    fast_path: str = _option(
        "invariant",
        "invariant: run the decode step itself so that it is canonical, by attention with a fixed "
        "split and linear layers kept within one class of row counts; stock: leave SGLang's "
        "kernels alone.",
        choices=FAST_PATHS,
    )
    repair: str = _option(
        "span",
        "span: a flagged row is replayed with every earlier row that is not canonical yet; "
        "column: the flagged row alone (for study: it does not restore determinism).",
        choices=REPAIRS,
    )
    rows: int | None = _option(
        None,
        "Rows of a verify pass; fixed, because it is part of what is canonical. "
        "Default: 16 on a CPU, 64 on a GPU, 128 there with --gate-fast-path stock.",
        metavar="V",
        parse=int,
    )
    max_delay: int | None = _option(
        None,
        "Flagged rows wait at most this many decode steps to share a verify pass; 0 verifies at "
        "once. Default, or auto: 0, or on a GPU with --gate-fast-path stock by measured latencies "
        "and the flips seen.",
        metavar="STEPS|auto",
        parse=int,
        auto=None,
    )
    overlap: str = _option(
        "auto",
        "on: leave SGLang's overlap scheduling on, and wait for the step in flight only when "
        "something is to be verified; off: switch it off; auto: on with a GPU, off on a CPU.",
        choices=OVERLAPS,
    )
    prefill: str = _option(
        "auto",
        "auto: gated prompts share prefill forwards where a row's bits were found not to depend "
        "on that, and go alone elsewhere; alone: always alone.",
        choices=PREFILLS,
    )
    prefill_chunk: int | None = _option(
        None,
        "Where gated prompts are prefilled alone, chunks are cut at multiples of this many tokens, "
        "and prefix hits to the same grid. Default: 64 on a CPU, 512 on a GPU.",
        metavar="TOKENS",
        parse=int,
    )
    probe: str = _option(
        "cached",
        "cached: use what an earlier start on this device with these versions measured, if there "
        "was one; fresh: measure again which row counts give a row the same bits.",
        choices=PROBES,
    )
    audit_rate: float = _option(
        0.0,
        "Replay this share of the finished requests, 0 to 1, canonically from the prompt when the "
        "server is idle, and count those whose tokens differ.",
        metavar="SHARE",
        parse=float,
    )
    events_endpoint: str | None = _option(
        None,
        "Publish flags, verdicts, flips and repairs at this address, for margingate watch and "
        "other subscribers; a slow or absent subscriber never slows a step.",
        metavar="tcp://HOST:PORT|ipc://PATH",
    )
    simulate_trigger_rate: float | None = _option(
        None,
        "For benchmarks with dummy weights: flag this share of the rows that are not canonical, 0 "
        "to 1, by a hash of prompt and row instead of by their margins.",
        metavar="SHARE",
        parse=float,
    )
    simulate_flip_rate: float = _option(
        0.0,
        "For benchmarks with dummy weights: let the verifier choose another token at this share "
        "of the flagged rows, 0 to 1, so that they are rolled back. The answers are wrong.",
        metavar="SHARE",
        parse=float,
    )
    debug: bool = _option(
        False, "Check slots, ledger and radix tree against each other after every step. Slow."
    )
    study: bool = _option(
        False,
        "For margingate calibrate and study: compare K/V columns where custom_params"
        "['gate_columns'] asks for it; with --gate-policy observe, honour custom_params"
        "['gate_forced_ids'], emitted whatever the model chooses, and report each step's choice.",
    )
    inject_faults: bool = _option(
        False,
        "For tests only: honour custom_params['gate_fault_rows'], which corrupts the tokens that "
        "the fast path emits at these rows.",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            if choices := option.metadata.get("choices"):
                check_choice(option_name(option.name), getattr(self, option.name), choices)
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not self.threshold >= 0:
            raise GateError(
                f"--gate-threshold is {self.threshold!r}, but a margin is compared with it: "
                "give a number of logits >= 0, or 'auto' with --gate-calibration."
            )
        if math.isinf(self.threshold):
            raise GateError(
                "--gate-threshold is infinite: use --gate-policy always to verify every row."
            )
        check_router_threshold(self.router_threshold)
        check_range("--gate-rows", self.rows, 1, MAX_ROWS)
        check_range("--gate-max-delay", self.max_delay, 0, 1 << 20)
        check_range("--gate-prefill-chunk", self.prefill_chunk, 1, 1 << 20)
        if self.events_endpoint is not None:
            check_endpoint("--gate-events-endpoint", self.events_endpoint)
        check_share("--gate-audit-rate", self.audit_rate)
        if self.audit_rate > 0 and self.policy == "observe":
            raise GateError(
                "--gate-audit-rate replays gated requests, and --gate-policy observe gates none: "
                "drop one of the two."
            )
        self._check_simulation()
        check_switch("--gate-debug", self.debug)
        check_switch("--gate-inject-faults", self.inject_faults)
        check_switch("--gate-study", self.study)
        if self.study and self.overlap == "on":
            raise GateError(
                "--gate-study forces tokens on requests between two steps: use it with "
                "--gate-overlap off, or drop it."
            )
        if self.guarantee == "exact" and (self.repair == "column" or self.policy == "observe"):
            raise GateError(
                "--gate-guarantee exact needs --gate-repair span and a policy that verifies: "
                "drop --gate-repair column, and use --gate-policy margin or always."
            )

    def _check_simulation(self) -> None:
        check_share("--gate-simulate-flip-rate", self.simulate_flip_rate)
        if self.simulate_trigger_rate is not None:
            check_share("--gate-simulate-trigger-rate", self.simulate_trigger_rate)
            if self.policy != "margin" or self.fast_path != "stock":
                raise GateError(
                    "--gate-simulate-trigger-rate stands for margins of rows that are not "
                    "canonical: use --gate-policy margin and --gate-fast-path stock, or drop it."
                )
        if self.simulate_flip_rate > 0 and (self.policy == "observe" or self.audit_rate > 0):
            raise GateError(
                "--gate-simulate-flip-rate makes verdicts up: drop it, or --gate-policy observe, "
                "which has none, and --gate-audit-rate, which would find them wrong."
            )

    @property
    def simulates(self) -> bool:
        """Whether verdicts are made up, for a benchmark."""
        return self.simulate_trigger_rate is not None or self.simulate_flip_rate > 0

    @property
    def invariant(self) -> bool:
        """Whether the decode step itself is made canonical; "observe" changes nothing."""
        return self.fast_path == "invariant" and self.policy != "observe"


def option_name(name: str) -> str:
    """The command-line option of a field."""
    return "--gate-" + name.replace("_", "-")


def make_config(options: dict[str, Any], model: dict[str, str]) -> GateConfig:
    """Build the record from raw options; a threshold of 'auto' is read from the calibration file.

    Args:
        options: text or Python values by field name; absent names keep their defaults.
        model: identity of the model served, compared with a calibration file's.

    Raises:
        GateError: an unknown name, or a value that does not parse or is out of range.
    """
    known = {option.name: option for option in fields(GateConfig)}
    for name in options:
        if name not in known:
            listed = ", ".join(sorted(f"gate_{n}" for n in known))
            raise GateError(f"gate_{name} is not an option of the gate: use one of {listed}.")
    values = {name: _parse(known[name], value) for name, value in options.items()}
    if values.get("threshold") == "auto":
        values["threshold"] = load_threshold(values.get("calibration"), model)
    return GateConfig(**values)


def _parse(option: Field[Any], value: Any) -> Any:
    parse = option.metadata.get("parse")
    if "off" in option.metadata.get("choices", ()) and isinstance(value, bool | str):
        return _SWITCHED.get(value, value)
    if parse is None or not isinstance(value, str):
        return value
    if value == "auto" and "auto" in option.metadata:
        return option.metadata["auto"]
    try:
        return parse(value)
    except ValueError:
        kind = "whole number" if parse is int else "number"
        raise GateError(
            f"{option_name(option.name)} is {value!r}, which is not a {kind}: give a {kind}."
        ) from None


def load_threshold(path: str | None, made_for: dict[str, str], part: str = "model") -> float:
    """Read the threshold from a calibration file made for exactly this model.

    The file is JSON: `{"schema": 1, "model": {...}, "machine": {...}, "threshold": float}`; every
    key of `made_for` here must have the same value in the file's `part`.

    Raises:
        GateError: no file, not a calibration file, or one made for another model.
    """
    if path is None:
        raise GateError(
            "--gate-threshold is 'auto' without --gate-calibration: name a calibration file, or "
            "give the threshold as a number."
        )
    try:
        record = json.loads(Path(path).read_text())
        found, threshold = dict(record[part]), float(record["threshold"])
        schema = record["schema"]
    except OSError as error:
        raise GateError(
            f"--gate-calibration {path} cannot be read ({error.strerror}): check the path."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise GateError(
            f"--gate-calibration {path} is not a calibration file: make one for this model."
        ) from None
    if schema != 1:
        raise GateError(
            f"--gate-calibration {path} has schema {schema!r}, this version reads 1: recalibrate."
        )
    for key, value in made_for.items():
        if found.get(key) != value:
            raise GateError(
                f"--gate-calibration {path} was made for {key} {found.get(key)!r}, but the "
                f"server has {value!r}: calibrate this one, or give the threshold as a number."
            )
    return threshold
