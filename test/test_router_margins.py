"""The margins of routers: from SGLang's TopK to the policy, and what is refused without them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sentences import one_sentence
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn
from sglang.srt.runtime_context import get_context, get_parallel

from margingate.config import GateConfig, GateError
from margingate.core.policy import Reason
from margingate.runtime.compat.arguments.server_args import ATTRIBUTE
from margingate.runtime.hooks import firing, path_table, registry
from margingate.runtime.request import guard
from margingate.runtime.request.forward_record import ForwardRecord, record_on
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest
from margingate.runtime.request.sampling_params import Penalties
from margingate.runtime.sampling import router_margins, sampler
from margingate.runtime.schedule.recording import Recorder
from margingate.runtime.verify.simulation import Simulator
from margingate_kernels import Routing, Top2, router_margin_reference

STOCK = GateConfig(fast_path="stock", router_threshold=0.25)
EXPERTS = 16
DECODE = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True))


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What SGLang's routers ask for, and the hook on them, as its registry applies it."""
    wrapped = _wrap_fn(TopK.forward, router_margins.before_topk, HookType.BEFORE)
    monkeypatch.setattr(TopK, "forward", wrapped)
    with get_context().override_server_args(), get_parallel().override(tp_rank=0, tp_size=1):
        yield


class Model(torch.nn.Module):
    """Layers of routers alone."""

    def __init__(self, *routers: TopK) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(routers)

    def route(self, logits: Sequence[torch.Tensor]) -> list[Any]:
        return [
            topk(torch.zeros(len(each), 4), each)
            for topk, each in zip(self.layers, logits, strict=True)
        ]


def routers(count: int = 3, **settings: Any) -> Model:
    return Model(*(TopK(2, layer_id=layer, **settings) for layer in range(count)))


def logits_of(count: int, rows: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, EXPERTS, generator=generator) for _ in range(count)]


def watched(model: Any, config: GateConfig = STOCK) -> router_margins.RouterMargins:
    assert router_margins.watch(model, config, "cpu")
    found = router_margins.of(model)
    assert found is not None
    return found


def margins_of(logits: Sequence[torch.Tensor], routing: Routing, **bias: Any) -> torch.Tensor:
    return torch.stack([router_margin_reference(each, routing, **bias) for each in logits])


# -- from TopK to the rows of a forward


def test_the_least_of_all_layers_is_kept_and_the_first_layer_begins_anew():
    model = routers()
    found = watched(model)
    assert found.sampled(DECODE, 4).isnan().all(), "nothing ran yet"
    near, far = logits_of(3, 4), [10 * each for each in logits_of(3, 4, seed=1)]
    for logits in (near, far):
        model.route(logits)
        least = margins_of(logits, Routing(2)).amin(0)
        assert torch.equal(found.sampled(DECODE, 4), least)
    assert (margins_of(near, Routing(2)).amin(0) < least).any(), "else a minimum of both passes"
    kept = found.sampled(DECODE, 4)
    model.route(near)
    assert torch.equal(kept, least), "a copy"


def test_the_first_layer_is_the_lowest_wherever_it_stands():
    model = Model(TopK(2, layer_id=7), TopK(2, layer_id=3))
    found = watched(model)
    first, second = model.layers[1], model.layers[0]
    for seed in (0, 1):
        low, high = logits_of(2, 4, seed)
        first(torch.zeros(4, 4), low)
        second(torch.zeros(4, 4), high)
    assert torch.equal(found.sampled(DECODE, 4), margins_of([low, high], Routing(2)).amin(0))


def test_a_margin_is_what_it_takes_to_choose_another_expert():
    """SGLang's own choice stays under any smaller change of the logits, and not under a larger."""
    for seed in range(20):
        logits = logits_of(1, 1, seed)[0]
        model = routers(1)
        margin = watched(model)
        [(_, ids, _)] = model.route([logits])
        gap = margin.sampled(DECODE, 1)
        worst, next_best = logits.sort(descending=True).indices[0, 1:3].tolist()
        for share, same in ((0.49, True), (0.51, False)):
            moved = logits.clone()
            moved[0, worst] -= share * gap[0]
            moved[0, next_best] += share * gap[0]
            [(_, other, _)] = model.route([moved])
            assert (set(ids[0].tolist()) == set(other[0].tolist())) == same


