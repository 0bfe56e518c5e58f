"""Which rows of a batch are drawn by the gate, as SGLang makes, joins and filters batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from margingate.runtime.request.sampling_params import Draw
from margingate.runtime.sampling import sampler, seeds

VOCABULARY = 50
LOGITS = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(7, 13)


def draw_of(seed: int) -> Draw:
    """Odd seeds leave tokens out."""
    top_p = 0.9 if seed % 2 else 1.0
    return Draw(seed, 0.8, TOP_K_ALL, top_p, 0.0)


def info_of(given: list[int | None]) -> Any:
    """A batch of requests with these seeds; those with None are greedy."""
    rows = len(given)
    info = SamplingBatchInfo(
        temperatures=torch.full((rows, 1), 0.8),
        top_ps=torch.tensor([1.0 if seed is None else draw_of(seed).top_p for seed in given]),
        top_ks=torch.tensor([1 if seed is None else 1 << 30 for seed in given]),
        min_ps=torch.zeros(rows),
        is_all_greedy=not any(seed is not None for seed in given),
        is_any_greedy=None in given,
        need_top_p_sampling=True,
        need_top_k_sampling=None in given,
        need_min_p_sampling=False,
        vocab_size=VOCABULARY,
        device="cpu",
        penalizer_orchestrator=cast(Any, SimpleNamespace(filter=lambda _: None)),
    )
    draws = [None if seed is None else draw_of(seed) for seed in given]
    reqs = [SimpleNamespace(gate=SimpleNamespace(draw=draw)) for draw in draws]
    seeds.from_schedule_batch(None, info, SimpleNamespace(reqs=reqs), VOCABULARY)
    return info


def filtered(info: Any, keep: list[int]) -> Any:
    on_device = torch.tensor(keep)
    for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed"):
        if (value := getattr(info, name)) is not None:
            setattr(info, name, value[on_device])  # as SGLang does
    seeds.filter_batch(None, info, keep, on_device)
    return info


def joined(info: Any, other: Any) -> Any:
    for name in ("temperatures", "top_ps", "top_ks", "min_ps"):
        setattr(info, name, torch.cat([getattr(info, name), getattr(other, name)]))
    if info.sampling_seed is not None and other.sampling_seed is not None:
        info.sampling_seed = torch.cat([info.sampling_seed, other.sampling_seed])
    info.is_all_greedy &= other.is_all_greedy
    seeds.merge_batch(None, info, other)
    return info


# A batch, its rows that keep all tokens, and those that leave some out.
BATCHES = {
    "made": lambda: (info_of([None, 5, None, 9, None, None]), [], [1, 3]),
    "made with both": lambda: (info_of([4, 5, None, 9, 8]), [0, 4], [1, 3]),
    "filtered": lambda: (filtered(info_of([None, 5, None, 8]), [0, 2, 3]), [2], []),
    "joined": lambda: (joined(info_of([None, 4]), info_of([None, None, 9])), [1], [4]),
    "joined by one with seeds": lambda: (joined(info_of([None, None]), info_of([9])), [], [2]),
    "joined by one without": lambda: (joined(info_of([8]), info_of([None])), [0], []),
    "of seeds alone": lambda: (info_of([4, 8]), [0, 1], []),
    "of seeds alone, with both": lambda: (info_of([4, 9]), [0], [1]),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_with_a_seed_are_drawn_and_no_others(batch, monkeypatch):
    info, plain, leaving_out = BATCHES[batch]()
    mine = plain + leaving_out
    rows = len(info.temperatures)
    drawn: dict[bool, torch.Tensor] = {}
    original = sampler.seeded_top2

    def noted(logits: torch.Tensor, draws: Any, *, filtered: bool) -> Any:
        assert filtered not in drawn
        drawn[filtered] = logits
        return original(logits, draws, filtered=filtered)

    with monkeypatch.context() as patched:
        patched.setattr(sampler, "seeded_top2", noted)
        forward = step(SamplingBatchInfo.copy_for_forward(with_no_penalties(info)), rows)
    for filtered, its in ((False, plain), (True, leaving_out)):
        assert (filtered in drawn) is bool(its), "one request would cost all rows a sort"
        assert not its or torch.equal(drawn[filtered], LOGITS[:rows][its])
    assert forward.ours.tolist() == [True] * rows
    for row in range(rows):
        want = alone(info, row) if row in mine else int(LOGITS[row].argmax())
        assert int(forward.best.ids[row]) == want
    greedy = [row for row in range(rows) if row not in mine]
    best = LOGITS[greedy].topk(2).values
    assert torch.equal(forward.best.margin[greedy], best[:, 0] - best[:, 1])


def with_no_penalties(info: Any) -> Any:
    info.update_penalties = lambda: None
    return info


def alone(info: Any, row: int) -> int:
    """What the row is drawn as by itself."""
    forward = step(info_of([int(info.sampling_seed[row])]), 1, first=row)
    return int(forward.best.ids[0])


def step(info: Any, rows: int, first: int = 0) -> Any:
    gate = sampler.Sampling(cast(Any, None), observes=False)
    some = slice(first, first + rows)
    gate._forward = sampler._Forward(info, info.sampling_seed, POSITIONS[some], False)
    gate.after_preprocess(LOGITS[some].clone())
    return gate._forward


def test_a_start_compiles_the_draws_of_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(seeds, "seeded_top2", lambda *a, **how: calls.append((*a, how)))
    seeds.compile_draws(VOCABULARY, "cpu")
    assert not calls
    seeds.compile_draws(VOCABULARY, "meta")
    ((logits, draws, how),) = calls
    assert logits.shape == (1, VOCABULARY) and logits.dtype == torch.float32
    assert draws.seeds.device.type == "meta" and how == {"filtered": False}
