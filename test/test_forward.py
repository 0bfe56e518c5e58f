"""A forward that SGLang's scheduler did not ask for: batch, context, captured sizes, fence."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.model_executor import forward_context as sglang_context
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture
from sglang.srt.runtime_context import get_context, get_model

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.compute import forward
from margingate.runtime.probe import startup
from margingate.runtime.probe.checks import check_decode
from margingate.runtime.verify import internal_prefill, verifier
from margingate.runtime.verify.verifier import RowInput, Verifier

TABLE = torch.arange(24, dtype=torch.int32).view(3, 8) + 50


class Model:
    """Notes what is in effect while it is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Any) -> Any:
        self.calls.append((sglang_context.get_forward_context(), batch))
        return SimpleNamespace(next_token_logits=torch.zeros(len(tokens), 5))


class Graphs:
    """A graph runner that publishes the end of its reads, as SGLang's does."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.capture_bs = runner, [4]

    def can_run_graph(self, batch: Any) -> bool:
        return True

    def execute(self, batch: Any) -> Any:
        self.runner.shared_read_done_event = "event of this forward"
        return SimpleNamespace(next_token_logits=torch.zeros(batch.batch_size, 5))


@pytest.fixture
def runner() -> SimpleNamespace:
    translator = KVIndexTranslator(
        req_to_token=TABLE,
        token_to_kv_pool_allocator=None,
        token_to_kv_pool=None,
        page_size=1,
        device="cpu",
    )
    backend = SimpleNamespace(init_forward_metadata=lambda batch: None)
    return SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=TABLE, size=64),
        attn_backend=backend,
        device="cpu",
        kv_index_translator=translator,
        model=Model(),
        model_config=SimpleNamespace(model_is_mrope=False),
        shared_read_done_event=None,
    )


ROWS = [RowInput(1, 2, 11), RowInput(2, 3, 12)]


def test_a_batch_is_planned_as_sglangs_own(runner):
    batch = Verifier(runner, 4).batch(ROWS, 4)
    assert batch.out_cache_loc.tolist() == [60, 69, 50, 50] and batch.out_cache_loc_is_physical
    assert batch.global_num_token_non_padded_cpu == 4
    plan, translator = batch.kv_loc_plan, runner.kv_index_translator
    assert plan.write_ids(translator) is batch.out_cache_loc
    assert plan.seq_lens is batch.seq_lens and plan.req_pool_indices is batch.req_pool_indices


def test_a_forward_without_a_graph_knows_its_backend(runner):
    other = SimpleNamespace(init_forward_metadata=lambda batch: None)
    Verifier(runner, 4, backend=other).forward(ROWS, 4)
    ((found, batch),) = runner.model.calls
    assert found.attn_backend is other, "the verifier's, not the runner's"
    assert (batch.batch_size, sglang_context.has_forward_context()) == (4, False)


@pytest.mark.skipif(
    "moe_num_token_non_padded" not in vars(sglang_context.ForwardContext),
    reason="in this SGLang a context has nothing of the batch",
)
def test_a_forward_without_a_graph_knows_its_batch(runner):
    Verifier(runner, 4).forward(ROWS, 4)
    ((found, batch),) = runner.model.calls
    assert found.moe_num_token_non_padded.__self__ is batch


def test_the_models_layout_of_experts_is_in_effect(runner):
    runner.model.shared_experts_config = "this model's"
    found = []
    runner.model.forward = lambda *given: found.append(get_model().shared_experts) or given[2]
    with get_context().override_server_args():
        if "shared_experts" not in get_context().config_bag("model"):
            pytest.skip("in this SGLang a model has no layout of its own")
        before = get_model().shared_experts
        batch = Verifier(runner, 4).batch(ROWS, 4)
        with forward.context(runner, runner.attn_backend, batch):
            runner.model.forward(1, 2, 3)
        assert found == ["this model's"] and get_model().shared_experts == before


@pytest.mark.parametrize("shares", [False, True])
def test_a_pass_leaves_no_fence_but_a_step_does(runner, shares):
    """The scheduler writes behind the reads of the last forward that published their end."""
    verifier = Verifier(runner, 4, graphs=Graphs(runner))
    runner.shared_read_done_event = "event of a prefill"
    verifier.forward(ROWS, 4, beside=verifier.batch(ROWS[:1], 1) if shares else None)
    assert runner.shared_read_done_event == ("event of this forward" if shares else None)


def test_a_prefill_that_nobody_asked_for_leaves_none(runner, monkeypatch):
    class Batch:
        init_new = staticmethod(lambda *_args: Batch())
        prepare_for_extend = staticmethod(lambda: None)

    def prefill(_batch, *, is_verify):
        assert is_verify, "the sampler is left out"
        runner.shared_read_done_event = "event of this prefill"
        return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits="logits"))

    monkeypatch.setattr(internal_prefill, "ScheduleBatch", Batch)
    monkeypatch.setattr(internal_prefill, "resolve_forward_inputs", lambda *_args: None)
    names = ("req_to_token_pool", "token_to_kv_pool_allocator", "tree_cache", "model_config")
    scheduler = SimpleNamespace(**dict.fromkeys((*names, "enable_overlap", "spec_algorithm")))
    scheduler.future_map = None
    scheduler.tp_worker = SimpleNamespace(model_runner=runner, forward_batch_generation=prefill)
    assert internal_prefill.extend(scheduler, []) == "logits"
    assert runner.shared_read_done_event is None


def test_the_fence_is_the_one_that_sglang_waits_for():
    """By the names in SGLang's own code: a stray attribute would fence nothing."""
    import inspect

    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

    assert "runner.shared_read_done_event = None" in inspect.getsource(forward.fence)
    for function in (Scheduler._apply_war_barrier, ModelRunner.__init__):
        assert ".shared_read_done_event" in inspect.getsource(function)