BIAS = torch.linspace(-0.3, 0.3, EXPERTS)
GROUPED = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("settings", "routing", "bias"),
    [
        ({"scoring_func": "sigmoid"}, Routing(2), None),
        ({"scoring_func": "sigmoid", "correction_bias": BIAS}, Routing(2, "sigmoid"), BIAS),
        ({"correction_bias": BIAS}, Routing(2), BIAS),
        (GROUPED, Routing(2, groups=4, chosen_groups=2), None),
        (GROUPED | {"correction_bias": BIAS}, Routing(2, "sigmoid", 4, 2), BIAS),
    ],
)
def test_every_way_of_choosing_is_told_from_the_layers_settings(settings, routing, bias):
    model = routers(2, **settings)
    logits = logits_of(2, 5)
    found = watched(model)
    for topk, each in zip(model.layers, logits, strict=True):
        router_margins.before_topk(topk, torch.zeros(5, 4), each)
    want = margins_of(logits, routing, bias=bias).amin(0)
    assert torch.equal(found.sampled(DECODE, 5), want)


def test_the_slots_of_shared_experts_are_not_chosen_among():
    model = routers(1)
    config = model.layers[0].topk_config
    config.shared_experts = SimpleNamespace(num_shared_topk_slots=1)
    config.num_fused_shared_experts = 1  # as 0.5.22 says it
    config.top_k = 3
    assert router_margins.routing_of(model.layers[0]) == Routing(2)


def test_a_bias_of_each_row_replaces_the_layers():
    model = routers(1, correction_bias=BIAS)
    [logits], [bias] = logits_of(1, 3), logits_of(1, 3, seed=9)
    found = watched(model)
    arguments = {"hidden_states": torch.zeros(3, 4), "router_logits": logits}
    router_margins.before_topk(model.layers[0], **arguments, dynamic_expert_bias=bias)
    want = router_margin_reference(logits, Routing(2, "sigmoid"), bias=bias)
    assert torch.equal(found.sampled(DECODE, 3), want)


def test_of_a_prefill_the_last_row_of_each_prompt_counts():
    model = routers(2)
    logits = logits_of(2, 9)
    found = watched(model)
    model.route(logits)
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: False),
        extend_seq_lens=torch.tensor([4, 1, 4], dtype=torch.int32),
    )
    least = margins_of(logits, Routing(2)).amin(0)
    assert torch.equal(found.sampled(batch, 3), least[[3, 4, 8]])


def test_rows_without_room_are_unknown(monkeypatch):
    monkeypatch.setattr(router_margins, "ROWS", 6)
    for model in (routers(2), routers(1, custom_routing_function=route_by_hand)):
        found = watched(model, GateConfig(fast_path="stock", guarantee="exact"))
        model.route(logits_of(len(model.layers), 9))
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: False),
            extend_seq_lens=torch.tensor([6, 3]),
        )
        known = model.layers[0].topk_config.custom_routing_function is None
        assert found.sampled(batch, 2).isnan().tolist() == [not known, True]
        assert found.sampled(DECODE, 9).isnan().tolist() == [not known] * 6 + [True] * 3


def route_by_hand(
    *, gating_output: torch.Tensor, topk: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = gating_output.topk(topk)
    return weights, ids.int()


def test_a_router_of_another_model_folds_nothing():
    model = Model(TopK(2, layer_id=0))
    found = watched(model)
    model.layers.append(TopK(2, layer_id=0))
    near, far = logits_of(1, 4)[0], 100 * logits_of(1, 4, seed=1)[0]
    model.route([far, near])
    assert torch.equal(found.sampled(DECODE, 4), router_margin_reference(far, Routing(2)))


# -- which models, and under which settings


def loaded(model: Any, config: GateConfig | None, *, draft: bool = False) -> Any:
    """A runner that has loaded its model."""
    runner = SimpleNamespace(
        model=model, device="cpu", is_draft_worker=draft, server_args=SimpleNamespace()
    )
    setattr(runner.server_args, ATTRIBUTE, config)
    path_table.after_load(None, runner)
    return runner


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    hooks: list[Any] = []
    monkeypatch.setattr(registry, "install", hooks.extend)
    return hooks


def test_a_dense_model_has_no_hook_and_no_buffer(installed):
    for config in (STOCK, GateConfig(fast_path="stock")):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3))
        loaded(model, config)
        assert router_margins.of(model) is None and not installed
        assert router_margins.unseen(model) == math.inf


