"""Attributes of SGLang's objects."""

from __future__ import annotations

from collections.abc import Mapping

SURFACE: Mapping[str, str] = {}
