"""What a measurement was made on, and by which command."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any


def environment() -> dict[str, Any]:
    """Device, cores, versions and the command, for the head of a file of results."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "command": sys.argv,
        **{name: metadata.version(name) for name in ("torch", "sglang")},
    }


def processor() -> str:
    """The CPU's name as Linux has it."""
    from margingate.processor import cpu_name  # engines of an older checkout have no such module

    return cpu_name() or platform.processor()
