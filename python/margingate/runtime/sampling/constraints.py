"""What a request's parameters do to its logits before a token is chosen: penalties, grammar, bias.

A grammar's state follows from the tokens so far. So a row that is verified gets the mask that the
fast path had, and a request that is taken back gets the state that its tokens lead to: both by
walking from a copy that was made before its first token. A grammar that fails at that (backends
have limits of their own) is noted in `req.gate.grammar_failed`; it ends its request, as a token
that a grammar does not take ends it in SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from margingate.runtime.request import lifecycle
from margingate.runtime.sampling import penalties


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
            # Outlines leaves it where it was made, which on the fast path is the logits' device.
            self.grammar.apply_vocab_mask(logits, mask.to(logits.device))
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
        req.gate.grammar_start = _copy(req)


def follow(req: Any, counts: penalties.Table, *, newest: bool = True) -> None:
    """The output was changed: grammar and `counts` become those that it leads to.

    Where the grammar cannot follow, the request is aborted; its grammar stays as it was.

    Args:
        newest: False: the last token is for `take_newest`, behind a finish check as in SGLang.
    """
    if req.gate.penalties is not None:
        counts.recount(req)
    if req.grammar is None and req.gate.grammar_start is None:
        return
    grammar, tokens = _start(req), req.output_ids if newest else req.output_ids[:-1]
    if grammar is not None and _walk(req, grammar, tokens):
        req.grammar = grammar
    else:
        lifecycle.abort_next(req)


def take_newest(req: Any) -> bool:
    """Whether the grammar took the last token; if not, the request is aborted."""
    if req.grammar is None or req.gate.grammar_failed:
        return True  # or aborted by `follow`
    taken = _walk(req, req.grammar, req.output_ids[-1:])
    if not taken:
        lifecycle.abort_next(req)
    return taken


def abort_failed(reqs: Iterable[Any]) -> None:
    """After a prefill: those whose grammar could not be kept in `begin`.

    SGLang's own abort begins here too, so that the answer has as many tokens as without a gate.
    Where SGLang would go on, no pass could verify what follows: whether one is due must not decide.
    """
    for req in reqs:
        if req.gate.grammar_failed:
            lifecycle.abort_next(req)


def of_rows(req: Any, rows: Sequence[int], size: int) -> Iterator[Constraint | None]:
    """The constraint of each row (from 1, ascending).

    From the row on where the grammar fails there is no mask: no verdict may be made of that.

    Args:
        size: of the vocabulary.
    """
    bias = {int(token): value for token, value in (req.sampling_params.logit_bias or {}).items()}
    grammar, done = None if req.grammar is None else _start(req), 0
    for row in rows:
        mask = None
        if grammar is not None and _walk(req, grammar, req.output_ids[done : row - 1]):
            mask = _mask(req, grammar, size)
        if req.gate.grammar_failed:
            grammar = None
        done = row - 1
        penalty = penalties.of_row(req, row)
        free = mask is None and not bias and penalty is None
        yield None if free else Constraint(grammar, mask, bias, penalty)


# Backends raise errors of their own: a grammar that fails in any way is no reason to end a server.


def _start(req: Any) -> Any:
    """A grammar without a token; None where there is none to be had."""
    start = req.gate.grammar_start
    return None if start is None else _copy(req, start)


def _copy(req: Any, grammar: Any = None) -> Any:
    """Of the request's grammar if no other is given. None where it fails, which is noted."""
    try:
        return (req.grammar if grammar is None else grammar).copy()
    except Exception:
        req.gate.grammar_failed = True
        return None


def _walk(req: Any, grammar: Any, tokens: Sequence[int]) -> bool:
    """Whether the grammar took all tokens; a failure is noted.

    SGLang says behind each token whether its request has finished: none that goes on has, also
    behind an end token that `ignore_eos` ignores, where llguidance took itself to be through.
    """
    try:
        for token in tokens:
            grammar.accept_token(token)
            grammar.finished = False
    except Exception:
        req.gate.grammar_failed = True
        return False
    return True


def _mask(req: Any, grammar: Any, size: int) -> torch.Tensor | None:
    """None where the grammar is through, or fails, which is noted."""
    try:
        if grammar.is_terminated():
            return None
        mask: torch.Tensor = grammar.allocate_vocab_mask(size, 1, "cpu")
        grammar.fill_vocab_mask(mask, 0)
    except Exception:
        req.gate.grammar_failed = True
        return None
    return mask
