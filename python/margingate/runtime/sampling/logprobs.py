"""Log-probs and their ranking: one way for the fast path, the verifier and a prompt's tokens.

A row's values and order depend on that row alone. Hence one function from logits to log-probs, and
a ranking in which no two tokens are equal: torch's topk returns any of them, and others for another
k, while logits in bfloat16 are equal often.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from margingate.runtime.compat.instance_patches import ON_LOGPROBS, check_instance

_ALIGNED = 4  # float32 values in the 16 bytes that a CUDA softmax loads at once
_LEAST = torch.finfo(torch.float32).min  # as SGLang; JSON has no infinity
_BLOCK = 32  # rows ranked at once on a GPU: keys take 8 bytes a value, and a prompt has many rows


class Ranked(NamedTuple):
    """The first k tokens of each row, best first; names as those of torch's topk."""

    values: torch.Tensor  # float32 [rows, k]
    indices: torch.Tensor  # int64 [rows, k], token ids


def of_logits(logits: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """The log-probs of `logits` [rows, vocab], float32 and finite; `logits` stay as they are.

    Args:
        scale: what each row is divided by, float32 [rows, 1] on the device of `logits`; None: 1.
    """
    vocabulary = logits.shape[-1]
    logits = logits.float()
    if scale is not None:
        logits = logits / scale
    if spare := -vocabulary % _ALIGNED:  # or the order of a row's sum depends on where it begins
        logits = torch.nn.functional.pad(logits, (0, spare), value=-torch.inf)
    return torch.log_softmax(logits, dim=-1)[:, :vocabulary].clamp_(min=_LEAST)


def ranked(logprobs: torch.Tensor, k: int) -> Ranked:
    """The first `k` tokens of each row of `logprobs`, float32 [rows, vocab], none positive.

    The likelier comes first, of equals the one with the lower id. So the first j of k are the
    first j of any other k.

    Waits for no device. Raises RuntimeError where `k` exceeds the vocabulary.
    """
    if k == 0:  # a verify pass whose rows want no more than their tokens'
        return Ranked(logprobs[:, :0], logprobs.new_empty((len(logprobs), 0), dtype=torch.int64))
    at_once = _BLOCK if logprobs.is_cuda else 1  # on a CPU, what its cache holds
    parts = logprobs.split(at_once)
    every = torch.arange(logprobs.shape[-1], device=logprobs.device)
    blocks = [_keys(part, every).topk(k, dim=-1, largest=False).values for part in parts]
    ids = torch.cat(blocks) & 0xFFFFFFFF
    return Ranked(logprobs.gather(-1, ids), ids)


def _keys(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of `ranked`, int64: 32 bits of the value above 32 of the id.

    No log-prob is positive, and bits of floats without a sign are in the order of their values.
    """
    return torch.add(ids, logprobs.abs().view(torch.int32), alpha=1 << 32)


class _Rankable:
    """Stands in for log-probs where SGLang ranks them, which is all that it does with it."""

    def __init__(self, logprobs: torch.Tensor) -> None:
        self._logprobs = logprobs

    def topk(self, k: int, dim: int) -> Ranked:
        assert dim in (-1, self._logprobs.dim() - 1)
        return ranked(self._logprobs, k)


def rank(original: Any, logprobs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """AROUND get_top_logprobs_raw and get_top_logprobs_chunk: no request's list depends on the k
    of others. SGLang ranks all rows for the largest.

    Raises:
        RuntimeError: these are logits and what to subtract from them, which `as_log_softmax`
            has switched off.
    """
    if kwargs.get("log_normalizer") is not None:
        raise RuntimeError("margingate: SGLang ranks logits where it was told to rank log-probs")
    return original(_Rankable(logprobs), *args, **kwargs)


def of_a_prompt(  # noqa: PLR0917
    original: Any,
    processor: Any,
    pruned_states: Any,
    sample_indices: Any,
    input_logprob_indices: Any,
    token_to_seq_idx: Any,
    lm_head: Any,
    get_logits_fn: Any,
    *rest: Any,
    **named: Any,
) -> Any:
    """AROUND InputLogprobProcessor.forward: the logits of each row begin where `of_logits` has it.

    Args:
        get_logits_fn: gives float32 [rows, vocab].

    Returns:
        SGLang's LogprobResult, and the logits of the rows that are sampled from.
    """
    spare = -processor.vocab_size % _ALIGNED
    rows = (pruned_states, sample_indices, input_logprob_indices, token_to_seq_idx)
    if not spare:
        return original(processor, *rows, lm_head, get_logits_fn, *rest, **named)

    def with_room(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = get_logits_fn(*args, **kwargs)
        return torch.nn.functional.pad(logits, (0, spare), value=-torch.inf)

    result, sampled = original(processor, *rows, lm_head, with_room, *rest, **named)
    return result, sampled[:, : processor.vocab_size].contiguous()


def as_log_softmax(model: Any) -> None:
    """A prompt's log-probs are the log-softmax of its logits, as those of an answer are.

    SGLang takes a shorter way, which another kernel goes where some request of the forward wants
    the likeliest tokens. Mutates the model's processor; before the first request.

    Raises:
        GateError: SGLang has no such switch.
    """
    for module in model.modules():
        processor = getattr(module, "input_logprob_processor", None)
        if processor is not None:
            check_instance(processor, ON_LOGPROBS)
            processor.enable_fast_input_logprobs = False
