"""Final logits that no request should make, and what SGLang and its grammars do with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.constrained.outlines_backend import OutlinesGrammar

from margingate.runtime.sampling import constraints, sampler


@pytest.mark.parametrize("observes", [False, True])
def test_a_row_without_a_softmax_leaves_sglang_its_best_token_and_others_their_bits(observes):
    """SGLang's torch draws end the process over one: no token left, an infinite logit, none that is
    a number, and one that is infinite once divided by a low temperature.
    """
    inf = torch.inf
    good, bare, odd = [0.5, 2.0, 1.0, -inf], [-inf] * 4, [1.0, torch.nan, 3.0, 2.0]
    rows = [good, bare, [1.0, inf, 2.0, inf], odd, [0.0, 1.0, 3e38, 0.0]]
    info = SimpleNamespace(
        is_all_greedy=False,
        top_ks=torch.full((5,), 20),
        temperatures=torch.tensor([[0.7], [0.7], [1.0], [1.0], [0.1]]),
    )
    sampling = sampler.Sampling(cast(Any, None), observes=observes)
    sampling._forward = forward = sampler._Forward(info, None, torch.zeros(5), False)
    logits = torch.tensor(rows)
    assert sampling.after_preprocess(logits) is None
    assert torch.equal(logits[0], torch.tensor(good))
    assert forward.best.ids.tolist() == [1, 0, 1, 2, 2]
    probabilities = torch.softmax(logits / info.temperatures, -1)
    assert torch.multinomial(probabilities, 1).flatten().tolist()[1:] == [0, 1, 2, 2]


def test_a_mask_is_where_the_logits_are(monkeypatch):
    """Outlines' masks stay where they are made: a GPU's logits take none that is on the CPU."""
    steps = SimpleNamespace(get_next_instruction=lambda _state: SimpleNamespace(tokens=[2, 5]))
    grammar = OutlinesGrammar(cast(Any, steps), None)
    mask = constraints._mask(SimpleNamespace(gate=SimpleNamespace()), grammar, 8)
    constraint = constraints.Constraint(grammar, mask, {})
    logits = torch.zeros(1, 8)
    constraint.apply(logits)
    assert logits[0].isfinite().nonzero().flatten().tolist() == [2, 5]
    given = []
    monkeypatch.setattr(OutlinesGrammar, "apply_vocab_mask", lambda *args: given.append(args[-1]))
    constraint.apply(torch.zeros(1, 8, device="meta"))
    assert given[0].device.type == "meta"
