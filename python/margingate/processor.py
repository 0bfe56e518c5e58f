"""The name of this machine's processor, for records of what a measurement was made on."""

from __future__ import annotations

import contextlib
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str | None:
    """The first CPU's name, as Linux tells it; None where it tells none."""
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None
