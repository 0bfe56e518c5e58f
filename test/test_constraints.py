"""Masks and biases of rows that are verified, and grammars that follow their request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import GrammarRow
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.runtime.sampling import constraints
from margingate.runtime.verify import verifier
from margingate.runtime.verify.verifier import RowInput, Verifier

VOCABULARY = 49152
NO_PENALTIES: Any = None


@pytest.fixture(scope="module", autouse=True)
def nothing_is_compiled():
    """As in a server on a CPU: see HostPlatform.apply_server_args_defaults."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def grammar(tokenizer):
    """SGLang's own grammar object, before a token: "yes" or "yet", and three digits."""
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend

    backend = GuidanceBackend(tokenizer, n_vocab=VOCABULARY)
    return backend.dispatch_regex(r"(yes|yet) [0-9]{3}")


def make_request(grammar: Any, output: list[int], bias: Any = None) -> SimpleNamespace:
    gate = SimpleNamespace(grammar_start=None, grammar_failed=False, penalties=None)
    params = SimpleNamespace(logit_bias=bias)
    made = SimpleNamespace(gate=gate, sampling_params=params, output_ids=[], grammar=grammar)
    made.finished, made.to_finish = lambda: False, None
    constraints.begin(made)
    for token in output if grammar is not None else ():
        made.grammar.accept_token(token)
    made.output_ids = list(output)
    return made


def allowed(constraint: Any) -> set[int]:
    logits = torch.zeros(1, VOCABULARY)
    constraint.apply(logits)
    return set(torch.isfinite(logits[0]).nonzero().flatten().tolist())


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_get_the_mask_that_the_fast_path_had(grammar, tokenizer):
    output = ids(tokenizer, "yes 123")
    req = make_request(grammar.copy(), output)
    walk, expected = grammar.copy(), []
    for token in output:
        mask = walk.allocate_vocab_mask(VOCABULARY, 1, "cpu")
        walk.fill_vocab_mask(mask, 0)
        logits = torch.zeros(1, VOCABULARY)
        walk.apply_vocab_mask(logits, mask)
        expected.append(set(torch.isfinite(logits[0]).nonzero().flatten().tolist()))
        walk.accept_token(token)
    rows = list(range(1, len(output) + 1))
    found = list(constraints.of_rows(req, rows, VOCABULARY))
    assert [allowed(each) for each in found] == expected
    assert all(token in each for token, each in zip(output, expected))
    last = list(constraints.of_rows(req, rows[-1:], VOCABULARY))
    assert allowed(last[0]) == expected[-1], "a span may begin anywhere"
    assert len(req.output_ids) == len(output), "the request is left as it was"


def test_a_request_that_is_taken_back_has_the_grammar_of_its_tokens(grammar, tokenizer):
    output = ids(tokenizer, "yes 123")
    req = make_request(grammar.copy(), output)
    other = ids(tokenizer, "yet")
    for tokens in (output[:2], other, [], output):
        req.output_ids = list(tokens)
        constraints.follow(req, NO_PENALTIES)
        (here,) = constraints.of_rows(req, [len(tokens) + 1], VOCABULARY)
        mask = req.grammar.allocate_vocab_mask(VOCABULARY, 1, "cpu")
        req.grammar.fill_vocab_mask(mask, 0)
        assert torch.equal(mask, here.mask)
    plain = make_request(None, output)
    constraints.follow(plain, NO_PENALTIES)
    assert plain.grammar is None and not constraints.constrained(plain)


def test_thinking_is_not_masked_and_is_walked_through(grammar, tokenizer):
    (end,) = ids(tokenizer, "!")[:1]
    reasoner = ReasonerGrammarObject(grammar.copy(), [end])
    reasoner.maybe_init_reasoning(True)
    output = [*ids(tokenizer, "hm so"), end, *ids(tokenizer, "yes 12")]
    req = make_request(reasoner, output)
    rows = list(range(1, len(output) + 1))
    found = list(constraints.of_rows(req, rows, VOCABULARY))
    answer = output.index(end) + 1
    free = [allowed(each) for each in found[:answer]]
    assert all(len(each) == VOCABULARY for each in free)
    strict = [allowed(each) for each in found[answer:]]
    assert all(len(each) < VOCABULARY for each in strict)
    assert all(token in each for token, each in zip(output[answer:], strict))
    req.output_ids = output[: answer + 1]
    constraints.follow(req, NO_PENALTIES)
    assert req.grammar._is_generation()


