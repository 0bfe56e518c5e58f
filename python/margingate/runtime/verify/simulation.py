"""--gate-simulate-trigger-rate and --gate-simulate-flip-rate: the work of verdicts, made up.

Rows are flagged by a hash, and the verifier's token is replaced at some of them, so that spans,
passes and rollbacks cost what they cost. The answers are wrong: dummy weights only.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from margingate.config import GateConfig
from margingate.core.ledger import Row
from margingate.core.simulation import Simulation
from margingate.runtime.verify.verifier import RowResult

logger = logging.getLogger(__name__)


class Simulator:
    """A Simulation over SGLang's requests; does nothing where none is asked for."""

    def __init__(self, config: GateConfig) -> None:
        """Logs a warning where anything is simulated."""
        self._simulation = Simulation(config.simulate_trigger_rate, config.simulate_flip_rate)
        self._flags = config.simulate_trigger_rate is not None
        self._flips = config.simulate_flip_rate > 0
        if config.simulates:
            logger.warning(
                "margingate: VERDICTS ARE SIMULATED (trigger rate %s, flip rate %s): answers are "
                "wrong on purpose, and only their speed means anything.",
                config.simulate_trigger_rate,
                config.simulate_flip_rate,
            )

    def flag(self, req: Any, row: int) -> bool | None:
        """Whether the row of `req` (from 1) is flagged; None: the policy looks at its margin."""
        return self._simulation.flags(req.gate.prompt, row) if self._flags else None

    def verdict(self, req: Any, row: Row, result: RowResult) -> RowResult:
        """The verifier's result, or one with the next token id where a flagged row is to flip.

        Another verdict on the same row, after a retraction, is the same. Log-probs stay as they
        were.
        """
        # A request that was rolled back has fewer rows than the pass had.
        flagged = self._flips and req.gate.was_flagged(row.index)
        if not flagged or not self._simulation.flips(req.gate.prompt, row.index):
            return result
        return replace(result, token=(result.token + 1) % req.vocab_size)
