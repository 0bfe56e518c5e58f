"""Pages of the documentation that are made from the code: docs/options.md and docs/api.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields
from typing import Any

from margingate import api
from margingate.config import GateConfig

FOR_TESTS = ("simulate_trigger_rate", "simulate_flip_rate", "debug", "study", "inject_faults")

# What a reader may want to know beyond the help on the command line, by field of GateConfig.
NOTES = {
    "policy": "With `observe`, no request is gated and no answer changes.",
    "threshold": "The margin of a row is its largest logit minus its second largest. Rows that "
    "are canonical are never flagged. [Calibration](calibration.md) finds a threshold.",
    "calibration": "`margingate calibrate` makes the file. A file for another model, device, "
    "dtype, precision of `lm_head`, attention backend, tensor-parallel size or version of torch or "
    "SGLang is refused.",
    "guarantee": "[limits.md](limits.md#the-guarantee) compares the two.",
    "fast_path": "[numerics.md](numerics.md#canonical-decode-steps) explains how decode steps "
    "are made canonical. With `stock` on a GPU, the verifier has attention and a CUDA graph of "
    "its own.",
    "repair": "[verification.md](verification.md#why-a-span) compares the two.",
    "rows": "From 1 to 1,024, and on a GPU at most `--max-running-requests`. The default is "
    "lowered to that, and without `stock` to the rows of the largest decode graph. Answers "
    "depend on this number. On the stock fast path, use 256 for more than 64 gated requests at "
    "once, and 64 for up to 16.",
    "max_delay": "[verification.md](verification.md#when-a-pass-is-due) explains `auto`.",
    "overlap": "[verification.md](verification.md#overlap-scheduling) says what waits for what.",
    "prefill": "On a GPU with Triton attention the check at start finds that prompts may share "
    "forwards. Elsewhere gated prompts are prefilled alone "
    "([numerics.md](numerics.md#canonical-prefill)).",
    "prefill_chunk": "The default is lowered to `--chunked-prefill-size`. A larger number is "
    "refused.",
    "probe": "The measurement is kept in `~/.cache/margingate`. Another device, model, attention "
    "backend or version is measured anew.",
    "audit_rate": "[calibration.md](calibration.md#audits) explains audits. `/server_info` has "
    "their results under `audit`.",
    "events_endpoint": "[events.md](events.md) describes the messages.",
    "simulate_trigger_rate": "Needs `--gate-fast-path stock` and `--load-format dummy`.",
    "simulate_flip_rate": "Needs `--load-format dummy`.",
}

# What stands for None, by field.
NO_DEFAULT = {"rows": "by device", "prefill_chunk": "by device", "max_delay": "auto"}

OPTIONS = """\
# Options

Made from `margingate/config.py` by `margingate reference options > docs/options.md`.

Every option needs `--deterministic-gate`. In Python, `--gate-max-delay` is the argument
`gate_max_delay` of `sglang.Engine`. A *row* is the computation that chooses one output token. A row
is *canonical* if its bits depend on its own request alone ([all words](verification.md#words)).
"""

API = """\
# API

Made from `margingate/api.py` by `margingate reference api > docs/api.md`. Which requests are gated
and what is refused is in [limits.md](limits.md#request-parameters). Words such as row and flip are
explained in [verification.md](verification.md#words).

## Parameters of a request
"""

RECORD = """
## The record of an answer

`meta_info["gate"]` in answers of `/generate` and `sglang.Engine`. Chat completions and completions
have it as `metadata.gate`, a list with a record for each choice, and the fingerprint as
`system_fingerprint`; in a stream it is in the last chunk of each choice. Other routes are in
[limits.md](limits.md#sglangs-features). An answer that was not gated has `gated`, `because`,
`prompt` and `weight_generations` only.
"""

COUNTS = """
## Counters

They are in the record of a gated answer, and summed over all gated requests in `/server_info`.
"""

SERVER = """
## The state of a server

`GET /server_info` has it under `internal_states[0].margingate`, beside the counters. Here `steps`
counts tokens; [the metrics](metrics.md) count forwards as steps. Look at two figures: `missed`
should be 0, and `integrity` should be `ok`. If `reasons` has nothing but `canonical`, no row rested
on the threshold.
"""

REPLICAS = """
### `all_replicas`

With `--dp-size` above 1, `internal_states` has an entry for each replica, in their order, and each
has this as well, about all of them. The counters above are in it too, summed.
"""


def options() -> str:
    """docs/options.md: a row for each field of GateConfig."""
    listed = fields(GateConfig)
    served = [option for option in listed if option.name not in FOR_TESTS]
    tests = [option for option in listed if option.name in FOR_TESTS]
    return f"{OPTIONS}\n{_options(served)}\n## For tests and benchmarks\n\n{_options(tests)}"


def page_of_api() -> str:
    """docs/api.md: parameters, the record of an answer, counters and the state of a server."""
    return "\n".join(
        (
            API,
            _entries("parameter", api.PARAMETERS) + RECORD,
            _entries("key", api.RECORD) + COUNTS,
            _entries("key", api.COUNTS) + SERVER,
            _entries("key", api.SERVER) + REPLICAS,
            _entries("key", api.REPLICAS) + "\n### `tally`\n",
            _entries("key", api.TALLY) + "\n### `audit`\n",
            _entries("key", api.AUDIT),
        )
    )


PAGES = {"options": options, "api": page_of_api}


def _options(listed: Iterable[Field[Any]]) -> str:
    rows = [(f"`{_flag(o)}`", f"`{_default(o)}`", _described(o)) for o in listed]
    return _table(("option", "default", "what it does"), rows)


def _flag(option: Field[Any]) -> str:
    return "--gate-" + option.name.replace("_", "-")


def _default(option: Field[Any]) -> str:
    if option.default is None:
        return NO_DEFAULT.get(option.name, "none")
    return "off" if option.default is False else f"{option.default}"


def _described(option: Field[Any]) -> str:
    """The help of the command line, with values and options as code, and the note."""
    text = re.sub(
        r"--gate-[\w-]*\w(?: (?:stock|observe|auto))?", r"`\g<0>`", option.metadata["help"]
    )
    text = re.sub(r"custom_params\['(\w+)'\]", r'`custom_params["\1"]`', text)
    text = re.sub(r"'(\w+)'", r"`\1`", text)
    for choice in option.metadata.get("choices", ()):
        text = re.sub(rf"(^|; ){choice}:", rf"\1`{choice}`:", text)
    return f"{text} {NOTES.get(option.name, '')}".strip()


def _entries(head: str, entries: Sequence[api.Entry]) -> str:
    return _table((head, "meaning"), [(f"`{name}`", meaning) for name, meaning in entries])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(map(_line, (head, ["---"] * len(head), *rows)))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