def narrow(mask, tokens, row, is_allowed, reset_vocab_mask=True):
    """As the filters of SGLang's backends: only these tokens, or all but these."""
    if reset_vocab_mask:
        mask[row] = 0 if is_allowed else -1
    for token in tokens:
        bit = torch.tensor(1 << token % 32, dtype=torch.int64).to(torch.int32)
        word = mask[row, token // 32]
        mask[row, token // 32] = word | bit if is_allowed else word & ~bit


def opens_thinking(tokenizer):
    """What says that "yes" opens the thinking, where SGLang's grammars may describe it too."""
    covers = hasattr(ReasonerGrammarObject, "set_reasoning_in_grammar")
    return {"think_starts": ("yes",), "decode": tokenizer.decode} if covers else {}


@pytest.mark.parametrize("in_grammar", [False, True])
@pytest.mark.parametrize("budget", [-1, 0, 2])
def test_rows_within_a_thinking_budget_get_the_mask_that_the_fast_path_had(
    grammar, tokenizer, budget, in_grammar
):
    """Copies and walks carry all that a budget counts, and what opens the thinking."""
    if in_grammar and not opens_thinking(tokenizer):
        pytest.skip("in this SGLang no grammar describes the thinking")
    end, opener = ids(tokenizer, "!")[0], ids(tokenizer, "yes")
    start = ReasonerGrammarObject(
        grammar.copy(),
        [end],
        think_excluded_token_ids=ids(tokenizer, "zebra"),
        max_think_tokens=budget,
        enable_token_filter=True,
        token_filter_fn=narrow,
        **opens_thinking(tokenizer),
    )
    start.maybe_init_reasoning(True)
    if in_grammar:
        start.set_reasoning_in_grammar()
        output = ids(tokenizer, "yes 123")
    else:
        output = [*opener, *ids(tokenizer, "hm")[: max(budget - 1, 0)], end, *ids(tokenizer, "yes")]
    walk, expected = start.copy(), []
    for token in output:
        mask = walk.allocate_vocab_mask(VOCABULARY, 1, "cpu")
        walk.fill_vocab_mask(mask, 0)
        expected.append(mask)
        walk.accept_token(token)
    req = make_request(start, output)
    found = list(constraints.of_rows(req, range(1, len(output) + 1), VOCABULARY))
    assert all(map(torch.equal, (each.mask for each in found), expected))
    constraints.follow(req, NO_PENALTIES)
    for name, value in vars(walk).items():
        if name not in ("grammar", "_think_end_matcher"):
            assert getattr(req.grammar, name) == value, name
    assert len({tuple(mask[0].tolist()) for mask in expected}) > 1, "else nothing is asked"


def test_a_token_that_the_grammar_does_not_take_aborts_its_request(grammar, tokenizer):
    output = ids(tokenizer, "yes")
    req = make_request(grammar.copy(), output)
    req.output_ids = [*output, ids(tokenizer, "zebra")[0]]
    before = req.grammar
    first, *_, last = constraints.of_rows(req, [1, 2, len(req.output_ids) + 1], VOCABULARY)
    assert first.mask is not None and last is None, "no verdict without its mask"
    assert req.gate.grammar_failed and req.to_finish is None, "the pass gives it up"
    constraints.follow(req, NO_PENALTIES)
    assert isinstance(req.to_finish, FINISH_ABORT) and req.grammar is before


def test_a_bias_changes_its_tokens_alone(grammar):
    req = make_request(None, [7, 8], {"5": 2.5, "9": -1.0})
    first, second = constraints.of_rows(req, [2, 3], VOCABULARY)
    logits = torch.randn(1, VOCABULARY)
    expected = logits.clone()
    expected[0, 5] += 2.5
    expected[0, 9] -= 1.0
    first.apply(logits)
    assert torch.equal(logits, expected) and second == first
    assert list(constraints.of_rows(make_request(None, [7]), [2], VOCABULARY)) == [None]


def test_the_verifier_chooses_under_the_mask(grammar, tokenizer):
    req = make_request(grammar.copy(), ids(tokenizer, "yes 1"), {"11": 0.0})
    rows = [2, 3]
    made = list(constraints.of_rows(req, rows, VOCABULARY))
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(3))
    inputs = [RowInput(1, 3, 4, None, None, made[0]), RowInput(2, 9, 4)]
    inputs += [RowInput(1, 4, 4, (2, None), None, made[1])]
    free = Verifier.choose(logits.clone(), [RowInput(2, 9, 4)] * 3)
    first, other, last = Verifier.choose(logits, inputs)
    assert first.token in allowed(made[0]) and last.token in allowed(made[1])
    assert other.token == free[1].token and other.margin == free[1].margin
    assert last.logprobs.token <= 0 and set(last.logprobs.top[1]) <= allowed(made[1])


def test_log_probs_of_masked_tokens_are_sglangs_least_number():
    """Not -inf, which JSON turns into null; a row that is not verified has the number too."""
    logits = torch.full((2, 8), -torch.inf)
    logits[:, 5] = 1.0
    rows = [RowInput(1, 3, 7, logprobs=(2, (5, 6))), RowInput(1, 4, 5)]
    found = verifier._logprobs(logits, rows, [5, 5])
    least = torch.finfo(torch.float32).min
    assert list(found) == [0] and found[0].token == 0.0
    assert found[0].top[0] == [0.0, least] and found[0].top[1][0] == 5
    assert found[0].ids == [0.0, least]


def test_whole_biases_are_added_like_floats():
    rows = (
        next(constraints.of_rows(make_request(None, [], {"5": b}), [1], 16)) for b in (-3, -3.0)
    )
    logits = [torch.zeros(1, 16), torch.zeros(1, 16)]
    for constraint, row in zip(rows, logits, strict=True):
        constraint.apply(row)
    assert torch.equal(*logits)
    assert logits[0][0, 5] == -3


class Fails:
    """A grammar of a backend that gives up at one thing; it notes the tokens that it took."""

    def __init__(self, at: str = "", taken: tuple[int, ...] = ()) -> None:
        self.at, self.taken = at, taken

    def _do(self, what: str) -> None:
        if what == self.at:
            raise ValueError("a limit of the backend's own")

    def copy(self) -> Fails:
        self._do("copy")
        return Fails(self.at, self.taken)

    def accept_token(self, token: int) -> None:
        self._do("accept")
        self.taken += (token,)

    def is_terminated(self) -> bool:
        self._do("terminated")
        return False

    def allocate_vocab_mask(self, size: int, rows: int, device: str) -> torch.Tensor:
        self._do("allocate")
        return torch.zeros(rows, size // 32, dtype=torch.int32)

    def fill_vocab_mask(self, mask: torch.Tensor, row: int) -> None:
        self._do("fill")


STEPS = ["copy", "accept", "terminated", "allocate", "fill"]


@pytest.mark.parametrize("step", STEPS)
def test_no_row_has_a_mask_from_where_its_grammar_fails(step):
    req = make_request(Fails(), [])
    req.output_ids = [4, 5]
    assert None not in constraints.of_rows(req, [2, 3], 64)
    req.gate.grammar_start.at = step
    assert list(constraints.of_rows(req, [2, 3], 64)) == [None, None]
    assert req.gate.grammar_failed


@pytest.mark.parametrize("step", ["copy", "accept"])
def test_a_grammar_that_cannot_follow_is_left_and_its_request_aborted(step):
    advanced = Fails()
    req = make_request(advanced, [4, 5])
    req.gate.grammar_start.at = step
    constraints.follow(req, NO_PENALTIES)
    assert req.grammar is advanced and advanced.taken == (4, 5), "not walked twice"
    assert req.to_finish.to_json() == FINISH_ABORT().to_json()


def test_a_grammar_that_cannot_be_kept_aborts_its_request_behind_the_first_token():
    """SGLang's own abort of such a grammar begins there: the answer is as long as ungated."""
    good, bad = make_request(Fails(), []), make_request(Fails("copy"), [])
    assert bad.gate.grammar_start is None and bad.to_finish is None
    assert list(constraints.of_rows(bad, [2], 64)) == [None]
    constraints.abort_failed([good, bad])
    assert good.to_finish is None and isinstance(bad.to_finish, FINISH_ABORT)
    bad.finished, bad.to_finish = lambda: True, None
    constraints.abort_failed([bad])
    assert bad.to_finish is None, "it had its end"


def test_real_grammars_that_end_a_scheduler_do_not(tokenizer):
    """llguidance gives these up when their first mask is computed; then they cannot be copied."""
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend

    backend = GuidanceBackend(tokenizer, n_vocab=VOCABULARY)
    made = backend.dispatch_ebnf("root ::= root")
    mask = made.allocate_vocab_mask(VOCABULARY, 1, "cpu")
    made.fill_vocab_mask_batched([GrammarRow(0, made)], mask)  # as the fast path does
    req = make_request(made, [])
    assert req.gate.grammar_failed
    with pytest.raises(ValueError):  # which SGLang takes as an abort
        made.accept_token(5)


def test_a_real_grammar_that_gives_up_in_mid_answer_has_no_mask_from_there(tokenizer):
    """This one compiles, and is too much for llguidance some twenty characters later."""
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend

    made = GuidanceBackend(tokenizer, n_vocab=VOCABULARY).dispatch_regex("(.{1,300}a){1,100}")
    req = make_request(made, [])
    assert not req.gate.grammar_failed
    req.output_ids = tokenizer.encode("a", add_special_tokens=False) * 30
    masks = list(constraints.of_rows(req, [2, 31], VOCABULARY))
    assert masks[0] is not None and masks[1] is None
    assert req.gate.grammar_failed


def test_behind_a_failure_there_is_no_mask_though_the_grammar_would_go_on():
    """What it took after a token that it did not take is another text."""

    class Once(Fails):
        def copy(self) -> Fails:
            return Once()

        def accept_token(self, token: int) -> None:
            if token == 9:
                raise ValueError("not this one")
            super().accept_token(token)

    req = make_request(Once(), [])
    req.output_ids = [4, 9, 5, 6]
    first, *behind = constraints.of_rows(req, [2, 3, 4], 64)
    assert first is not None and behind == [None, None]
    assert req.gate.grammar_failed
