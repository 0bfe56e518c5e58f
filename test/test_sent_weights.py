"""Weights that come as tensors: what SGLang cannot read or load is answered, on all ranks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import io_struct, tp_worker
from sglang.srt.managers.scheduler_components import weight_updater
from sglang.srt.model_executor.model_runner_components import weight_exporter
from sglang.srt.model_executor.model_runner_components import weight_updater as of_runner
from sglang.srt.utils import MultiprocessingSerializer

from margingate.runtime.schedule import sent_weights

SENT = "The weights were not updated, because the tensors cannot be read (UnpicklingError: "
PARTLY = "The weights may be replaced in part, because SGLang raised "
AGAIN = ": send all of them again."


class Model(torch.nn.Linear):
    def load_weights(self, named: Any) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in named:
            if parameters[name].shape != tensor.shape:
                raise AssertionError("another shape\nand more")
            parameters[name].data.copy_(tensor)


def update(
    monkeypatch, model: Model, *payloads: Any, others: Any = (), **more: Any
) -> tuple[Any, int]:
    """By SGLang's own functions, with the hooks around two of them; and how often ranks met.

    Args:
        others: what other ranks have found, each as the hook says it of its own.
    """
    met: list[Any] = []
    monkeypatch.setattr(sent_weights.ranks, "of_all", lambda found: [found, *others])
    monkeypatch.setattr("torch.distributed.barrier", lambda **_of: met.append(1))
    for module in (tp_worker, of_runner):
        monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
        # In a process that has run it torch pickles no tensor of a CPU any more.
        monkeypatch.setattr(module, "monkey_patch_torch_reductions", lambda: None)
    updater: Any = SimpleNamespace(
        get_model=lambda: model,
        _assert_weight_cache_inactive=lambda _op: None,
        device="cpu",
        custom_weight_loaders={},
    )
    original = of_runner.WeightUpdater.update_weights_from_tensor
    load = partial(sent_weights.load, original, updater)
    read = partial(sent_weights.deserialize, tp_worker.TpModelWorker.deserialize_own_rank, None)
    runner = SimpleNamespace(weight_updater=SimpleNamespace(update_weights_from_tensor=load))
    manager: Any = SimpleNamespace(
        _session=weight_updater._WeightUpdateSession(selector="all"),
        _observe_weight_load=lambda _source: nullcontext(),
        tp_worker=SimpleNamespace(deserialize_own_rank=read),
        _select_runners=lambda _selector: [("target", runner)],
        record_weight_version_after_update=lambda _version: None,
        flush_cache_after_weight_update=lambda _received, *said: said,
        tp_cpu_group=None,
    )
    received = io_struct.UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=list(payloads), **more
    )
    answer = weight_updater.SchedulerWeightUpdaterManager.update_weights_from_tensor(
        manager, received
    )
    return answer, len(met)


def payload(**tensors: torch.Tensor) -> bytes:
    sent: bytes = MultiprocessingSerializer.serialize(list(tensors.items()))
    return sent


def test_tensors_that_sglang_loads_are_loaded(monkeypatch):
    model, new = Model(2, 3, bias=False), torch.ones(3, 2)
    answer, met = update(monkeypatch, model, payload(weight=new))
    assert answer.success and met == 1 and torch.equal(model.weight, new)


def test_what_one_rank_of_several_cannot_load_is_not_done(monkeypatch):
    """Rank 0 alone answers: with two ranks and tensors for one it said that they are in."""
    model, said = Model(2, 3, bias=False), "The weights were not updated, because of a reason."
    for others, done in (([(True, "Success")], True), ([(False, said)], False)):
        answer, _ = update(monkeypatch, model, payload(weight=torch.ones(3, 2)), others=others)
        assert answer.success is done
    assert answer.message == f"Not all ranks have the new weights. On rank 1: {said}"
    answer, _ = update(monkeypatch, model, b"nothing", others=[(False, said)])
    assert answer.message.startswith(SENT), "all ranks say the like"


def test_what_is_no_tensor_changes_nothing(monkeypatch):
    answer, met = update(monkeypatch, Model(2, 3), b"nothing that was pickled")
    assert not answer.success and met == 1
    assert answer.message.startswith(SENT)
    assert answer.message.endswith("): send them as sglang.Engine does.")


@pytest.mark.parametrize(
    ("shape", "load_format", "raised"),
    [
        ((2, 2), None, "AssertionError: another shape"),
        ((3, 2), "nonsense", "NotImplementedError: Unknown load_format=nonsense"),
    ],
)
def test_what_cannot_be_loaded_is_answered(monkeypatch, shape, load_format, raised):
    """SGLang's scheduler ended, and so did the requests of all."""
    model = Model(2, 3, bias=False)
    sent = payload(weight=torch.zeros(shape))
    answer, met = update(monkeypatch, model, sent, load_format=load_format)
    assert (answer.success, answer.message, met) == (False, PARTLY + raised + AGAIN, 1)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("send_weights_to_remote_instance", ("host", "1", "group"), "KeyError: 'group_1_0'"),
        (
            "send_weights_to_remote_instance",
            ("host", "1,2", "group"),
            "AssertionError: Expected 1 ports, but got 2 ports.",
        ),
        (
            "init_weights_send_group_for_remote_instance",
            ("host", "1", 0, 2, ""),
            "AssertionError: Group name cannot be empty",
        ),
    ],
)
def test_groups_that_are_not_there_are_answered(monkeypatch, name, asked, said):
    """SGLang's scheduler ended."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    exporter: Any = SimpleNamespace(
        _weight_export_unsupported_reason=lambda: None, tp_size=1, tp_rank=0, _weights_send_group={}
    )
    original = getattr(weight_exporter.WeightExporter, name)
    done, sentence = sent_weights.meet(original, exporter, *asked)
    assert not done and sentence.startswith(f"Nothing was done, because SGLang raised {said}")