def test_routers_are_hooked_once_the_model_is_there(installed):
    model = routers()
    loaded(model, STOCK)
    assert installed == list(path_table.ROUTER_HOOKS)
    assert router_margins.of(model) is not None
    registry.check_target(path_table.ROUTER_HOOKS[0])


@pytest.mark.parametrize(("config", "draft"), [(None, False), (STOCK, True)])
def test_nobody_looks_at_models_that_are_not_gated(installed, config, draft):
    model = routers()
    loaded(model, config, draft=draft)
    assert router_margins.of(model) is None and not installed


def test_sparse_without_a_routers_threshold_is_refused(installed):
    with pytest.raises(GateError) as caught:
        loaded(routers(), GateConfig(fast_path="stock"))
    text = one_sentence(caught.value)
    for way_out in ("--gate-guarantee exact", "--gate-policy always", "--gate-router-threshold"):
        assert way_out in text
    assert not installed


@pytest.mark.parametrize(
    "settings",
    [
        {"guarantee": "exact"},
        {"policy": "always"},
        {"policy": "observe"},
        {"router_threshold": 0.1},
    ],
)
def test_what_rests_on_no_margin_or_on_both_is_served(installed, settings):
    loaded(routers(), GateConfig(fast_path="stock", **settings))
    assert installed


def unusual() -> Iterator[tuple[Any, str]]:
    yield routers(2, custom_routing_function=route_by_hand), "of layer 0 chooses in a way of its"
    odd = {"correction_bias": BIAS, "scoring_func": "sqrtsoftplus"}
    yield routers(1, **odd), "of layer 0 chooses in a way of its"
    own = routers(2)
    own.layers[1].forward = own.layers[1].forward_native
    yield own, "of layer 1 chooses in a way of its own"
    yield Model(TopK(2, layer_id=4), TopK(2, layer_id=4)), "layer 4 has 2 routers"
    experts = FusedMoE.__new__(FusedMoE)
    torch.nn.Module.__init__(experts)
    experts.layer_id = 2
    model = routers(2)
    model.experts = experts
    yield model, "the experts of layer 2 have a router of their own"


@pytest.mark.parametrize("i", range(5))
def test_a_choice_that_cannot_be_measured_is_refused_with_any_threshold(installed, i):
    model, because = list(unusual())[i]
    with pytest.raises(GateError) as caught:
        loaded(model, STOCK)
    text = str(caught.value)
    assert because in text and "--gate-guarantee exact" in text
    assert "--gate-router-threshold" not in text and ". " not in text
    loaded(model, GateConfig(fast_path="stock", guarantee="exact"))
    assert installed


def test_where_nobody_looks_a_model_with_routers_has_rows_to_verify():
    """On the invariant path: a row that is not canonical there."""
    assert math.isnan(router_margins.unseen(routers(1)))


def test_a_request_that_passed_no_router_is_noticed(monkeypatch):
    config = GateConfig(fast_path="stock")
    monkeypatch.setattr(guard, "_tallies", {})
    assert router_margins.TARGET not in list(firing.by_a_request(config))
    guard.wrap(router_margins.TARGET, router_margins.before_topk, guard.Policy.FATAL, around=False)
    assert router_margins.TARGET in list(firing.by_a_request(config))
    assert firing.silent([router_margins.TARGET]) == [router_margins.TARGET]


# -- from the forward to the policy


def test_the_sampler_puts_them_beside_the_margins():
    model = routers()
    logits = logits_of(3, 2)
    found = watched(model)
    model.route(logits)
    info = SimpleNamespace(
        is_all_greedy=True, return_sampling_masks=None, sampling_seed=None, top_ks=torch.ones(2)
    )
    batch = SimpleNamespace(
        sampling_info=info,
        forward_mode=DECODE.forward_mode,
        positions=torch.zeros(2),
        return_logprob=False,
    )
    for routers_margins, want in ((found, margins_of(logits, Routing(2)).amin(0)), (None, None)):
        penalties = cast(Any, SimpleNamespace(apply=lambda logits, batch: None))
        sampling = sampler.Sampling(penalties, observes=False, routers=routers_margins)
        output = SimpleNamespace(next_token_logits=torch.randn(2, 9))

        def of_sglang(runner: Any, output: Any, batch: Any) -> torch.Tensor:
            sampling.after_preprocess(output.next_token_logits)  # noqa: B023
            return output.next_token_logits.argmax(1)

        sampling.sample(of_sglang, None, output, batch)
        record = record_on(output)
        assert record.best is not None
        assert record.router is want if want is None else torch.equal(record.router, want)


