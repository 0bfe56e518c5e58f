"""Sums over the gate's work that no other record holds: quiet steps, rows a pass, waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from margingate.runtime.request.observer import Observer


@dataclass
class Tally(Observer):
    """Since the start; each number only ever rises. Decode steps with gated requests in them."""

    exact: bool  # the guarantee: a step that is not canonical is replayed, flagged or not
    decode_steps: int = 0
    quiet_steps: int = 0  # those that asked for no verification
    pass_rows: int = 0  # of all verify passes, padding not counted
    waits: int = 0  # times a request had tokens that were not settled
    waited_s: float = 0.0  # seconds, summed over them

    def __post_init__(self) -> None:
        self._quiet = True  # so far, the step that is being entered

    def stepped(self, batch: Any, gated: int, canonical: bool) -> None:
        if gated and batch.forward_mode.is_decode():
            self.decode_steps += 1
            self.quiet_steps += self._quiet and (canonical or not self.exact)
        self._quiet = True

    def flagged(self, req: Any, row: int, margin: float, reason: str) -> None:
        self._quiet = False

    def passed(self, rows: int, requests: int, seconds: float, due: str) -> None:
        self.pass_rows += rows

    def settled(self, req: Any, seconds: float) -> None:
        self.waits += 1
        self.waited_s += seconds
