"""What a request's parameters do to its logits before a token is chosen: penalties, grammar, bias.

A grammar's state follows from the tokens so far. So a row that is verified gets the mask that the
fast path had, and a request that is taken back gets the state that its tokens lead to: both by
walking from a copy that was made before its first token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from margingate.runtime import penalties, state


@dataclass(frozen=True, slots=True)
class Constraint:
    """Of one row."""

    grammar: Any  # SGLang's grammar object, for how its mask is applied; None: no mask
    mask: torch.Tensor | None  # [1, words], as the grammar's backend makes it
    bias: dict[int, float]  # logits by token id
    penalty: penalties.RowPenalty | None = None

    def apply(self, logits: torch.Tensor) -> None:
        """Change one row of logits, [1, vocab], in place, as the fast path does."""
        if self.penalty is not None:
            self.penalty.apply(logits)
        if self.mask is not None:
            mask = self.grammar.move_vocab_mask(self.mask, logits.device)
            self.grammar.apply_vocab_mask(logits, mask)
        if self.bias:
            added = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
            ids = torch.tensor(list(self.bias), device=logits.device)
            added[0, ids] = torch.tensor(
                list(self.bias.values()), dtype=torch.float32, device=logits.device
            )
            logits.add_(added)


def constrained(req: Any) -> bool:
    """Whether the request has any; a grammar is there once its request is queued."""
    return (
        req.grammar is not None
        or bool(req.sampling_params.logit_bias)
        or req.gate.penalties is not None
    )


def begin(req: Any) -> None:
    """Before the request's first token is processed: keep the grammar's state."""
    if req.grammar is not None:
        req.gate.grammar_start = _copy(req.grammar)


def follow(req: Any) -> None:
    """The output was changed: grammar and counts become those that it leads to."""
    if req.gate.penalties is not None:
        state.controller().penalties.recount(req)
    if req.gate.grammar_start is not None:
        req.grammar = _copy(req.gate.grammar_start) or req.grammar
        _walk(req.grammar, req.output_ids)


def of_rows(req: Any, rows: Sequence[int], size: int) -> Iterator[Constraint | None]:
    """The constraint of each row (from 1, ascending).

    Args:
        size: of the vocabulary.
    """
    bias = {int(token): value for token, value in (req.sampling_params.logit_bias or {}).items()}
    start, done = req.gate.grammar_start, 0
    grammar = None if start is None else _copy(start)
    for row in rows:
        mask = None
        if grammar is not None and not _walk(grammar, req.output_ids[done : row - 1]):
            grammar = None
        if grammar is not None and not grammar.is_terminated():
            mask = _mask(grammar, size)
        done = row - 1
        penalty = penalties.of_row(req, row)
        free = mask is None and not bias and penalty is None
        yield None if free else Constraint(grammar, mask, bias, penalty)


def _walk(grammar: Any, tokens: Sequence[int]) -> bool:
    """Whether the grammar took all tokens. One that it does not take ends the request in SGLang."""
    try:
        for token in tokens:
            grammar.accept_token(token)
    except Exception:  # backends raise errors of their own
        return False
    return True


def _copy(grammar: Any) -> Any:
    """None where the grammar has failed: SGLang's own next step aborts its request."""
    try:
        return grammar.copy()
    except Exception:
        return None


def _mask(grammar: Any, size: int) -> torch.Tensor | None:
    """None where the grammar gives up, as above."""
    try:
        mask: torch.Tensor = grammar.allocate_vocab_mask(size, 1, "cpu")
        grammar.fill_vocab_mask(mask, 0)
    except Exception:
        return None
    return mask