def entered(
    record: ForwardRecord | None,
    *,
    unseen: float,
    observe: bool = False,
    decode: Any = None,
    penalties: Penalties | None = None,
) -> list[Any]:
    """The reasons of a forward's two rows; of an observing server, which would be flagged."""
    found: list[Any] = []
    config = GateConfig(
        fast_path="stock", policy="observe" if observe else "margin", router_threshold=0.25
    )
    requests = SimpleNamespace(
        histogram=SimpleNamespace(add_steps=lambda margins: None),
        enter_canonical=lambda rows, margins: rows,
        columns_are_canonical=lambda req: True,
        open=lambda req: None,
        enter_row=lambda req, margin, decision, canonical: found.append(decision.reason),
        count_observed=lambda req, flagged: found.append(flagged),
    )
    gate = GateRequest("k", not observe, penalties=penalties)
    gate.margins.append(1.0)
    req = SimpleNamespace(
        gate=gate, is_retracted=False, finished_reason=None, inflight_middle_chunks=0
    )
    recorder = Recorder(
        SimpleNamespace(),
        config,
        cast(OpenRequests, requests),
        cast(InFlight, SimpleNamespace(overlaps=True)),
        Simulator(config),
        decode=decode,
        unseen=unseen,
    )
    output = SimpleNamespace(margingate=record)
    mode = SimpleNamespace(is_extend=lambda: False)
    batch = SimpleNamespace(reqs=[req, req], forward_mode=mode)
    result = SimpleNamespace(logits_output=output, can_run_cuda_graph=True)
    recorder.record(batch, result)
    return found


def best_of(*margins: float) -> Top2:
    ids = torch.zeros(len(margins), dtype=torch.int64)
    return Top2(ids, ids, torch.tensor(margins), torch.zeros(len(margins)))


@pytest.mark.parametrize(("repetition", "flagged"), [(1.0, 0), (1.7, 1), (0.6, 1)])
def test_a_margin_that_penalties_stretched_is_held_to_the_models_logits(repetition, flagged):
    record = ForwardRecord(best_of(0.7, 0.9), torch.tensor([9.0, 9.0]))
    found = entered(record, unseen=math.inf, penalties=Penalties(1.5, 0.5, repetition, 0))
    assert found == [Reason.BELOW] * flagged + [Reason.ABOVE] * (2 - flagged)


def test_a_row_is_flagged_by_either_margin():
    record = ForwardRecord(best_of(9.0, 9.0), torch.tensor([0.1, 0.3]))
    assert entered(record, unseen=math.inf) == [Reason.ROUTER, Reason.ABOVE]
    assert entered(record, unseen=math.inf, observe=True) == [True, False]
    record = ForwardRecord(best_of(0.1, 9.0), torch.tensor([9.0, math.nan]))
    assert entered(record, unseen=math.inf) == [Reason.BELOW, Reason.NOT_FINITE]


def test_a_forward_without_routers_rests_on_what_the_model_has():
    record = ForwardRecord(best_of(9.0, 0.1))
    assert entered(record, unseen=math.inf) == [Reason.ABOVE, Reason.BELOW]
    assert entered(record, unseen=math.nan) == [Reason.NOT_FINITE, Reason.BELOW]
    assert entered(None, unseen=math.inf) == [Reason.ABOVE] * 2


def test_of_a_canonical_row_the_router_decides_nothing():
    steps = SimpleNamespace(is_canonical=lambda rows, graph: True)
    for router in (torch.tensor([0.0, math.nan]), None):
        record = ForwardRecord(best_of(9.0, 9.0), router)
        assert entered(record, unseen=math.nan, decode=steps) == [Reason.CANONICAL] * 2


class OnAGpu(torch.Tensor):
    """A tensor that says that it is on a GPU, and notes that a copy was begun."""

    is_cuda = True
    began: list[Any] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.began.append((args, kwargs))
        return self.as_subclass(torch.Tensor)


def test_they_go_to_the_cpu_with_the_margins_and_nothing_waits():
    router = torch.ones(2).as_subclass(OnAGpu)
    record = ForwardRecord(best_of(1.0, 1.0), router)
    record.to_cpu()
    assert router.began == [(("cpu",), {"non_blocking": True})]
    assert any(each is router for each in record.copied), "kept while it is copied"
    assert type(record.router) is torch.Tensor
