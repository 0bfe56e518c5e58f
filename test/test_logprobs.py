"""Log-probs: those of a row and their order depend on that row alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers import logprob_processor
from sglang.srt.layers.logprob_processor import LogprobResult, LogprobStage, OutputLogprobProcessor

from margingate.runtime.hooks import scheduler_table
from margingate.runtime.sampling import logprobs, sampler
from margingate.runtime.verify import verifier
from margingate.runtime.verify.verifier import RowInput
from margingate_kernels import softmax_top2

VOCABULARY = 2000  # in bfloat16 a score of such a row has many equals


def scores(seed: int, rows: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Logits as a bfloat16 matmul gives them, some of them masked."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(rows, vocabulary, generator=generator) * 3).bfloat16().float()
    made[:, seed % vocabulary] = -torch.inf
    return made


def in_order(row: torch.Tensor) -> list[int]:
    """All ids, by the definition: likelier first, then the lower id."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@given(st.integers(0, 10_000), st.lists(st.sampled_from([1, 2, 5, 10, 50, 200]), min_size=2))
@settings(max_examples=25, deadline=None)
def test_the_first_of_any_k_are_those_in_order(seed, ks):
    found = logprobs.of_logits(scores(seed, 3))
    orders = [in_order(row) for row in found]
    for k in ks:
        top = logprobs.ranked(found, k)
        assert top.indices.tolist() == [order[:k] for order in orders]
        assert torch.equal(top.values, found.gather(-1, top.indices))


def test_torch_itself_takes_other_ones_of_the_equals():
    """Else the test above asks nothing."""
    found = logprobs.of_logits(scores(0, 40))
    assert not torch.equal(found.topk(10).indices, logprobs.ranked(found, 10).indices)


@given(st.lists(st.floats(width=32, max_value=0.0, allow_nan=False), min_size=1, max_size=50))
@settings(deadline=None)
def test_any_log_probs_are_ranked(values):
    row = torch.tensor([[*values, 0.0, -0.0, -torch.inf]])
    assert logprobs.ranked(row, row.shape[1]).indices[0].tolist() == in_order(row[0])


def test_more_rows_than_are_ranked_at_once():
    found = logprobs.of_logits(scores(1, 7))
    top = logprobs.ranked(found, 7)
    assert top.indices.tolist() == [in_order(row)[:7] for row in found]
    assert logprobs.ranked(found, 0).indices.shape == (len(found), 0)
    assert logprobs.ranked(found[:0], 7).values.shape == (0, 7), "a chunk of none"


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([997, 998, 999, 1000]))
@settings(max_examples=40, deadline=None)
def test_a_rows_log_probs_do_not_depend_on_the_others(seed, rows, vocabulary):
    logits = scores(seed, rows, vocabulary)
    kept = logits.clone()
    scale = torch.linspace(0.5, 1.5, rows).view(-1, 1)
    together = logprobs.of_logits(logits, scale)
    assert together.shape == logits.shape and torch.equal(logits, kept)
    assert bool(together.isfinite().all())
    for i in range(rows):
        alone = logprobs.of_logits(logits[i : i + 1], scale[i : i + 1])
        assert torch.equal(together[i], alone[0])
    expected = torch.log_softmax(logits.double() / scale, -1).clamp(min=together.min().item())
    torch.testing.assert_close(together, expected.float())


# -- the fast path against the verifier


@pytest.fixture
def ranking(monkeypatch):
    """SGLang's two functions as the ledger hooks them."""
    hooks = {hook.target.rsplit(".", 1)[1]: hook for hook in scheduler_table.RUNTIME_HOOKS}
    for name in ("get_top_logprobs_raw", "get_top_logprobs_chunk"):
        original, hook = getattr(logprob_processor, name), hooks[name].function
        monkeypatch.setattr(
            logprob_processor, name, lambda *a, _h=hook, _o=original, **k: _h(_o, *a, **k)
        )


def of_the_fast_path(logits, temperatures, ks, ids) -> LogprobResult:
    """What SGLang reports of a batch, with the sampler's hooks and its own code between them."""
    greedy = all(each == 1.0 for each in temperatures)
    info = SimpleNamespace(
        is_all_greedy=greedy,
        return_sampling_masks=None,
        top_ks=torch.ones(len(logits), dtype=torch.int64),
        temperatures=torch.tensor(temperatures).view(-1, 1),
    )
    forward = sampler._Forward(info, None, torch.zeros(len(logits)), True)
    sampling = sampler.Sampling(cast(Any, None), observes=False)
    sampling._forward = forward
    left = sampling.after_preprocess(logits)
    left = logits if left is None else left
    theirs = torch.log_softmax(left, -1) if greedy else torch.log(torch.softmax(left, -1))
    original = OutputLogprobProcessor.compute_logprobs
    chosen = torch.argmax(left, -1)
    return sampling.compute_logprobs(original, OutputLogprobProcessor(), theirs, ks, ids, chosen)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0, 1.0, 1.0), (1.0, 0.7, 1.3, 1.0)])
def test_the_verifier_says_of_a_row_what_the_fast_path_says(monkeypatch, ranking, temperatures):
    """Also where the neighbours want more: the rows of the pass are other ones, with other k."""
    logits = scores(4, 4)
    ks, ids = [10, 0, 50, 3], [(5, 260), None, None, ()]
    result = of_the_fast_path(logits.clone(), temperatures, ks, ids)
    draws = [None if t == 1.0 else SimpleNamespace(temperature=t) for t in temperatures]
    tokens = softmax_top2(logits).ids.tolist()
    for order in ([0, 1, 2, 3], [3, 0], [0], [2, 1]):
        rows = [RowInput(1, 3, 4, (ks[i], ids[i]), draws[i]) for i in order]
        found = verifier._logprobs(logits[order], rows, [tokens[i] for i in order])
        for n, i in enumerate(order):
            assert found[n].token == result.token_logprobs[i].item()
            values, indices = result.top_logprobs_val[i], result.top_logprobs_idx[i]
            assert (found[n].top or ([], [])) == (values.tolist(), indices.tolist())
            assert (found[n].ids or []) == result.token_ids_logprobs_val[i].tolist()


def test_the_lists_of_a_prompts_tokens_do_not_depend_on_others(ranking):
    found = logprobs.of_logits(scores(5, 40))
    alone: tuple[list, list] = ([], [])
    logprob_processor.get_top_logprobs_chunk(found[:20], [10], [20], *alone, 0)
    beside: tuple[list, list] = ([], [])
    logprob_processor.get_top_logprobs_chunk(found, [10, 50], [20, 20], *beside, 0)
    assert (alone[0][0], alone[1][0]) == (beside[0][0], beside[1][0])
    decode = logprob_processor.get_top_logprobs(found[:2], [10, 50], no_copy_to_cpu=False)
    assert decode[1][0] == alone[1][0][0]
    prefill = logprob_processor.get_top_logprobs_raw(
        found, [10, 50], LogprobStage.PREFILL, [20] * 2
    )
    assert prefill[1][0] == alone[1][0]
