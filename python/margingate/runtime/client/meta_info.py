"""The gate's record in `meta_info`, as the launcher's process puts it together."""

from __future__ import annotations

from typing import Any

from margingate.runtime.request import guard
from margingate.runtime.request.record import INFO_KEY


class _Merged(dict[str, Any]):
    """What the tokenizer process accumulates per request: it extends lists, this is one record."""

    def extend(self, entries: list[Any]) -> None:
        for entry in entries:
            self.update(entry or {})

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, slice) else super().__getitem__(key)


async def handle_batch_output(original: Any, manager: Any, received: Any) -> None:
    """AROUND TokenizerManager._handle_batch_output: `meta_info["gate"]` is a record, not a list."""
    try:
        _merge(manager, received)
    except Exception as error:  # raised here it would end the loop that serves all clients
        guard.note("TokenizerManager._handle_batch_output", error)
    await original(manager, received)


def _merge(manager: Any, received: Any) -> None:
    if getattr(received, "customized_info", None) is not None:
        for rid in received.rids:
            request_state = manager.rid_to_state.get(rid)
            if request_state is not None:
                request_state.customized_info_accumulated.setdefault(INFO_KEY, _Merged())
