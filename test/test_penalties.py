"""Penalties: what SGLang's would give with every token known, in any batch, whatever was undone."""

from __future__ import annotations

import gc
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from request_stand_in import CONFIG, OPT_OUT, request
from sglang.srt.managers.schedule_batch import ReqKvInfo

from margingate.runtime.hooks import handlers
from margingate.runtime.request.admission import attach
from margingate.runtime.request.sampling_params import NONE, Penalties
from margingate.runtime.sampling.penalties import RowPenalty, Table, ends_of, of_row, penalize

VOCABULARY = 32


class Request:
    """As much of SGLang's `Req` as a table reads."""

    def __init__(self, pool: int, penalties: Penalties | None, prompt: int = 3) -> None:
        self.kv = ReqKvInfo(req_pool_idx=pool)
        self.origin_input_ids = array("q", range(prompt))
        self.output_ids = array("q")
        self.vocab_size = VOCABULARY
        self.eos_token_ids = {7}
        self.sampling_params = SimpleNamespace(stop_token_ids=[5, VOCABULARY + 3])
        self.tokenizer = SimpleNamespace(additional_stop_token_ids=[6], eos_token_id=7)
        self.gate = SimpleNamespace(penalties=penalties)


def forward(reqs: list[Request], *, decode: bool) -> SimpleNamespace:
    lengths = torch.tensor([len(r.origin_input_ids) + len(r.output_ids) for r in reqs])
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decode),
        req_pool_indices=torch.tensor([r.kv.req_pool_idx for r in reqs]),
        input_ids=torch.tensor([r.output_ids[-1] for r in reqs]) if decode else None,
        positions=lengths - 1 if decode else None,
        seq_lens=lengths,
    )


def step(table: Table, reqs: list[Request], logits: torch.Tensor, tokens: list[int]) -> Any:
    """A forward of these requests that emits `tokens`; the logits that it chose by."""
    decode = bool(reqs[0].output_ids)
    if not decode:
        table.admit(SimpleNamespace(reqs=reqs))
    changed = logits.clone()
    table.apply(changed, forward(reqs, decode=decode))
    for req, token in zip(reqs, tokens, strict=True):
        req.output_ids.append(token)
    return changed


def expected(logits: torch.Tensor, penalties: Penalties, tokens: list[int]) -> torch.Tensor:
    """By the documented formulas, in float64."""
    found = logits.double().clone()
    for token in set(tokens):
        value = found[token] - penalties.frequency * tokens.count(token) - penalties.presence
        factor = penalties.repetition
        found[token] = value * factor if value < 0 else value / factor
    if len(tokens) < penalties.min_new_tokens:
        found[[5, 6, 7]] = -torch.inf
    return found


BOTH = Penalties(0.5, 0.25, 1.2, 2)


@pytest.mark.parametrize(
    "penalties", [BOTH, Penalties(-1.5, 0.0, 1.0, 0), Penalties(0.0, 0.0, 0.8, 5)]
)
def test_each_row_has_what_its_tokens_say(penalties):
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 4
    table, req = Table(4, VOCABULARY, "cpu"), Request(2, penalties)
    for row, token in enumerate((3, 9, 3, 3, 5, 9)):
        before = req.output_ids.tolist()
        found = step(table, [req], logits[row : row + 1], [token])[0]
        assert torch.allclose(found.double(), expected(logits[row], penalties, before))
        verified = logits[row : row + 1].clone()
        of_row(req, row + 1).apply(verified)
        assert torch.equal(verified[0], found), "a verified row has the bits of the fast path"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_without_penalties_keep_their_bits(dtype):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-30])
    logits = torch.randn(2, VOCABULARY).to(dtype)
    logits[1, :5] = special
    table = Table(4, VOCABULARY, "cpu")
    plain, other = Request(0, None), Request(1, BOTH)
    for tokens in ([3, 4], [3, 4], [8, 4]):
        found = step(table, [other, plain], logits, tokens)
        assert torch.equal(found[1].view(torch.uint8), logits[1].view(torch.uint8))
    penalize(alone := logits[1:].clone(), torch.full((1, VOCABULARY), 9, dtype=torch.int32),
             torch.tensor([NONE]), torch.zeros(1, VOCABULARY, dtype=torch.bool))  # fmt: skip
    assert torch.equal(alone.view(torch.uint8), logits[1:].view(torch.uint8))


def test_a_request_taken_back_is_counted_anew():
    logits = torch.ones(1, VOCABULARY)
    table, req = Table(4, VOCABULARY, "cpu"), Request(3, BOTH)
    for token in (1, 2, 3, 4):
        step(table, [req], logits, [token])
    req.output_ids = array("q", [1, 9])  # the second flipped
    table.recount(req)
    found = step(table, [req], logits, [2])[0]
    assert torch.allclose(found.double(), expected(logits[0], BOTH, [1, 9]))


