"""SGLang's own functions whose meaning a release changed, run with the gate's around them."""

from __future__ import annotations

import inspect
from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.quantization import unquant
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import _GenerationStreamAccumulator
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from margingate.config import GateConfig, GateError
from margingate.runtime.probe.operators.observed_calls import ROWS, observing, refuse_bypassed
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest
from margingate.runtime.sampling import seeds
from margingate.runtime.sampling.sampler import Sampling
from margingate.runtime.schedule.stream import SettledStream
from margingate_kernels import Rules, attention_reference

# -- linear layers: two ways around the method that the gate hooks

HIDDEN = 8


@pytest.fixture
def model() -> torch.nn.Module:
    made = torch.nn.Module()
    made.o_proj = torch.nn.Module()
    weight = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN), requires_grad=False)
    made.o_proj.weight, made.o_proj.quant_method = weight, UnquantizedLinearMethod()
    return made


def into(method: Any, layer: Any, x: torch.Tensor) -> None:
    method.apply_into(layer, x, torch.empty(len(x), HIDDEN))


def with_addend(method: Any, layer: Any, x: torch.Tensor) -> None:
    method.apply_with_addend(layer, x, torch.zeros(len(x), HIDDEN))


def seen_by(model: torch.nn.Module, call: Any) -> dict[int, Any]:
    with torch.inference_mode(), observing(model, ROWS) as seen:
        call(model.o_proj.quant_method, model.o_proj, torch.randn(ROWS, HIDDEN))
    return seen


@pytest.mark.parametrize("call", [into, with_addend])
def test_a_layer_that_is_run_around_its_method_ends_the_start(monkeypatch, model, call):
    """No plan would hold for it: SGLang adds in the product, or writes where it is told to."""
    monkeypatch.setattr(unquant, "_can_accumulate_into_addend", lambda **_: True)
    monkeypatch.setattr(
        unquant,
        "_bf16_gemm_dispatch_impl",
        lambda x, weight, _bias, addend: addend.addmm_(x, weight.T),
    )
    with pytest.raises(GateError, match=r"cannot measure o_proj, a Module: a decode step does not"):
        refuse_bypassed([("o_proj", model.o_proj)], seen_by(model, call))


def test_a_sum_that_is_made_behind_the_method_is_seen(model):
    """As on a CPU: the layer's own method runs, and its plan holds."""
    refuse_bypassed([("o_proj", model.o_proj)], seen_by(model, with_addend))


# -- streaming: with an interval, SGLang sends the first token at once, then what is enough


def accumulator(interval: int) -> Any:
    return _GenerationStreamAccumulator(
        return_logprob=True,
        return_hidden_states=False,
        return_routed_experts=False,
        return_indexer_topk=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        disaggregation_mode=cast(Any, None),
        default_stream_interval=interval,
        default_force_stream_interval=10_000,
        get_cached_tokens_details=lambda _req: None,
        is_request_level_customized_info_key=lambda _key: False,
        current_weight_version="1",
    )


class Stream:
    """One request that streams, its ledger, and SGLang's own accumulator behind the gate's."""

    def __init__(self, interval: int, own_interval: int | None = None) -> None:
        params = SamplingParams(max_new_tokens=64, temperature=0.0)
        params.stream_interval = own_interval
        prompt = array("q", [1, 2, 3])
        self.req: Any = Req(
            "a", "", prompt, params, return_logprob=True, stream=True, vocab_size=500
        )
        self.req.gate = GateRequest("a", True)
        self.requests = OpenRequests(GateConfig(rows=8))
        self.requests.open(self.req)
        fingerprint = cast(Any, SimpleNamespace(of=lambda _generation: {}))
        nothing = cast(Any, None)
        self.stream = SettledStream(GateConfig(rows=8), self.requests, nothing, fingerprint)
        self.interval = interval
        self.sent: list[list[int]] = []

    def emit(self, *, settled: bool) -> None:
        self.requests.ledger.emit("a", flagged=not settled, canonical=settled)
        self.req.output_ids.append(10 + len(self.req.output_ids))
        lists = self.req.logprob
        lists.output_token_logprobs_val.append(-1.0)
        lists.output_token_logprobs_idx.append(self.req.output_ids[-1])
        for name in ("top", "token_ids"):
            getattr(lists, f"output_{name}_logprobs_val").append([])
            getattr(lists, f"output_{name}_logprobs_idx").append([])

    @property
    def settled(self) -> int:
        return self.requests.ledger.settled_length("a")

    def step(self) -> None:
        """SGLang's streamer asks after a step; what it would send is noted."""
        made = accumulator(self.interval)

        def original(_streamer: Any, reqs: list[Any], *_: Any) -> None:
            for req in reqs:
                made.accept(req=req)

        self.stream.send(original, None, [self.req], True, None)
        for ids, values in zip(made.output_ids, made.output_token_logprobs_val, strict=True):
            assert len(ids) == len(values), "each token with its log-prob"
            self.sent.append(list(ids))


