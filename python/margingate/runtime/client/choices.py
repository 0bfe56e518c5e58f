"""`n` above 1 with a seed: each choice goes to the scheduler with a seed of its own.

SGLang sends a request to fill the prefix cache, which draws nothing, and then `n` copies of what it
made of the prompt. All of them have one object of sampling parameters, and no number. The requests
that they were made of are copies of one, too, and share the counter that is put on it.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

from margingate.core.choice_seeds import choice_seed
from margingate.runtime.request.sampling_params import LARGEST_SEED

_COUNTER = "_margingate_choices"  # on SGLang's GenerateReqInput, and by reference on its copies


async def tokenize_one_request(original: Any, manager: Any, obj: Any) -> Any:
    """AROUND TokenizerManager._tokenize_one_request, which makes what is copied then."""
    setattr(obj, _COUNTER, itertools.count())
    return await original(manager, obj)


async def send_one_request(original: Any, manager: Any, tokenized: Any) -> Any:
    """AROUND TokenizerManager._send_one_request: a choice becomes a request with its own seed.

    Mutates `tokenized`: it gets parameters of its own, with `n` 1. The scheduler refuses a choice
    that has none.
    """
    params = tokenized.sampling_params
    numbers = getattr(manager.rid_to_state[tokenized.rid].obj, _COUNTER, None)
    if numbers is not None and _draws(params):
        params = copy.copy(params)
        params.sampling_seed, params.n = choice_seed(params.sampling_seed, next(numbers)), 1
        tokenized.sampling_params = params
    return await original(manager, tokenized)


def _draws(params: Any) -> bool:
    """Whether several choices are to be drawn with a seed that the scheduler takes."""
    seed = params.sampling_seed
    taken = type(seed) is int and 0 <= seed <= LARGEST_SEED
    return params.n > 1 and taken and params.max_new_tokens != 0