def test_graphs_made_meanwhile_have_these_sizes(runner):
    config = CudaGraphConfig()
    config.decode.bs, config.decode.max_bs = [1, 2, 4, 8], 8
    with get_context().override_server_args(cuda_graph_config=config) as server_args:
        runner.server_args = server_args
        with forward.captures([7]):
            assert get_batch_sizes_to_capture(runner) == ([7], [])
            assert settings.in_effect("cuda_graph_config").decode.max_bs == 7
        with pytest.raises(ZeroDivisionError), forward.captures([3]):
            raise ZeroDivisionError
        assert get_batch_sizes_to_capture(runner) == ([1, 2, 4, 8], [])
    assert config.decode.bs == [1, 2, 4, 8]


def test_a_pass_has_no_more_rows_than_the_server_runs_requests(runner):
    runner.device, runner.decode_cuda_graph_runner = "cuda", None
    config = GateConfig(rows=65)
    with pytest.raises(GateError, match=r"--gate-rows is 65, but the server runs 64 requests at"):
        verifier.build(runner, config)
    assert verifier.build(runner, replace(config, rows=64)).most_rows == 64


@pytest.mark.parametrize("unpadded", [True, False])
@pytest.mark.parametrize(("rows", "captured"), [(6, False), (8, True)])
def test_a_pass_has_a_graph_where_there_are_any(runner, unpadded, rows, captured):
    """Without one, attention may cut a long row in another way than in a decode step."""
    graphs = SimpleNamespace(capture_bs=[1, 2, 4, 8], disable_padding=unpadded)
    runner.device, runner.decode_cuda_graph_runner = "cuda", graphs
    refused = unpadded and not captured
    said = "--gate-rows is 6, but no decode graph has as many rows, and with --disable-cuda-graph-"
    with pytest.raises(GateError, match=said) if refused else nullcontext():
        assert verifier.build(runner, GateConfig(rows=rows)).has_graphs


def test_torch_native_attention_has_places_for_any_number_of_rows(runner, monkeypatch):
    monkeypatch.setattr(verifier, "attends_row_by_row", lambda backend: True)
    assert Verifier(runner, 128).most_rows == math.inf


@pytest.mark.parametrize("graphs", [[], [1, 2, 4]])
@pytest.mark.parametrize(("requests", "slots"), [(6, 900), (900, 6)])
def test_the_steps_that_a_start_decodes_have_room(runner, graphs, requests, slots, monkeypatch):
    """SGLang's backends for GPUs have lists of as many places as the server runs requests."""
    counts = []

    class Measured(Verifier):
        def graph_sizes(self, largest):
            return graphs

        def forward(self, rows, count, **_):
            counts.append(count)
            return torch.zeros(count, 5)

    runner.req_to_token_pool.size = requests
    monkeypatch.setattr(check_decode, "scratch_rows", lambda *_: nullcontext())
    monkeypatch.setattr(check_decode, "agreed", lambda scheduler, found: found)
    monkeypatch.setattr(check_decode.drawing, "shared", lambda _: random.Random(3))
    monkeypatch.setattr(check_decode.invariant_attention, "of", lambda backend: backend)
    monkeypatch.setattr(check_decode.execute, "borders", lambda: [2, 5, 64])
    scheduler = SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=99),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: slots),
    )
    steps = check_decode.measure(Measured(runner, 4), scheduler, 256)
    assert max(counts) <= 6 and steps.is_canonical(4, by_graph=True)
    drawn = steps.record()["eager"]
    assert bool(drawn) == bool(graphs) and all(1 <= count <= 6 for count, _ in drawn)


def test_a_server_of_two_requests_cannot_be_measured(runner):
    runner.device, runner.req_to_token_pool.size = "cuda", 2
    with pytest.raises(GateError, match=r"run 2 requests at once, but the step .* give 3 or more"):
        startup.observe(runner)
