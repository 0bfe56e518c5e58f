"""Made-up flags and flips for benchmarks: dummy weights have no margins that mean anything."""

from margingate.core.chance import chosen


class Simulation:
    """Which rows are flagged and which verdicts are flips, by request and row alone.

    `request` stands for the prompt, so a row has the same fate in every run, whatever it shares
    its batch with. Flags and flips are drawn apart from each other.
    """

    __slots__ = ("flip_rate", "trigger_rate")

    def __init__(self, trigger_rate: float | None, flip_rate: float) -> None:
        """
        Args:
            trigger_rate: share of the rows that are flagged, 0 to 1; None: margins decide.
            flip_rate: share of the flagged rows whose verdict is a flip, 0 to 1.
        """
        self.trigger_rate, self.flip_rate = trigger_rate, flip_rate

    def flags(self, request: str, row: int) -> bool | None:
        """Whether the row (from 1) is flagged; None where that is not simulated."""
        if self.trigger_rate is None:
            return None
        return chosen(f"flag:{request}:{row}", self.trigger_rate)

    def flips(self, request: str, row: int) -> bool:
        """Whether the verifier is to choose another token at this row (from 1)."""
        return chosen(f"flip:{request}:{row}", self.flip_rate)
