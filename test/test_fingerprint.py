"""The fingerprint: what is in it, and that a weight update never leaves it stale."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from margingate.config import GateConfig

CONFIG = GateConfig(rows=16, prefill_chunk=64)


@pytest.fixture(scope="module")
def fingerprint() -> Any:
    from margingate.runtime.observe import fingerprint

    return fingerprint


@pytest.fixture(scope="module")
def weights() -> Any:
    from margingate.runtime.observe import weight_digest as weights

    return weights


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.LayerNorm(4))
    model.head = torch.nn.Linear(4, 8, bias=False)
    model.head.weight = model[0].weight
    return model.to(torch.bfloat16)


# Weights


def test_the_digest_is_of_content_name_shape_and_dtype(weights):
    model = tiny_model()
    before = weights.digest(model)
    assert before == weights.digest(tiny_model())
    assert len(before) == 64
    assert before != weights.digest(tiny_model().to(torch.float16))
    with torch.no_grad():
        model[1].bias.view(torch.int16)[3] ^= 1  # the last bit of one value
    assert before != weights.digest(model)


def test_tied_weights_are_read_once(weights):
    names = [name for name, _ in weights._distinct(tiny_model())]
    assert names == ["0.weight", "1.weight", "1.bias"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_checksum_sees_every_bit_and_every_place(weights, monkeypatch, size):
    monkeypatch.setattr(weights, "WORDS", 64)  # several pieces
    data = torch.arange(size, dtype=torch.uint8) + 1
    total = weights.checksum(data)
    assert torch.equal(total, weights.checksum(data.clone()))
    for place in {0, size // 2, size - 1}:
        other = data.clone()
        other[place] ^= 1
        assert total != weights.checksum(other)
    if size > 4:
        swapped = data.clone()
        swapped[:8] = data[[4, 5, 6, 7, 0, 1, 2, 3]]  # two words
        assert total != weights.checksum(swapped)


def test_a_checksum_copies_whole_words_nowhere(weights, monkeypatch):
    """It would take as much memory as the largest tensor."""
    wide = torch.arange(8, dtype=torch.uint8)
    total = weights.checksum(wide)
    monkeypatch.setattr(torch.nn.functional, "pad", lambda *_: pytest.fail("copied"))
    assert torch.equal(weights.checksum(wide), total)


def test_a_checksum_does_not_ask_for_a_layout(weights):
    odd = torch.arange(9, dtype=torch.bfloat16)[1:]  # two bytes into its storage
    assert torch.equal(weights.checksum(odd), weights.checksum(odd.clone()))
    wide = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(weights.checksum(wide.T), weights.checksum(wide.T.contiguous()))
    assert weights.checksum(wide.T) != weights.checksum(wide)


# Its life


class Server:
    """Weights that can be replaced, and forwards that see them."""

    def __init__(self, make: Callable[..., Any], **parts: Any) -> None:
        self.weights, self.forwards, self.read = "a" * 64, 1, 0
        self.fingerprint = make(
            {"files": {}, "plan": 1, **parts}, self._digest, lambda: self.forwards
        )

    def _digest(self) -> str:
        self.read += 1
        return self.weights

    def update(self, weights: str) -> None:
        self.forwards += 1
        self.weights = weights * 64
        assert self.fingerprint.weights_changed()

    def now(self) -> str | None:
        value: str | None = self.fingerprint.of()["fingerprint"]
        return value


@pytest.fixture
def server(fingerprint) -> Server:
    return Server(fingerprint.Fingerprint)


def test_it_is_short_and_the_same_for_the_same(server, fingerprint):
    value = server.now()
    assert len(value) == 16 and int(value, 16) >= 0
    assert server.fingerprint.of() == {"fingerprint": value}
    assert value == Server(fingerprint.Fingerprint).now()
    assert value != Server(fingerprint.Fingerprint, plan=2).now()
    server.fingerprint.admit()
    assert server.read == 1


def test_after_an_update_it_is_null_until_a_request_comes_and_then_another(server, fingerprint):
    first = server.now()
    for _ in range(3):  # a large model comes in several parts
        server.update("b")
    assert server.fingerprint.of() == {
        "fingerprint": None,
        "fingerprint_because": fingerprint.STALE,
    }
    generation = server.fingerprint.admit()
    assert server.read == 2
    assert server.fingerprint.of([generation]) == {"fingerprint": server.now()}
    assert server.now() not in (first, None)
    server.update("a")
    server.fingerprint.admit()
    assert server.now() == first, "it is about the weights, not about how they came"


def test_one_that_could_not_be_computed_is_stale_until_it_is(server, fingerprint, monkeypatch):
    """The old one would say that nothing changed."""
    first = server.now()
    server.update("b")
    digest = server.fingerprint._weights_now
    monkeypatch.setattr(server.fingerprint, "_weights_now", lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            server.fingerprint.admit()
        assert server.fingerprint.of()["fingerprint_because"] == fingerprint.STALE
    monkeypatch.setattr(server.fingerprint, "_weights_now", digest)
    server.fingerprint.admit()
    assert server.now() not in (first, None)


@pytest.mark.parametrize("fails", [0, 1])
def test_where_one_rank_cannot_read_its_weights_all_raise(fingerprint, monkeypatch, fails):
    """Each has given its part, so that none waits for another."""
    given: list[str] = []

    def gathered(_scheduler: Any, own: str) -> list[str]:
        given.append(own)
        parts = ["0", "1"]
        parts[0], parts[fails] = own, "" if fails else own
        return parts

    monkeypatch.setattr(fingerprint, "gathered", gathered)
    monkeypatch.setattr(fingerprint.weight_digest, "digest", lambda _: "0" if fails else 1 / 0)
    wanted = (RuntimeError, "rank 1 could not") if fails else (ZeroDivisionError, "division")
    with pytest.raises(wanted[0], match=wanted[1]):
        fingerprint._weights(None, None)
    assert given == ["0" if fails else ""]


def test_a_request_that_saw_both_weights_has_none(server, fingerprint):
    generation = server.fingerprint.admit()
    server.update("b")
    crossed = {"fingerprint": None, "fingerprint_because": fingerprint.CROSSED}
    assert server.fingerprint.of([generation]) == crossed
    newer = server.fingerprint.admit()
    assert server.fingerprint.of([generation]) == crossed
    assert server.fingerprint.of([generation, newer]) == crossed
    assert server.fingerprint.of([newer]) == server.fingerprint.of()
    assert server.fingerprint.of([newer])["fingerprint"]


def test_the_parts_of_one_update_are_one_generation(server):
    """A model comes in many parts, between a begin and an end; no forward sees what is between."""
    first = server.fingerprint.admit()
    server.update("b")
    for updating in (True, True, False):
        assert not server.fingerprint.weights_changed(updating=updating)
    assert server.fingerprint.generation == server.fingerprint.admit() == first + 1
    server.forwards += 1  # one that saw them
    assert server.fingerprint.weights_changed()
    assert server.fingerprint.generation == first + 2


@pytest.mark.parametrize(
    ("part", "because"),
    [({"files": None}, "files could not be found"), ({"guarantee": None}, "policy observe")],
)
def test_without_a_promise_there_is_none_and_no_weights_are_read(fingerprint, part, because):
    part = {name: fingerprint.OBSERVED if name == "guarantee" else None for name in part}
    server = Server(fingerprint.Fingerprint, **part)
    assert server.now() is None
    assert server.fingerprint.of()["fingerprint_because"].startswith(because)
    assert server.read == 0


# Its parts


def test_the_arguments_exist_in_this_sglang(fingerprint):
    from sglang.srt.server_args import ServerArgs

    assert set(fingerprint.ARGUMENTS) <= set(ServerArgs.__struct_fields__)


def test_a_chat_template_counts_by_its_text(fingerprint, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    args = SimpleNamespace(chat_template=str(file), quantization=None, model_path="")
    assert fingerprint.arguments(args)["chat_template"] == "{{ messages }}"
    args.chat_template = "llama-2"
    assert fingerprint.arguments(args)["chat_template"] == "llama-2"


def test_the_template_that_a_folders_name_stands_for_counts(fingerprint):
    """SGLang takes it for any path with such a word, instead of the one in the folder."""

    def said(path: str, template: str | None = None) -> Any:
        args = SimpleNamespace(model_path=path, chat_template=template)
        return fingerprint.arguments(args)["conversation"]

    assert said("/data/llama") is said("/else/where") is None
    assert said("/data/vicuna/llama") == "vicuna_v1.1"
    assert said("/check-points/llama") not in (None, "vicuna_v1.1")
    assert said("/data/vicuna/llama", "chatml") is None, "the option goes before"


def test_files_count_by_name_and_content_wherever_they_are(fingerprint, tmp_path):
    def folder(name: str, **contents: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in {"config": "{}", "tokenizer": "[]", **contents}.items():
            (tmp_path / name / f"{file}.json").write_text(text)
        return str(tmp_path / name)

    def files(name: str) -> Any:
        return fingerprint.files(name, name, None)

    one = folder("one")
    assert files(one) == files(folder("two", unrelated="1"))
    assert files(one) != files(folder("three", tokenizer="[1]"))
    assert files(one) != files(folder("four", generation_config="{}"))
    assert fingerprint.files(one, folder("five"), None) == files(one)
    assert fingerprint.files("nobody/nothing-of-this-name", one, None) is None
    assert fingerprint.files("/nowhere/at/all", one, None) is None


@pytest.mark.parametrize("name", ["tekken.json", "params.json", "spiece.vocab", "chat.jinja"])
def test_files_of_every_kind_of_tokenizer_count(fingerprint, tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint.files(str(tmp_path), str(tmp_path), None)
    (tmp_path / name).write_text("{}")
    assert fingerprint.files(str(tmp_path), str(tmp_path), None) != before


def test_a_setting_counts_where_it_can_change_an_answer(fingerprint):
    def changed(**settings: Any) -> bool:
        return bool(fingerprint.guarantee(replace(CONFIG, **settings)) != of_default)

    of_default = fingerprint.guarantee(CONFIG)
    assert changed(threshold=0.25) and changed(policy="always") and changed(repair="column")
    assert changed(guarantee="exact")
    assert not (changed(max_delay=3) or changed(overlap="on") or changed(debug=True))
    assert changed(router_threshold=0.25)
    exact = replace(CONFIG, guarantee="exact")
    for settings in ({"threshold": 0.25}, {"router_threshold": 0.25}):
        assert fingerprint.guarantee(exact) == fingerprint.guarantee(replace(exact, **settings))
    assert fingerprint.guarantee(replace(CONFIG, policy="observe")) == fingerprint.OBSERVED


def test_the_plan_names_shapes_and_row_classes(fingerprint, monkeypatch):
    from margingate.runtime.probe.checks.check_prefill import Prefill

    two, one = [[1, 0], [2, 1], [64, 1]], [[1, 0], [64, 0]]
    route = [[16, True, 0]]
    found = [
        {
            "name": "down",
            "kind": "linear",
            "plan": [[[2, 2], [64, 64]], False, route],
            "prefill_plan": [[[64, 64]], False, route],
            "classes": two,
        },
        {"name": "norm", "kind": "norm", "plan": None, "prefill_plan": None, "classes": one},
        {
            "name": "qkv",
            "kind": "linear",
            "plan": [[[1, 1], [64, 64]], False, route],
            "prefill_plan": None,
            "classes": one,
        },
    ]
    monkeypatch.setattr(fingerprint.startup, "records", lambda: found)
    verifier = SimpleNamespace(
        rows=16, device="cpu", graph_sizes=lambda largest: [8, 24, 32], backend=None
    )
    plan = fingerprint.plan(CONFIG, verifier, Prefill())
    assert (plan["rows"], plan["prefill"], plan["graph"]) == (16, {"chunk": 64}, 24)
    together = fingerprint.plan(CONFIG, verifier, Prefill(together=True, as_decoded=True))
    assert together["prefill"] == {"together": True, "as_decoded": True}
    kept = {"limit": 64, "down": [2, 64, False], "down, in prefills": [64, 64, False]}
    assert plan["kept"] == kept, "no routes: they keep the bits"
    assert fingerprint.plan(replace(CONFIG, fast_path="stock"), verifier, Prefill())["kept"] is None
    assert plan["unpacked"] == [], "else their prefills have other bits"
    found.append({**found[-1], "name": "qkv, unpacked", "kind": "unpacked linear"})
    assert fingerprint.plan(CONFIG, verifier, Prefill())["unpacked"] == ["qkv, unpacked"]
    assert json.loads(json.dumps(plan)) == plan


def test_the_model_of_the_tests_has_a_digest(weights, model: Path):
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    holder = SimpleNamespace(state_dict=lambda: tensors, named_modules=lambda: [])
    assert weights.digest(holder) == weights.digest(holder)
