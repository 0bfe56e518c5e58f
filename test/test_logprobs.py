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

from margingate.config import GateError
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


class Head:
    """What SGLang's processor asks for logits, by the rows' numbers."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, states, _head, _metadata, *, use_logits_buffer):
        return self.logits[states[:, 0].long()]


def prompt_logprobs(processor, logits: torch.Tensor, ks: list[int]) -> Any:
    """Of prompts of equal length, a row for each token; SGLang's own code and the hooks."""
    rows, each = len(logits), len(logits) // len(ks)
    indices = torch.arange(rows)
    metadata = SimpleNamespace(
        sample_indices_cpu=[],
        input_logprob_indices_cpu=indices.tolist(),
        extend_return_top_logprob=any(ks),
        extend_token_ids_logprob=False,
        top_logprobs_nums=ks,
        extend_logprob_pruned_lens_cpu=[each] * len(ks),
        extend_input_logprob_token_ids_gpu=indices,
    )
    owners = [i // each for i in range(rows)]
    found, _ = processor.forward(
        indices.view(-1, 1).float(), indices[:0], indices, owners, None, Head(logits), metadata
    )
    return found


@pytest.fixture
def processor() -> Any:
    """Of a model whose log-probs are those of the gate."""
    from sglang.srt.layers.logprob_processor import InputLogprobProcessor

    made = InputLogprobProcessor(VOCABULARY)
    assert made.enable_fast_input_logprobs, "else there is nothing to switch off"
    model = torch.nn.Module()
    model.logits_processor = torch.nn.Module()
    model.logits_processor.input_logprob_processor = made
    logprobs.as_log_softmax(model)
    return made


def test_a_prompts_log_probs_are_the_log_softmax_of_its_logits(processor, ranking):
    logits = scores(6, 40) + 40  # logits are ranked as log-probs only where none is positive
    found = prompt_logprobs(processor, logits, [10, 50])
    expected = torch.log_softmax(logits, -1)
    assert torch.equal(found.token_logprobs, expected[range(40), range(40)])
    alone = prompt_logprobs(processor, logits[:20], [10])
    assert torch.equal(alone.token_logprobs, found.token_logprobs[:20])
    assert alone.top_logprobs_idx[0] == found.top_logprobs_idx[0]
    assert found.top_logprobs_idx[0] == [in_order(row)[:10] for row in expected[:20]]


@pytest.mark.parametrize("vocabulary", [997, 998, 999, 1000])
def test_a_prompts_log_probs_are_those_of_an_answer_for_any_vocabulary(processor, vocabulary):
    """Each row begins at a multiple of 16 bytes, as it does where an answer's are computed."""
    logits, seen = scores(7, 5, vocabulary), []

    def original(_processor, _states, sample_indices, _inputs, _owners, _head, get_logits_fn):
        found = get_logits_fn(1, use_logits_buffer=True)
        seen.append(found)
        return torch.log_softmax(found, -1), found[sample_indices]

    def get_logits(states, *, use_logits_buffer):
        assert (states, use_logits_buffer) == (1, True)
        return logits

    processor.vocab_size = vocabulary
    rows: Any = (None, torch.tensor([0, 4]), None, None, None)
    found, sampled = logprobs.of_a_prompt(original, processor, *rows, get_logits)
    assert seen[0].stride(0) % 4 == 0
    assert torch.equal(
        found[:, :vocabulary].clamp(min=torch.finfo(torch.float32).min), logprobs.of_logits(logits)
    )
    assert torch.equal(sampled, logits[[0, 4]]) and sampled.is_contiguous()


def test_logits_are_not_ranked_as_log_probs(processor, ranking):
    """Should SGLang go the shorter way all the same."""
    processor.enable_fast_input_logprobs = True
    with pytest.raises(RuntimeError, match="SGLang ranks logits"):
        prompt_logprobs(processor, scores(6, 4), [2, 3])


def test_a_processor_without_the_switch_ends_the_start():
    model = torch.nn.Module()
    model.input_logprob_processor = object()
    with pytest.raises(GateError, match=r"InputLogprobProcessor\.enable_fast_input_logprobs"):
        logprobs.as_log_softmax(model)
