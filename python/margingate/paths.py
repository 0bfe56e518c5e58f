"""Where margingate keeps files of its own."""

import os
from pathlib import Path


def cache_root() -> Path:
    """`margingate` in the user's cache; XDG says to ignore a relative XDG_CACHE_HOME."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return root / "margingate"
