"""The emitted token, its margin and its log-probs from the logits that the gate can verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB

from margingate.runtime.request.forward_record import record_on
from margingate.runtime.sampling import logprobs, seeds
from margingate.runtime.sampling.penalties import Table
from margingate.runtime.sampling.router_margins import RouterMargins
from margingate_kernels import Top2, seeded_top2, softmax_top2


@dataclass(slots=True)
class _Forward:
    """One forward on its way through the sampler."""

    info: Any  # SGLang's SamplingBatchInfo
    seeds: torch.Tensor | None  # int64 [rows]; None: no row is drawn by the gate
    positions: torch.Tensor  # int64 [rows], of the rows' input tokens
    logprobs_wanted: bool
    best: Top2 | None = None
    ours: torch.Tensor | None = None  # bool [rows]: the gate chose; None: all rows, or none
    logprobs: torch.Tensor | None = None  # float32 [rows, vocab]; None: not wanted


def sample_unseeded(original: Any, runner: Any, output: Any, batch: Any) -> torch.Tensor:
    """SGLang's tokens, in which its draws have no seeds: those are of rows that the gate draws.

    Stands alone after a failure of `Sampling.sample`, which ends the requests of these rows.
    SGLang's own seeded draws do not run on a CPU.
    """
    info = batch.sampling_info
    seeds, info.sampling_seed = info.sampling_seed, None
    try:
        tokens: torch.Tensor = original(runner, output, batch)
    finally:
        info.sampling_seed = seeds
    return tokens


class Sampling:
    """What the gate does within SGLang's sampler, forward by forward."""

    def __init__(
        self, penalties: Table, *, observes: bool, routers: RouterMargins | None = None
    ) -> None:
        """
        Args:
            observes: the policy; margins are noted, and SGLang's tokens stand.
            routers: of a mixture of experts, where their margins are looked at.
        """
        self._penalties, self._observes, self._routers = penalties, observes, routers
        self._forward: _Forward | None = None  # the one being sampled

    def sample(self, original: Any, runner: Any, output: Any, batch: Any) -> torch.Tensor:
        """AROUND ModelRunner.sample: attach the margins, and emit the tokens they belong to.

        Greedy rows get the lowest id among equals in every batch; in a batch that also samples,
        SGLang would draw a greedy row's token from its softmax, where ties break otherwise. Rows
        with a seed get the gate's own draw.

        Args:
            output: SGLang's LogitsProcessorOutput.
            batch: its ForwardBatch.
        """
        self._penalties.apply(output.next_token_logits, batch)
        info = batch.sampling_info
        decode = batch.forward_mode.is_decode()
        positions = batch.positions if decode else batch.seq_lens - 1
        forward = _Forward(info, info.sampling_seed, positions, batch.return_logprob)
        self._forward = forward
        try:
            tokens = sample_unseeded(original, runner, output, batch)
        finally:
            self._forward = None
        if forward.best is None:
            return tokens
        record = record_on(output)
        record.best = forward.best
        if self._routers is not None:
            record.router = self._routers.sampled(batch, len(forward.best.margin))
        if self._observes:
            return tokens
        ids = forward.best.ids
        if ids.dtype != tokens.dtype:
            ids = ids.to(tokens.dtype)
        return ids if forward.ours is None else torch.where(forward.ours, ids, tokens)

    def after_preprocess(self, logits: torch.Tensor) -> torch.Tensor | None:
        """AFTER Sampler._preprocess_logits: these are the final logits, not yet scaled.

        Returns:
            What SGLang chooses from; None: all of it. A greedy batch has its tokens and log-probs
            by then, and one column is read sooner than a vocabulary.
        """
        forward = self._forward
        if forward is None:  # log-probs without a token
            return None
        info = forward.info
        forward.best = best = softmax_top2(logits)
        if self._observes:
            _make_drawable(logits, best, info)
            return None
        if not info.is_all_greedy:  # at once: None would make all rows ours if this raised below
            forward.ours = info.top_ks.view(-1) <= 1
        if forward.logprobs_wanted:
            unscaled = info.is_all_greedy or SGLANG_RETURN_ORIGINAL_LOGPROB
            scale = None if unscaled else info.temperatures
            forward.logprobs = logprobs.of_logits(logits, scale)
        if info.is_all_greedy:
            return None if any(info.return_sampling_masks or ()) else logits[:, :1]
        if forward.seeds is not None:
            _draw(forward, logits, info)
        _make_drawable(logits, best, info)
        return None

    def compute_logprobs(
        self, original: Any, processor: Any, theirs: torch.Tensor, *asked: Any
    ) -> Any:
        """AROUND OutputLogprobProcessor.compute_logprobs: the same bits in every batch.

        SGLang takes the log of a softmax in a batch that samples, and the log-softmax in one that
        does not; it does not know of the tokens that the gate drew, and of a greedy batch it has
        one column. Where some requests of a batch want the log-probs of given tokens it has lists
        for the others, and its scheduler ends at the first.
        """
        forward = self._forward
        if forward is not None and forward.logprobs is not None:
            theirs, asked = _with_ours(forward, theirs, asked)
        result = original(processor, theirs, *asked)
        if (values := result.token_ids_logprobs_val) is not None:
            result.token_ids_logprobs_val = [
                each if isinstance(each, torch.Tensor) else theirs.new_empty(0) for each in values
            ]
        return result

    def logprobs_failed(
        self, original: Any, processor: Any, theirs: torch.Tensor, *asked: Any
    ) -> Any:
        """After a failure of `compute_logprobs`: of a greedy batch SGLang has one column only."""
        forward = self._forward
        if forward is not None and forward.logprobs is not None and forward.ours is None:
            theirs, asked = _with_ours(forward, theirs, asked)
        return original(processor, theirs, *asked)


