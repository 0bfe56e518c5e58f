"""SGLang's frontend language with the gate's switch, in programs of clients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from margingate.runtime.request.record import SWITCH


class Endpoint(RuntimeEndpoint):
    """A backend whose programs are gated or not, whatever the server's default is.

    `sgl.gen` has a fixed list of arguments, so the switch is one for all that a backend runs.
    """

    def __init__(self, base_url: str, *, deterministic: bool, **options: Any) -> None:
        """`options`: RuntimeEndpoint's."""
        super().__init__(base_url, **options)
        self.deterministic = deterministic

    def generate(self, s: Any, sampling_params: Any) -> Any:
        """As RuntimeEndpoint's, with the switch among the parameters."""
        return super().generate(s, self._switched(sampling_params))

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[Any]:
        """As RuntimeEndpoint's, with the switch among the parameters."""
        yield from super().generate_stream(s, self._switched(sampling_params))

    def _switched(self, sampling_params: Any) -> Any:
        params = copy.copy(sampling_params)
        as_sent = params.to_srt_kwargs
        params.to_srt_kwargs = lambda: {**as_sent(), SWITCH: self.deterministic}
        return params
