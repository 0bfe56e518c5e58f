"""Weights are not replaced under requests that wait, and a session of updates is one change."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import weight_updater
from sglang.srt.utils.weight_versions import compute_weight_version_spans

from margingate.config import GateConfig
from margingate.runtime.compat.compute import schemes
from margingate.runtime.compat.kv import columns
from margingate.runtime.compat.model import weights
from margingate.runtime.hooks import handlers
from margingate.runtime.observe import weight_updates
from margingate.runtime.observe.fingerprint import CROSSED, STALE, UPDATING, Fingerprint
from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest
from margingate.runtime.schedule import next_batch
from margingate.runtime.schedule.weight_changes import WeightChanges


def runner(model: Any = None, **quantization: Any) -> Any:
    """SGLang's ModelRunner, as far as an update looks at it; by default of nothing quantized."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
    text = SimpleNamespace(**sizes, original_num_attention_heads=6, head_dim=None)
    config = SimpleNamespace(quantization_config=quantization or None)
    of = model or torch.nn.Module()
    model_config = SimpleNamespace(hf_config=config, hf_text_config=text)
    return SimpleNamespace(model=of, model_config=model_config)


def scheduler(*, waiting: int = 0, running: int = 0, paused: bool = False) -> Any:
    """As much of one as SGLang's own flush looks at; with requests that wait or run."""
    made: Any = SimpleNamespace(
        weight_updater=SimpleNamespace(_session=None),
        running_batch=SimpleNamespace(is_empty=lambda: not running, reqs=[]),
        last_batch=None,
        chunked_req=None,
        enable_overlap=False,
        enable_hisparse=False,
        enable_hierarchical_cache=False,
        enable_lmcache=False,
        waiting_queue=[SimpleNamespace(kv=ReqKvInfo())] * waiting,
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        dllm_manager=SimpleNamespace(any_staging_reqs=lambda: False),
        disaggregation_mode=DisaggregationMode.NULL,
        _pp_microbatches_drained=lambda: True,
        _engine_paused=paused,
        tp_worker=SimpleNamespace(model_runner=runner()),
        server_args=SimpleNamespace(weight_cache_mode="off"),
    )
    made.is_fully_idle = lambda **named: Scheduler.is_fully_idle(made, **named)
    return made


KINDS = [
    ("UpdateWeightFromDiskReq", {"model_path": "here"}),
    ("UpdateWeightsFromDistributedReq", {"names": [], "dtypes": [], "shapes": []}),
    ("UpdateWeightsFromTensorReq", {"serialized_named_tensors": []}),
    ("UpdateWeightsFromIPCReq", {"zmq_handles": {}}),
]


@pytest.mark.parametrize(("kind", "more"), [*KINDS, ("BeginWeightUpdateReq", {})])
def test_weights_that_other_servers_share_are_not_replaced(kind, more):
    """SGLang raises, and its scheduler ends."""
    shares = scheduler()
    shares.server_args.weight_cache_mode = "client"
    refused = weight_updates.refusal(shares, getattr(io_struct, kind + "Input")(**more))
    assert not refused.success and refused.message == (
        "The weights were not updated, because --weight-cache-mode is client, so that other "
        "servers have the same weights: start a server of the new ones, or one without the option."
    )


@pytest.mark.parametrize(("kind", "more"), KINDS)
@pytest.mark.parametrize(
    ("state", "flush", "done"),
    [
        ({}, True, True),
        ({"running": 1}, True, False),
        ({"running": 1}, False, True),
        ({"running": 1, "paused": True}, True, False),
        ({"waiting": 1}, True, False),
        ({"waiting": 1, "paused": True}, True, True),
    ],
)
def test_an_update_whose_flush_sglang_would_refuse_changes_nothing(kind, more, state, flush, done):
    """It would replace the weights first. Requests that a pause retracted hold no columns."""
    called = []

    def update(*_args):
        called.append(1)
        return SimpleNamespace(success=True, message="")

    received = getattr(io_struct, f"{kind}Input")(flush_cache=flush, **more)
    answer = Gate(scheduler(**state)).weights.around(update, None, received)
    assert answer.success == done and bool(called) == done
    if not done:
        assert (
            isinstance(answer, getattr(io_struct, f"{kind}Output"))
            and "flush_cache" in answer.message
        )