def _make_drawable(logits: torch.Tensor, best: Top2, info: Any) -> None:
    """A row of a batch that samples keeps its best token alone if its softmax is of no numbers.

    One client's parameters make such rows: a grammar and a least length leave no token, a logit is
    infinite, or it is once divided by the temperature. torch's draw from one ends the scheduler.

    Args:
        logits: final, not yet scaled; changed in place, but for the bits of other rows.
        best: of `logits`; the log-prob of a row without a softmax is NaN.
    """
    if info.is_all_greedy:
        return
    ids = best.ids.view(-1, 1)
    highest = logits.gather(1, ids)
    scaled = (highest / info.temperatures).to(logits.dtype)
    broken = torch.isnan(best.logprob).view(-1, 1) | ~scaled.isfinite()
    logits.masked_fill_(broken, -torch.inf)
    logits.scatter_(1, ids, highest.masked_fill(broken, 0))


def _draw(forward: _Forward, logits: torch.Tensor, info: Any) -> None:
    """Draw the rows with a seed, and no others: a draw may sort the vocabulary."""
    assert forward.seeds is not None and forward.best is not None and forward.ours is not None
    ids, runner_up, margin = forward.best.ids, forward.best.runner_up, forward.best.margin
    seeded = forward.seeds != seeds.NO_SEED
    for rows, filtered in seeds.groups(forward.seeds):
        draws = seeds.batch_draws(info, forward.seeds, forward.positions, rows)
        drawn = seeded_top2(logits if rows is None else logits[rows], draws, filtered=filtered)
        if rows is None:
            ids, runner_up, margin = (
                torch.where(seeded, own, greedy)
                for own, greedy in zip(drawn, (ids, runner_up, margin), strict=True)
            )
        else:
            ids, runner_up, margin = (
                greedy.index_copy(0, rows, own)
                for own, greedy in zip(drawn, (ids, runner_up, margin), strict=True)
            )
    forward.ours = forward.ours | seeded
    forward.best = forward.best._replace(ids=ids, runner_up=runner_up, margin=margin)


def _with_ours(
    forward: _Forward, theirs: torch.Tensor, asked: tuple[Any, ...]
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """SGLang's log-probs, and tokens as the last of what is asked, with ours where we chose."""
    assert forward.logprobs is not None and forward.best is not None
    *wanted, chosen = asked
    ids = forward.best.ids.to(chosen.dtype)
    if forward.ours is None:
        return forward.logprobs, (*wanted, ids)
    mixed = torch.where(forward.ours.view(-1, 1), forward.logprobs, theirs)
    return mixed, (*wanted, torch.where(forward.ours, ids, chosen))