@settings(max_examples=60, derandomize=True)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([None, 1, 3]),
)
def test_a_stream_has_what_is_settled_once_and_in_order(steps, interval, own):
    """Bursts pass multiples of the interval; nothing that may be taken back leaves."""
    stream = Stream(interval, own)
    wanted = own or interval
    for tokens in steps:
        for settled in tokens:
            stream.emit(settled=settled)
        before = sum(map(len, stream.sent))
        stream.step()
        after = sum(map(len, stream.sent))
        unsent = stream.settled - before
        goes = unsent > 0 and (before == 0 or unsent >= wanted)
        assert after == (stream.settled if goes else before)
    everything = [token for ids in stream.sent for token in ids]
    assert everything == list(stream.req.output_ids)[: len(everything)]
    assert stream.req.sampling_params.stream_interval == own


def test_sglangs_streamer_sees_nothing_of_a_retracted_request():
    """Prefilled again, it has one token, which only stands in for those that it had."""
    stream = Stream(1)
    for _ in range(2):
        stream.emit(settled=True)
    stream.step()
    stream.emit(settled=True)
    had = stream.req.output_ids
    stream.req.gate.kept = SimpleNamespace(tokens=list(had))
    for output in ([], [99]):
        stream.req.output_ids, stream.req.is_retracted = array("q", output), not output
        stream.step()
        assert stream.sent == [[10, 11]] and stream.req.send_token_offset == 2
    stream.req.output_ids, stream.req.gate.kept = had, None
    stream.step()
    assert stream.sent == [[10, 11], [12]]


# -- sampling: draws that are not the gate's are SGLang's own, and no others

VOCABULARY = 300


def sampler_of() -> Any:
    """SGLang's sampler, without the groups of ranks that it asks for."""
    made: Any = Sampler.__new__(Sampler)
    torch.nn.Module.__init__(made)
    made.rl_on_policy_target, made.enable_deterministic = None, False
    made.use_log_softmax_logprob = made.use_ascend_backend = False
    made.tp_sync_group = made.cp_sync_group = None
    return made


def batch_of(rows: list[tuple[float, int]]) -> Any:
    """Rows of a temperature and a seed each; temperature 0 is greedy."""
    greedy = [temperature == 0 for temperature, _ in rows]
    info = SamplingBatchInfo(
        temperatures=torch.tensor([[temperature or 1.0] for temperature, _ in rows]),
        top_ps=torch.ones(len(rows)),
        top_ks=torch.tensor([1 if each else 1 << 30 for each in greedy], dtype=torch.int32),
        min_ps=torch.zeros(len(rows)),
        is_all_greedy=all(greedy),
        is_any_greedy=any(greedy),
        need_top_p_sampling=False,
        need_top_k_sampling=any(greedy),
        need_min_p_sampling=False,
        vocab_size=VOCABULARY,
        device="cpu",
    )
    if any(seed != seeds.NO_SEED for _, seed in rows):
        info.sampling_seed = torch.tensor([seed for _, seed in rows])
    return SimpleNamespace(
        sampling_info=info,
        forward_mode=SimpleNamespace(is_decode=lambda: True),
        positions=torch.arange(7, 7 + len(rows)),
        return_logprob=False,
    )


