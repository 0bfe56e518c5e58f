"""What the gate knows of one forward, on its way with SGLang's result to where it is processed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from margingate.core.ledger import Row
from margingate.runtime.compat.kv.routed_experts import ChosenExperts
from margingate_kernels import Top2

_ATTRIBUTE = "margingate"  # of SGLang's LogitsProcessorOutput, which goes all the way


@dataclass(slots=True)
class MergedPass:
    """A verify pass that a decode step carries."""

    rows: tuple[Row, ...]
    due: str  # why
    start: float  # seconds of time.monotonic
    best: Top2  # of the rows with an input, by the verifier's logits
    experts: ChosenExperts | None = None  # of the same rows, where they are kept


@dataclass(slots=True)
class ForwardRecord:
    """With SGLang's logits of the forward; on the CPU by the time that its result is processed."""

    best: Top2 | None = None  # of each request's row: what the gate chose, and its margin
    router: torch.Tensor | None = None  # float32, of the same rows: their smallest router margin
    merged: MergedPass | None = None
    study: list[tuple[Any, ...]] | None = None  # see study.force
    copied: list[Any] = field(default_factory=list)  # on the device, kept while it is copied

    def to_cpu(self) -> None:
        """Start the copies of what is on a GPU; nothing waits here."""
        if self.best is not None and self.best.margin.is_cuda:
            self.best = self._copy(self.best, "margin")  # a fault alone reads the runner-up
        if self.router is not None and self.router.is_cuda:
            self.copied.append(self.router)
            self.router = self.router.to("cpu", non_blocking=True)
        if self.merged is not None and self.merged.best.margin.is_cuda:
            self.merged.best = self._copy(self.merged.best, "margin", "ids")
            if self.merged.experts is not None:
                self.copied += self.merged.experts.to_cpu()

    def _copy(self, best: Top2, *names: str) -> Top2:
        self.copied.append(best)
        copies = {name: getattr(best, name).to("cpu", non_blocking=True) for name in names}
        return best._replace(**copies)


def record_on(output: Any) -> ForwardRecord:
    """The record of SGLang's LogitsProcessorOutput; a new one if it has none."""
    found: ForwardRecord | None = getattr(output, _ATTRIBUTE, None)
    if found is None:
        found = ForwardRecord()
        setattr(output, _ATTRIBUTE, found)
    return found


def record_of(result: Any) -> ForwardRecord | None:
    """The record of SGLang's GenerationBatchResult, if it has one."""
    output = getattr(result, "logits_output", None)
    return getattr(output, _ATTRIBUTE, None)


def before_copy(result: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE GenerationBatchResult.copy_to_cpu: margins go to the CPU with the token ids.

    The result's own `copy_done` event covers the copies.
    """
    record = record_of(result)
    if record is not None:
        record.to_cpu()
