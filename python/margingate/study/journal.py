"""Finished work of a walk on the disk, so that it can be ended and started again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from margingate.errors import CliError
from margingate.study.steps_of_walk import Walk


class Journal:
    """Finished work as JSON lines, behind a line that says what it is work on.

    Raises:
        CliError: from all methods, where the file holds something else or cannot be used.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.walks: dict[tuple[int, str], Walk] = {}
        self.notes: dict[str, Any] = {}  # results other than walks
        known = json.loads(json.dumps(identity))
        try:
            text = path.read_text() if path.exists() else ""
        except (OSError, UnicodeDecodeError) as err:
            raise self._unusable(err) from err
        entries = [_parsed(line) for line in text.splitlines()]
        if not any(entries):
            self._write([known], "w")
            return
        self._read(known, entries)
        if not text.endswith("\n"):
            self._write([None], "a")  # ends the line that was cut off

    def _read(self, identity: dict[str, Any], entries: list[dict[str, Any] | None]) -> None:
        if entries[0] != identity:
            raise CliError(
                f"{self.path} was begun with another model, machine or options: delete it, or name "
                "another --out."
            )
        for entry in filter(None, entries[1:]):
            if "note" in entry:
                self.notes[entry["note"]] = entry["result"]
            else:
                walk = Walk.from_record(entry)
                self.walks[walk.batch_size, walk.name] = walk

    def add(self, walks: Sequence[Walk]) -> None:
        """Keep these; they are on the disk when this returns."""
        self.walks.update({(walk.batch_size, walk.name): walk for walk in walks})
        self._write([asdict(walk) for walk in walks], "a")

    def note(self, name: str, result: Any) -> None:
        """Keep another result."""
        self.notes[name] = result
        self._write([{"note": name, "result": result}], "a")

    def _write(self, entries: Sequence[Any], mode: str) -> None:
        try:
            with self.path.open(mode) as out:
                out.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as err:
            raise self._unusable(err) from err

    def _unusable(self, err: Exception) -> CliError:
        return CliError(
            f"{self.path} cannot be used ({getattr(err, 'strerror', None) or err}): make room, or "
            "name another --out; what is in it is kept."
        )


def _parsed(line: str) -> dict[str, Any] | None:
    """None for a line that was cut off when the run before was ended."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