def test_a_row_of_the_page_table_is_its_next_owners():
    """Also where nobody had penalties when that one came."""
    logits = torch.ones(1, VOCABULARY)
    table = Table(4, VOCABULARY, "cpu")
    first = Request(1, BOTH)
    step(table, [first], logits, [4])
    step(table, [first], logits, [4])
    plain, late = Request(1, None), Request(2, None)
    assert torch.equal(step(table, [plain], logits, [4]), logits)
    del first, plain
    gc.collect()
    assert torch.equal(step(table, [late], logits, [4]), logits), "nobody has any"
    second = Request(3, BOTH)
    assert not torch.equal(step(table, [second], logits, [4]), logits)
    step(table, [second], logits, [4])
    assert torch.equal(step(table, [late], logits, [4]), logits)
    again = Request(1, None)
    step(table, [again], logits, [4])
    assert torch.equal(step(table, [again], logits, [4]), logits)


def test_a_request_that_left_between_two_chunks_leaves_nothing():
    logits = torch.ones(1, VOCABULARY)
    table = Table(4, VOCABULARY, "cpu")
    gone = Request(1, BOTH)
    table.admit(SimpleNamespace(reqs=[gone]))  # and is aborted before it has a token
    del gone
    gc.collect()
    plain = Request(1, None)
    step(table, [plain], logits, [4])
    step(table, [Request(2, BOTH)], logits, [4])
    other = Request(3, BOTH)
    step(table, [other], logits, [4])
    assert torch.equal(step(table, [plain], logits, [4]), logits)


@given(st.lists(st.tuples(st.integers(0, 11), st.booleans()), min_size=1, max_size=40))
def test_any_number_of_requests_has_room(ends_and_starts):
    """Requests come and go: each has the penalties of its own tokens."""
    table = Table(16, VOCABULARY, "cpu")
    logits = torch.linspace(-2, 3, VOCABULARY).view(1, -1)
    open_: dict[int, Request] = {}
    for pool, with_penalties in ends_and_starts:
        open_.pop(pool, None)
        req = open_[pool] = Request(pool, BOTH if with_penalties else None)
        step(table, [req], logits, [pool])
        reqs = list(open_.values())
        many = logits.repeat(len(reqs), 1)
        before = [each.output_ids.tolist() for each in reqs]
        found = step(table, reqs, many, [each.kv.req_pool_idx for each in reqs])
        for row, req_tokens, each in zip(found, before, reqs, strict=True):
            wanted = expected(logits[0], each.gate.penalties or Penalties(*NONE, 0), req_tokens)
            assert torch.allclose(row.double(), wanted)


def test_what_ends_an_answer_is_barred_once_each():
    assert ends_of(Request(0, BOTH)) == [5, 6, 7]
    req = Request(0, BOTH)
    req.tokenizer = None
    assert ends_of(req) == [5, 7]
    assert of_row(Request(0, None), 1) is None
    early, late = of_row(req, 2), of_row(req, 3)
    assert isinstance(early, RowPenalty) and (early.ends, late.ends) == ([5, 7], ())


def test_a_recount_writes_nothing_while_a_forward_may_be_in_flight():
    logits = torch.ones(1, VOCABULARY)
    table, req = Table(4, VOCABULARY, "cpu"), Request(3, BOTH)
    for token in (1, 2, 3):
        step(table, [req], logits, [token])
    before = table._counts.clone()
    req.output_ids = array("q", [1, 9])
    table.recount(req)
    assert torch.equal(table._counts, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.1),
        ("presence_penalty", -0.1),
        ("repetition_penalty", 1.1),
        ("min_new_tokens", 1),
    ],
)
def test_penalties_are_the_gates_from_here_on(name, value):
    req = request(**{name: value})
    attach(req, CONFIG)
    neutral = request().sampling_params
    assert req.gate.gated and not req.gate.refusal
    assert getattr(req.gate.penalties, name.removesuffix("_penalty")) == value
    assert getattr(req.sampling_params, name) == getattr(neutral, name), "SGLang has none"
    ungated = request(OPT_OUT, **{name: value})
    attach(ungated, CONFIG)
    assert ungated.gate.penalties is None and getattr(ungated.sampling_params, name) == value
    attach(plain := request(), CONFIG)
    assert plain.gate.penalties is None


@pytest.mark.parametrize(("least", "room", "kept"), [(6, 3, 3), (6, 0, 0), (2, 3, 2)])
def test_a_least_length_is_cut_with_the_length(least, room, kept):
    """As SGLang cuts it, which the gate has taken it from by then."""
    req = request(min_new_tokens=least, repetition_penalty=1.5)
    attach(req, CONFIG)
    req.sampling_params.max_new_tokens, req.to_finish = room, None
    handlers.add_request(None, req)
    assert req.gate.penalties.values == (0.0, 0.0, 1.5)
    assert req.gate.penalties.min_new_tokens == kept
