"""A made-up server, and studies of it in a folder."""

from __future__ import annotations

import contextlib
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.cli.main import main
from margingate.harness.client import Answer, Prompt
from margingate.study import measure, session
from margingate.study import walk as walking

MACHINE = {"device": "d", "dtype": "torch.bfloat16", "attention": "a"}
PROBE = {
    "operators": [
        {"name": "model.norm", "kind": "norm", "shape": [8], "classes": [[1, 0], [2, 0]]},
        {"name": "model.down", "kind": "linear", "shape": [8, 4], "classes": [[1, 0], [2, 1]]},
    ],
    "steps": {"measured": [[1, True], [2, True]]},
}
TOKENS = 12


class FakeServer:
    """What a study needs of a server; batches flip some tokens of small margin."""

    base_url, timeout = "http://nowhere", None

    def __init__(self, options: tuple[str, ...], last: int | None) -> None:
        self.options, self.asked, self.last = options, 0, last
        self.counts = dict.fromkeys(measure.COUNTERS, 0)

    def gate_state(self) -> dict[str, Any]:
        return {"machine": MACHINE, "probe": PROBE, **self.counts}

    def get(self, _path: str) -> dict[str, Any]:
        return {"max_req_input_len": 64}

    def flush(self) -> None:
        pass

    def ask(self, prompts: list[Prompt], params: list[dict[str, Any]]) -> list[Answer]:
        self.asked += 1
        if self.last is not None and self.asked > self.last:
            raise KeyboardInterrupt
        self.counts["steps"] += len(prompts)
        gated = bool(self.options) and "observe" not in self.options
        return [
            _answer(prompt, one, gated, len(prompts))
            for prompt, one in zip(prompts, params, strict=True)
        ]


def _answer(prompt: Prompt, params: dict[str, Any], gated: bool, rows: int) -> Answer:
    draw = random.Random(prompt.name)
    alone = [draw.randrange(100) for _ in range(TOKENS)]
    margins = [draw.choice((0.0, 0.125, 0.5, 3.0)) for _ in alone]
    tokens = list(alone)
    for i, margin in enumerate(margins):
        if i and rows > 1 and not gated and margin <= 0.125 and draw.random() < 0.5:
            tokens[i] += 100
    choices = [(t, m, rows, None, 9.0, t, m + 0.01) for t, m in zip(tokens, margins, strict=True)]
    columns = {"prompt": [[0.0, 0.0]] * 3, "rows": [[[0.1, 0.01]] * (TOKENS - 1)] * 3}
    forced = params.get("custom_params", {}).get("gate_forced_ids")
    assert forced is None or forced == alone
    meta = {"gate": {"choices": choices, "columns": columns}}
    return Answer(prompt.name, tuple(alone if forced else tokens), "", meta)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model, prompts and a fake server in a folder; `last` asks are answered."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for name in ("one", "two"):
        lines = [json.dumps({"id": f"{name}-{i}", "prompt": f"{name} {i}"}) for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    found = SimpleNamespace(path=tmp_path, last=None, started=[])

    @contextlib.contextmanager
    def gated_server(_options, _model, *options):
        found.started.append(options)
        yield FakeServer(options, found.last)

    def tokenized(sets, _model):
        return [Prompt(name, (1, 2)) for pairs in sets.values() for name, _ in pairs]

    monkeypatch.setattr(session, "gated_server", gated_server)
    monkeypatch.setattr(session, "tokenized", tokenized)
    for module in (walking, measure):
        monkeypatch.setattr(module, "ask", lambda client, *what: client.ask(*what))
    return found


def call(place: SimpleNamespace, command: str, *more: str, out: str = "out.json") -> int:
    prompts = [str(place.path / f"{name}.jsonl") for name in ("one", "two")]
    sizes = ("--batch-sizes", "4", "2", "--tokens", str(TOKENS))
    where = ("--out", str(place.path / out), "--model-path", str(place.path / "model"))
    return main([command, "--prompts", *prompts, *where, *sizes, *more])


STUDY = ("--sequences", "4", "--thresholds", "0.25", "--columns", "2")


@pytest.fixture
def record(place) -> dict[str, Any]:
    """Of a study that was measured to its end."""
    assert call(place, "study", *STUDY) == 0
    return json.loads((place.path / "out.json").read_text())
