"""Text that is sent in bursts, by SGLang's own detokenizer over the test model's tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from margingate.harness.embedded_model import ensure_model

TEXTS = (
    "今日は😀",
    "名前は",
    "界😀Ж界",
    "ok 😀😀",
    "e\u0301a\u0308 नमस्ते",
    "👩‍👩‍👧‍👦 🇩🇪",
    "naïve 日",
    "שלום",
    "\ufffd a",
)
SAID = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"])))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_model("smollm2"))


def sent(tokenizer: Any, bursts: list[list[int]]) -> list[str]:
    """What leaves for each burst, with our hook around SGLang's function."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager

    from margingate.runtime.client import detokenizer

    manager = DetokenizerManager.__new__(DetokenizerManager)
    manager.tokenizer, manager.vocab_size, manager.decode_status = tokenizer, len(tokenizer), {}
    manager.disable_tokenizer_batch_decode = manager.is_tool_call_parser_gpt_oss = False
    texts = []
    for i, burst in enumerate(bursts):
        received = SimpleNamespace(
            rids=["a"],
            decoded_texts=[""],
            decode_ids=[burst],
            read_offsets=[0],
            finished_reasons=[{"type": "length"} if i == len(bursts) - 1 else None],
            no_stop_trim=[False],
            skip_special_tokens=[True],
            spaces_between_special_tokens=[True],
        )
        original = DetokenizerManager._decode_batch_token_id_output
        texts += detokenizer.decode(original, manager, received)
    return texts


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """The ids in bursts of these sizes, over and over."""
    bursts, start = [], 0
    while start < len(ids):
        size = sizes[len(bursts) % len(sizes)]
        bursts.append(ids[start : start + size])
        start += size
    return bursts or [[]]


@settings(max_examples=300, deadline=None)
@example("今日は😀", [2])
@example("今日は😀", [3])
@given(SAID, st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_text_in_bursts_is_the_text(tokenizer, text, sizes):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(sent(tokenizer, cut(ids, sizes))) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_every_size_of_bursts(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    for size in range(1, len(ids) + 1):
        assert "".join(sent(tokenizer, cut(ids, [size]))) == text, size


@pytest.mark.parametrize("gated", [True, False])
def test_a_gated_servers_detokenizer_has_the_hook_and_no_other(monkeypatch, gated):
    from margingate.config import GateConfig
    from margingate.runtime.compat.arguments.server_args import ATTRIBUTE
    from margingate.runtime.hooks import registry
    from margingate.runtime.hooks.launcher_table import DETOKENIZER_HOOKS
    from margingate.runtime.start import install

    installed: list[Any] = []
    monkeypatch.setattr(registry, "install", installed.append)
    carried = {ATTRIBUTE: GateConfig()} if gated else {}
    install.init_detokenizer(None, SimpleNamespace(**carried), None)
    assert installed == ([DETOKENIZER_HOOKS] if gated else [])
