"""Updates of weights: those that SGLang would fail at change nothing, and others are noticed."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import io_struct, mm_schedule
from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput
from sglang.srt.managers.scheduler_components import weight_updater
from weights_world import Gate, runner, scheduler

from margingate.runtime.compat.compute import schemes
from margingate.runtime.hooks import handlers
from margingate.runtime.observe.fingerprint import STALE, UPDATING
from margingate.runtime.schedule import weight_refusals
from margingate.runtime.schedule.radix import GateRadixCache

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
    refused = weight_refusals.refusal(shares, getattr(io_struct, kind + "Input")(**more))
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
        assert weight_refusals.refusal(of, received) is None


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
        assert weight_refusals.refusal(of, received) is None


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
def test_whatever_replaces_weights_is_noticed(monkeypatch, received, generations, success):
    """Failures too: half of them may be in. Then no column of old ones is found, and no image."""
    forgotten: list[Any] = []
    embeddings = SimpleNamespace(clear=lambda: forgotten.append("embeddings"))
    monkeypatch.setattr(mm_schedule, "embedding_cache", embeddings)
    monkeypatch.setattr(GateRadixCache, "part", lambda _tree, version: forgotten.append(version))

    def update(_manager, _received):
        if success is None:
            raise RuntimeError("half of them are in")
        return SimpleNamespace(success=success)

    gate: Any = Gate(scheduler())
    gate.scheduler.tree_cache = GateRadixCache.__new__(GateRadixCache)
    before = gate.fingerprint.of()
    with pytest.raises(RuntimeError) if success is None else nullcontext():
        found = gate.weights.around(update, None, SimpleNamespace(**received))
        assert found.success is success
    assert gate.fingerprint.generation == gate.fingerprint.admit() == generations
    assert (gate.fingerprint.of() != before) is bool(generations)
    assert gate.settled == [0] * generations, "by the weights that emitted it"
    assert forgotten == (["embeddings", generations] if generations else [])


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