@pytest.mark.parametrize("recapture", [True, False])
@pytest.mark.parametrize("graphs", [object(), None])
def test_an_update_that_would_replace_the_decode_graphs_changes_nothing(recapture, graphs):
    """Verify passes would go on with the old ones. Where there are none, SGLang makes none."""
    called = []

    def update(*_args):
        called.append(1)
        return SimpleNamespace(success=True, message="")

    of = scheduler()
    of.tp_worker.model_runner.decode_cuda_graph_runner = graphs
    received = io_struct.UpdateWeightFromDiskReqInput(
        model_path="here", recapture_cuda_graph=recapture
    )
    answer = Gate(of).weights.around(update, None, received)
    refused = recapture and graphs is not None
    assert answer.success is bool(called) is not refused
    assert ("leave recapture_cuda_graph out" in answer.message) is refused


def packed() -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.scheme = type("AWQMarlinLinearScheme", (), {})()
    return torch.nn.ModuleDict({"proj": layer})


@pytest.mark.parametrize(("kind", "more"), [*KINDS, ("BeginWeightUpdateReq", {})])
def test_an_update_of_weights_that_sglang_repacked_changes_nothing(kind, more):
    """A session too: its end would repack them once more, whatever was sent."""
    of = scheduler()
    of.tp_worker.model_runner = runner(packed())
    received = getattr(io_struct, f"{kind}Input")(**more)
    answer = Gate(of).weights.around(lambda *_: pytest.fail("it began"), None, received)
    assert isinstance(answer, getattr(io_struct, f"{kind}Output")) and not answer.success
    assert "SGLang keeps those of proj (AWQMarlinLinearScheme) in another form" in answer.message


@pytest.mark.parametrize(
    ("served", "given", "said"),
    [
        ({"quant_method": "fp8"}, {}, "quant_method of the weights in {} is None, and of those"),
        ({}, {"quant_method": "fp8"}, "quant_method of the weights in {} is fp8, and of those"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"quant_method": "fp8", "weight_block_size": [32, 32]},
            "weight_block_size of the weights in {} is [32, 32], and of those that are served [128",
        ),
        ({"quant_method": "fp8"}, {"quant_method": "fp8", "fmt": "e4m3"}, ""),
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]},
            {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "model.layers.0.mlp"]},
            "not quantized of the weights in {} is ['lm_head', 'model.layers.0.mlp'], and of",
        ),
        (
            {"quant_method": "fp8", "ignored_layers": ["b", "a"]},
            {"quant_method": "fp8", "modules_to_not_convert": ["a", "b"]},
            "",
        ),
        ({}, {}, ""),
    ],
)
def test_a_folder_that_is_quantized_in_another_way_changes_nothing(tmp_path, served, given, said):
    """SGLang would cast one type to the other, without a word and without scales."""
    config = {"quantization_config": given} if given else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    of = scheduler()
    of.tp_worker.model_runner = runner(**served)
    received = io_struct.UpdateWeightFromDiskReqInput(model_path=str(tmp_path))
    done = SimpleNamespace(success=True, message="")
    answer = Gate(of).weights.around(lambda *_: done, None, received)
    assert answer.success is not bool(said) and said.format(tmp_path) in answer.message


@pytest.mark.parametrize(
    "config", ["[]", "3", "{", '{"quantization_config": "fp8"}', '{"quantization_config": [1]}']
)
def test_a_folder_that_cannot_be_understood_is_left_to_sglang(tmp_path, config):
    """What raises here would end the scheduler."""
    (tmp_path / "config.json").write_text(config)
    of = scheduler()
    of.tp_worker.model_runner = runner(quant_method="fp8")
    for path in (str(tmp_path), "x" * 9000, "a\0b"):
        received = io_struct.UpdateWeightFromDiskReqInput(model_path=path)
        assert weight_updates.refusal(of, received) is None


def test_a_loader_that_quantizes_a_trainers_weights_is_left_to_sglang():
    model = packed()
    assert schemes.fixed(model) is not None
    model.flash_rl_initial_load_complete = True
    assert schemes.fixed(model) is None