def sampled(rows: list[tuple[float, int]], logits: torch.Tensor, *, gated: bool) -> list[int]:
    """The tokens of a step, with torch's generator in the same state each time."""
    sampler, batch = sampler_of(), batch_of(rows)
    output = SimpleNamespace(next_token_logits=logits.clone())
    gate = Sampling(cast(Any, SimpleNamespace(apply=lambda *_: None)), observes=False)
    theirs = Sampler._preprocess_logits

    def preprocess(made: Any, info: Any) -> torch.Tensor:
        found = theirs(sampler, made, info)
        ours = gate.after_preprocess(found)
        return found if ours is None else ours

    def original(_runner: Any, made: Any, batch: Any) -> torch.Tensor:
        with get_context().override_server_args(sampling_backend="pytorch"):
            found: torch.Tensor = sampler(made, batch.sampling_info, False, [], [], batch.positions)
        return found

    torch.manual_seed(4)
    if not gated:
        batch.sampling_info.sampling_seed = None
        return original(None, output, batch).tolist()
    sampler._preprocess_logits = preprocess
    return gate.sample(original, None, output, batch).tolist()


NONE = seeds.NO_SEED
LOGITS = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2


def test_draws_without_a_seed_are_those_of_sglang_alone():
    rows = [(1.0, NONE), (0.7, NONE), (1.3, NONE), (0.9, NONE)]
    mixed = [(1.0, NONE), (0.0, NONE), (1.3, NONE), (0.9, 12)]
    alone = sampled(rows, LOGITS, gated=False)
    assert sampled(rows, LOGITS, gated=True) == alone
    found = sampled(mixed, LOGITS, gated=True)
    assert found[1] == int(LOGITS[1].argmax())
    plain = [(1.0, NONE), (0.0, NONE), (1.3, NONE), (0.9, NONE)]
    without = sampled(plain, LOGITS, gated=False)
    assert (found[0], found[2]) == (without[0], without[2])


def test_a_seeded_draw_does_not_depend_on_what_is_drawn_beside_it():
    mine = (0.9, 12)
    beside = [[(1.0, NONE)] * 3, [(0.0, NONE)] * 3, [(0.5, 3), (1.0, NONE), (0.0, NONE)], []]
    found = []
    for others in beside:
        rows = [mine, *others]
        found.append(sampled(rows, LOGITS[: len(rows)], gated=True)[0])
    assert len(set(found)) == 1
    other_seeds = {sampled([(0.9, n)], LOGITS[:1], gated=True)[0] for n in range(20)}
    assert len(other_seeds) > 5, "it is a draw"


def test_a_start_warms_no_sampling_up_before_the_gate_is_there():
    """ModelRunner.sample would be asked for rows that no request has."""

    def sample(*_: Any) -> None:
        pytest.fail("it draws tokens now: look at what the gate's hooks make of that")

    runner = SimpleNamespace(sample=sample, sampler=sample, forward=sample)
    assert ModelRunner.prewarm_sampling(cast(Any, runner)) is runner.sampling_prewarm_result


def test_routers_of_gpt_oss_have_the_switch_that_is_set():
    from sglang.srt.models.gpt_oss import TinyGemmLinear

    assert "self._use_tinygemm" in inspect.getsource(TinyGemmLinear.forward)


# -- windows on a CPU


@pytest.mark.parametrize("window", [None, 1, 15, 16, 200])
def test_torch_native_decode_and_prefill_see_the_same_keys_of_a_window(window: int | None) -> None:
    """SGLang's Triton decode leaves one out; a verifier on a CPU must not."""
    length, prefix = 70, 40
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(length, 2, 16, generator=generator) for _ in range(3))
    backend = cast(Any, object.__new__(TorchNativeAttnBackend))
    table = torch.arange(length).repeat(length, 1)
    common = {"scaling": 0.25, "sliding_window_size": window}
    want = attention_reference(q, k, v, 0.25, Rules(window))
    decoded = backend._run_sdpa_forward_decode(
        *(q, torch.empty_like(q), k, v, table, torch.arange(length)),
        torch.arange(1, length + 1),
        **common,
    )
    assert torch.allclose(decoded.double(), want, atol=1e-5)
    extended = backend._run_sdpa_forward_extend(
        *(q[prefix:], torch.empty_like(q[prefix:]), k, v, table, torch.tensor([0])),
        *(torch.tensor([length]), torch.tensor([prefix]), torch.tensor([length - prefix])),
        causal=True,
        **common,
    )
    assert torch.allclose(extended.double(), want[prefix:], atol=1e-5)
