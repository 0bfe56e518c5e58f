"""The gate's record in `meta_info`, as the launcher's process puts it together."""

from __future__ import annotations

from typing import Any

from margingate.runtime.request.record import INFO_KEY


def update_request_meta_info(
    original: Any, manager: Any, meta_info: dict[str, Any], state: Any, *of_output: Any
) -> None:
    """AROUND TokenizerManager.update_request_meta_info: the record is an object, not a list.

    SGLang takes customized info for a list with an entry a token: it joins those of all outputs,
    cuts them by tokens for a stream, and repeats what it has. So it does not get to see the record.

    Args:
        meta_info: of one output of a request. Mutated: gets the record where the output has one.
        of_output: customized info (by key, a list of entries for each request; not mutated), the
            index of the request, and why it finished.
    """
    info, index, finish_reason = of_output
    rest = {key: entries for key, entries in info.items() if key != INFO_KEY}
    original(manager, meta_info, state, rest, index, finish_reason)
    if INFO_KEY in info:
        for record in filter(None, info[INFO_KEY][index]):
            meta_info[INFO_KEY] = record