def from_folder(tmp_path: Path, config: dict[str, Any], load_format: str | None = None) -> Any:
    """The answer to an update from a folder that says this of itself."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    received = io_struct.UpdateWeightFromDiskReqInput(
        model_path=str(tmp_path), load_format=load_format
    )
    done = SimpleNamespace(success=True, message="")
    return Gate(scheduler()).weights.around(lambda *_: done, None, received)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"hidden_size": 32},
            "hidden_size of the weights in {} is 32, and of those that are",
        ),
        ({"text_config": {"hidden_size": 32}}, "hidden_size of the weights in {} is 32"),
        (
            {"num_hidden_layers": 2},
            "num_hidden_layers of the weights in {} is 2, and of those",
        ),
        ({"num_attention_heads": 8}, "num_attention_heads of the weights in {} is 8"),
        ({"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 6}, ""),
        ({"head_dim": 16, "vocab_size": 9, "hidden_size": None, "text_config": None}, ""),
    ],
)
def test_a_folder_of_another_models_weights_changes_nothing(tmp_path, config, said):
    """SGLang ended over other shapes. Of fewer layers it left the others as they were."""
    answer = from_folder(tmp_path, config)
    assert answer.success is not bool(said) and said.format(tmp_path) in answer.message


@pytest.mark.parametrize(("name", "known"), [("x", False), ("AUTO", True), ("safetensors", True)])
def test_an_update_in_a_format_that_sglang_does_not_know_changes_nothing(tmp_path, name, known):
    """Its scheduler ended."""
    answer = from_folder(tmp_path, {}, name)
    assert answer.success == known and ("load_format is 'x', which" in answer.message) is not known


def test_a_folder_that_says_nothing_is_left_to_sglang(tmp_path):
    of = scheduler()
    of.tp_worker.model_runner = runner(quant_method="fp8")
    for path in (str(tmp_path), "someone/a-model-of-the-hub"):
        received = io_struct.UpdateWeightFromDiskReqInput(model_path=path)
        assert weight_updates.refusal(of, received) is None


class Gate:
    """As much of the controller as an update asks for; each digest is another."""

    def __init__(self, of: Any, tree: Any = None, guarantee: str = "sparse") -> None:
        config = GateConfig(rows=8, guarantee=guarantee)
        self.scheduler, self.requests = of, OpenRequests(config)
        of.tree_cache = tree
        self.in_flight = SimpleNamespace(batches=list)
        self.forwards, self.digests = 1, 0
        self.fingerprint = Fingerprint({"a": 1}, self._digest, lambda: self.forwards)
        self.settled: list[int] = []  # generations that were in memory then
        self.forwards += 1
        holders = ColumnHolders(of, self.requests, cast(Any, self.in_flight))
        self.weights = WeightChanges(
            of, self.requests, holders, self.fingerprint, self.verify_everything
        )

    def _digest(self) -> str:
        self.digests += 1
        return f"weights {self.digests}"

    def verify_everything(self) -> None:
        self.settled.append(self.fingerprint.generation)


@pytest.mark.parametrize("guarantee", ["exact", "sparse"])
def test_with_exact_all_that_was_emitted_is_verified_by_the_weights_that_emitted_it(guarantee):
    """Afterwards it stands, whatever the verifier would have said."""
    gate: Any = Gate(scheduler(), guarantee=guarantee)
    running, kept, ended = request([1, 2]), request([1]), request([1, 2])
    kept.gate.kept = SimpleNamespace(tokens=[1, 2])
    ended.finished = lambda: True
    for key, req in zip("abc", (running, kept, ended), strict=True):
        req.gate.key = key
        gate.requests.open(req)
        for canonical in (True, False):
            gate.requests.ledger.emit(key, flagged=False, canonical=canonical)
    seen: list[Any] = []
    gate.weights._settle = lambda: seen.append(
        [list(gate.requests.ledger.wanted(key)) for key in "abc"]
    )
    updated(gate)
    assert seen[-1] == [[2] if guarantee == "exact" else [], [], []]


@pytest.mark.parametrize(
    ("received", "generations"),
    [
        ({"flush_cache": True}, 1),
        ({"flush_cache": False}, 1),
        ({"tags": ["weights"]}, 1),
        ({"action": "reset_tensors"}, 1),
        ({"action": "checksum"}, 0),
    ],
)
@pytest.mark.parametrize("success", [True, False, None])
def test_whatever_replaces_weights_is_noticed(received, generations, success):
    """Failures too: half of them may be in."""

    def update(_manager, _received):
        if success is None:
            raise RuntimeError("half of them are in")
        return SimpleNamespace(success=success)

    gate: Any = Gate(scheduler())
    before = gate.fingerprint.of()
    with pytest.raises(RuntimeError) if success is None else nullcontext():
        found = gate.weights.around(update, None, SimpleNamespace(**received))
        assert found.success is success
    assert gate.fingerprint.generation == gate.fingerprint.admit() == generations
    assert (gate.fingerprint.of() != before) is bool(generations)
    assert gate.settled == [0] * generations, "by the weights that emitted it"


def request(output: list[int], *, holds: bool = True) -> Any:
    kv = ReqKvInfo(req_pool_idx=1) if holds else ReqKvInfo()
    record = GateRequest("a", True)
    record.begins(0, 0)
    found = SimpleNamespace(kv=kv, gate=record, output_ids=output, weight_version_events=[])
    found.finished = lambda: False
    assert columns.holds(found) is holds
    return found


def updated(gate: Any) -> None:
    done = SimpleNamespace(success=True)
    gate.weights.around(lambda *_: done, None, SimpleNamespace(flush_cache=False))


def admitted(gate: Any, req: Any) -> None:
    gate.weights.begun(SimpleNamespace(can_run_list=[req]), req)


def test_a_request_says_the_weights_that_computed_it():
    """A running one sees both; one that waits, the new ones; one that ends at once, the old."""
    gate: Any = Gate(scheduler(waiting=1))
    running, chunked, ended = request([1, 2]), request([]), request([1, 2, 3])
    gate.scheduler.running_batch = SimpleNamespace(reqs=[running, ended])
    gate.scheduler.chunked_req = chunked
    waits, retracted = request([], holds=False), request([], holds=False)
    retracted.gate.kept = SimpleNamespace(tokens=[1, 2, 3])
    updated(gate)
    admitted(gate, waits)
    admitted(gate, retracted)
    assert (running.gate.generations(3), chunked.gate.generations(1)) == ([0, 1], [0, 1])
    assert ended.gate.generations(3) == [0], "no token followed"
    assert waits.gate.generations(3) == [1]
    assert retracted.gate.generations(4) == [0, 1]
    assert [each.gate.mixed for each in (running, chunked, waits, retracted)] == [1, 1, 0, 0]
    assert [each.gate.stands for each in (running, chunked, waits, retracted)] == [2, 0, 0, 3]
    assert gate.fingerprint.of(waits.gate.generations(3)) == gate.fingerprint.of()
    assert gate.fingerprint.of(running.gate.generations(3))["fingerprint_because"] == CROSSED


def test_weights_that_cannot_be_read_leave_answers_without_a_fingerprint(monkeypatch):
    """And the request goes on, gated or not."""
    gate: Any = Gate(scheduler())
    updated(gate)
    monkeypatch.setattr(gate.fingerprint, "_weights_now", lambda: 1 / 0)
    req = request([], holds=False)
    admitted(gate, req)
    assert req.gate.generations(1) == [1]
    assert gate.fingerprint.of([1])["fingerprint_because"] == STALE


def test_weights_that_gave_nothing_that_is_left_are_not_named():
    gate: Any = GateRequest("a", True)
    gate.begins(0, 0)
    gate.crosses(1, 5)
    gate.forget_rows(5)  # retracted: what the second weights gave is gone
    gate.begins(2, 5)
    assert gate.generations(10) == [0, 2] and gate.stands == 5
    gate.crosses(3, 8)
    gate.crosses(4, 9)
    gate.forget_rows(3)
    gate.begins(4, 3)
    assert gate.generations(10) == [0, 4] and gate.stands == 3


def test_a_request_is_not_begun_where_it_was_not_admitted():
    gate: Any = Gate(scheduler())
    waits, other = request([], holds=False), request([], holds=False)
    updated(gate)
    for admitted_ones in ([], [other]):
        gate.weights.begun(SimpleNamespace(can_run_list=admitted_ones), waits)
    assert waits.gate.generations(1) == [0]


def test_retracted_for_memory_after_an_update_in_place_its_columns_are_new_and_its_tokens_stand():
    gate: Any = Gate(scheduler())
    req = request([1, 2])
    gate.scheduler.running_batch = SimpleNamespace(reqs=[req])
    updated(gate)
    req.output_ids += [3, 4]  # by new weights, on old columns
    req.kv = ReqKvInfo()
    admitted(gate, req)
    assert (req.gate.mixed, req.gate.stands, req.gate.generations(5)) == (False, 4, [0, 1])


def test_the_tokens_of_a_request_whose_prompt_is_prefilled_again_stand_too():
    """Its output is what that prefill chose; its tokens are given back and replayed later."""
    gate: Any = Gate(scheduler())
    req = request([7])
    req.gate.kept = SimpleNamespace(tokens=[1, 2, 3])
    gate.scheduler.running_batch = SimpleNamespace(reqs=[req])
    updated(gate)
    assert (req.gate.stands, req.gate.generations(3), req.gate.generations(4)) == (3, [0], [0, 1])


def test_sglang_s_versions_of_output_that_the_gate_keeps_apart(monkeypatch):
    """SGLang notes nothing where it sees no output: all would be of the new version."""
    monkeypatch.setattr(weights, "get_serving", lambda: SimpleNamespace(weight_version="one"))
    gate: Any = Gate(scheduler())
    kept, waits = request([], holds=False), request([], holds=False)
    kept.gate.kept, waits.gate.key = SimpleNamespace(tokens=[1, 2, 3]), "b"
    for req in (kept, waits):
        gate.requests.open(req)
    for label in (None, "one", "two"):
        gate.weights.relabelled(label)
    spans = compute_weight_version_spans(kept.weight_version_events, "two", 5)
    assert [(s.version, s.start, s.end) for s in spans] == [("one", 0, 3), ("two", 3, 5)]
    assert waits.weight_version_events == []


def test_a_pause_finds_those_that_flipped_at_their_end_in_the_running_batch(monkeypatch):
    """Else they would hold columns while SGLang retracts all others, and no flush could succeed."""
    gate: Any = Gate(scheduler())
    req = request([1, 2])
    gate.verify_everything = lambda: gate.requests.mark_rejoining(req)
    monkeypatch.setattr(handlers, "_controller", gate)
    monkeypatch.setattr(next_batch.rollback, "rejoin", lambda _, running, reqs: [running, *reqs])
    running = gate.scheduler.running_batch
    handlers.pause_generation(None, None)
    assert gate.scheduler.running_batch == [running, req] and not gate.requests.outside()


class Updater(Gate):
    """SGLang's own begin and end over no runners, with the gate's hooks around them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._session, self.tp_cpu_group = None, None
        monkeypatch.setattr(weight_updater.torch.distributed, "barrier", lambda group: None)
        made = scheduler()
        made.weight_updater = self
        super().__init__(made)
        monkeypatch.setattr(handlers, "_controller", self)

    def _select_runners(self, _selector: str) -> list[Any]:
        return []

    def begin(self) -> Any:
        sglangs = weight_updater.SchedulerWeightUpdaterManager.begin_weight_update
        return handlers.weights_change(sglangs, self, BeginWeightUpdateReqInput())

    def end(self) -> Any:
        sglangs = weight_updater.SchedulerWeightUpdaterManager.end_weight_update
        return handlers.weights_change(sglangs, self, SimpleNamespace())


def test_weights_that_change_without_a_word_between_begin_and_end_are_noticed(monkeypatch):
    """Other processes may write them. What waits is settled first, and nothing is promised then."""
    updater = Updater(monkeypatch)
    before, first = updater.fingerprint.of(), updater.fingerprint.generation
    assert before["fingerprint"] and updater.digests == 1
    assert updater.begin().success and updater.settled == [first]
    within = updater.fingerprint.admit()
    assert updater.digests == 1 and within != first
    assert updater.fingerprint.of([within])["fingerprint_because"] == UPDATING
    updater.forwards += 1
    assert updater.end().success
    assert updater.fingerprint.of()["fingerprint_because"] == STALE
    after = updater.fingerprint.admit()
    assert updater.digests == 2 and updater.fingerprint.of([after])["fingerprint"]
    assert updater.fingerprint.of() != before
    assert updater.fingerprint.of([within])["fingerprint"] is None, (
        "it was served across the change"
    )


def test_a_session_that_is_open_already_stays_open(monkeypatch):
    updater = Updater(monkeypatch)
    assert updater.begin().success and not updater.begin().success
    assert updater.fingerprint.of()["fingerprint_because"] == UPDATING
