"""Grammars behind their end, where a request goes on: `ignore_eos` ignores what ended them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from margingate.runtime.sampling import constraints

VOCABULARY = 49152
NO_PENALTIES: Any = None
END = 2


@pytest.fixture(scope="module")
def made(model) -> tuple[Any, list[int]]:
    """SGLang's grammar object of "ab", before a token, and the token ids of that text."""
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.eos_token_id == END
    with torch._dynamo.config.patch(disable=True):
        grammar = GuidanceBackend(tokenizer, n_vocab=VOCABULARY).dispatch_regex("ab")
        yield grammar, tokenizer("ab", add_special_tokens=False)["input_ids"]


def request(grammar: Any, output: list[int]) -> Any:
    gate = SimpleNamespace(grammar_start=None, grammar_failed=False, penalties=None)
    params = SimpleNamespace(logit_bias=None)
    req = SimpleNamespace(gate=gate, sampling_params=params, output_ids=output, grammar=grammar)
    req.finished, req.to_finish = lambda: False, None
    constraints.begin(req)
    return req


def advance(grammar: Any, token: int) -> None:
    """As SGLang does behind a decode step of a request that goes on."""
    grammar.accept_token(token)
    grammar.finished = False


def test_rows_behind_an_end_have_the_mask_that_the_fast_path_had(made):
    """llguidance says there that nothing but an end token may come; there was no mask at all."""
    grammar, ids = made
    output = [*ids, END, END, END]
    req = request(grammar.copy(), output)
    found = constraints.of_rows(req, range(1, len(output) + 1), VOCABULARY)
    for row, constraint in enumerate(found):
        mask = req.grammar.allocate_vocab_mask(VOCABULARY, 1, "cpu")
        req.grammar.fill_vocab_mask(mask, 0)
        assert torch.equal(constraint.mask, mask)
        advance(req.grammar, output[row])
    assert not req.gate.grammar_failed


def test_a_request_that_is_taken_back_behind_an_end_does_not_end_there(made):
    grammar, ids = made
    req = request(grammar.copy(), [*ids, END, END])
    constraints.follow(req, NO_PENALTIES)
    assert not req.grammar.is_terminated() and req.to_finish is None


class Ends:
    """A grammar that is through with the token 9, as xgrammar is, whatever SGLang says."""

    finished = False

    def __init__(self, through: bool = False) -> None:
        self.through = through

    def copy(self) -> Ends:
        return Ends(self.through)

    def accept_token(self, token: int) -> None:
        self.through = self.through or token == 9

    def is_terminated(self) -> bool:
        return self.through


def test_a_finish_check_comes_before_the_grammar_takes_the_last_token():
    """So it does in SGLang: one more token follows the end that is ignored."""
    req = request(Ends(), [4, 9])
    constraints.follow(req, NO_PENALTIES, newest=False)
    assert not req.grammar.is_terminated()
    assert constraints.take_newest(req) and req.grammar.is_terminated()
