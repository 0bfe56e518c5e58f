"""The SGLang release that this code is written for."""

from __future__ import annotations

SGLANG_VERSION = "0.5.23"
