"""The emitted token and its margin from one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch

from margingate.runtime import state
from margingate_kernels import Top2, softmax_top2

# The result of the sampler's latest preprocessing, between the two hooks of one forward.
_latest: list[Top2] = []


def after_preprocess(logits: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    """AFTER Sampler._preprocess_logits: these are the final logits, not yet scaled."""
    _latest[:] = [softmax_top2(logits)]


def sample(original: Any, runner: Any, logits_output: Any, forward_batch: Any) -> torch.Tensor:
    """AROUND ModelRunner.sample: attach the margins, and emit the token they belong to.

    Greedy rows get the lowest id among equals in every batch; in a batch that also samples,
    SGLang would draw a greedy row's token from its softmax, where ties break otherwise.
    """
    _latest.clear()
    tokens = original(runner, logits_output, forward_batch)
    if not _latest:
        return tokens
    best = _latest.pop()
    logits_output.gate = best
    if state.controller().observes_only:
        return tokens
    info = forward_batch.sampling_info
    if info.is_all_greedy:
        return best.ids.to(tokens.dtype)
    return torch.where(info.top_ks.view(-1) <= 1, best.ids.to(tokens.dtype), tokens)
