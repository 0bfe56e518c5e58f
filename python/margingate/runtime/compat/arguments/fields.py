"""Fields of SGLang's settings and requests against the tables of those that were looked at."""

from __future__ import annotations

import pkgutil

from margingate.runtime.compat.arguments import request_table, settings_table

_REQUESTS = {
    "SamplingParams": "sampling.sampling_params.SamplingParams",
    "GenerateReqInput": "managers.io_struct.GenerateReqInput",
    "TokenizedGenerateReqInput": "managers.io_struct.TokenizedGenerateReqInput",
}


def known() -> dict[str, set[str]]:
    """By class, below sglang.srt: the fields in its table that this release has."""
    found = {
        path: {field for field, _ in request_table.rows(name)} for name, path in _REQUESTS.items()
    }
    found["server_args.ServerArgs"] = set(settings_table.KNOWN)
    return found


def differences() -> dict[str, tuple[list[str], list[str]]]:
    """By class: fields that no table has, and names in its table that are no fields."""
    found = {}
    for path, names in known().items():
        there = set(request_table.fields_of(pkgutil.resolve_name(f"sglang.srt.{path}")))
        found[path] = sorted(there - names), sorted(names - there)
    return found
