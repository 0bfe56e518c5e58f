"""Memory that is released and resumed: what SGLang's scheduler would end over is refused."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import HTTPException
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers import io_struct
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.scheduler_components import weight_updater

from margingate.runtime.client import control
from margingate.runtime.hooks import handlers
from margingate.runtime.schedule import memory

Updater = weight_updater.SchedulerWeightUpdaterManager
UNFINISHED = "requests are not finished: let them finish, abort them, or retract them by a pause."


class World:
    """SGLang's own functions, on as much of a scheduler as they look at, and the hooks around."""

    def __init__(self, monkeypatch, *, busy: bool = False, paused: bool = False) -> None:
        self.paused, self.flushed = [], 0
        adapter = SimpleNamespace(pause=self.paused.append, resume=self.paused.remove)
        args = self.args = SimpleNamespace(weight_cache_mode="off")
        self.scheduler: Any = SimpleNamespace(
            _engine_paused=paused, disaggregation_mode=None, server_args=args
        )
        self.scheduler.is_fully_idle = lambda ignore_waiting: (
            not busy or (ignore_waiting and paused)
        )
        self.scheduler.weight_updater = self.updater = SimpleNamespace(
            scheduler=self.scheduler,
            is_fully_idle=self.scheduler.is_fully_idle,
            memory_saver_adapter=adapter,
            offload_tags=set(),
            flush_cache=lambda: None,
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=None)),
            tp_cpu_group=None,
            _assert_weight_cache_inactive=lambda _op: None,
        )
        self.verified = 0
        monkeypatch.setattr(handlers, "_controller", self)
        monkeypatch.setattr(weight_updater, "_export_static_state", lambda _model: {"buffers": []})
        monkeypatch.setattr(weight_updater, "_import_static_state", lambda *_of: None)
        monkeypatch.setattr("torch.distributed.barrier", lambda *_group, **_more: None)
        self.gpu = SimpleNamespace(synchronize=int, is_available=lambda: True)
        monkeypatch.setattr("torch.get_device_module", lambda: self.gpu)
        self.weights = SimpleNamespace(around=self._around)

    def verify_everything(self) -> None:
        self.verified += 1

    def _around(self, original: Any, manager: Any, received: Any) -> Any:
        return memory.refusal(self.scheduler, received) or original(manager, received)

    def release(self, *tags: str) -> str:
        received = io_struct.ReleaseMemoryOccupationReqInput(tags=list(tags) or None)
        done = handlers.release_memory(Updater.release_memory_occupation, self.updater, received)
        assert isinstance(done, io_struct.ReleaseMemoryOccupationReqOutput)
        return getattr(done, "message", "")

    def resume(self, *tags: str) -> str:
        received = io_struct.ResumeMemoryOccupationReqInput(tags=list(tags) or None)
        done = handlers.weights_change(Updater.resume_memory_occupation, self.updater, received)
        assert isinstance(done, io_struct.ResumeMemoryOccupationReqOutput)
        return getattr(done, "message", "")


def test_memory_is_released_and_resumed_as_sglang_does_it(monkeypatch):
    world = World(monkeypatch)
    assert world.release() == "" and world.paused == GPU_MEMORY_ALL_TYPES
    assert world.resume() == "" and world.paused == []
    assert world.release("kv_cache") == world.release("weights") == ""
    assert world.resume("weights") == world.resume("kv_cache") == ""
    assert world.verified == 3, "what waits is verified before"


def test_while_requests_run_nothing_is_released(monkeypatch):
    """SGLang asserts that none does, and its scheduler ends."""
    world = World(monkeypatch, busy=True)
    assert world.release() == f"The memory was not released, because {UNFINISHED}"
    assert not world.paused and not world.updater.offload_tags
    assert World(monkeypatch, busy=True, paused=True).release() == "", "they wait, retracted"


def test_a_cpu_has_no_memory_to_release(monkeypatch):
    """SGLang waits for the GPU that torch was made for at the end, and its scheduler ends."""
    world = World(monkeypatch)
    world.gpu.is_available = lambda: False
    said = "The memory was not released, because this server computes on a CPU: do without."
    assert world.release() == said and not world.updater.offload_tags
    world.gpu = torch.cpu  # of a torch that was made for CPUs
    assert world.release() == "" and world.resume() == ""


@pytest.mark.parametrize(
    ("released", "tags", "said"),
    [
        ((), (), "kv_cache was not released: release it first."),
        (("kv_cache",), (), "weights was not released: give tags of kv_cache."),
        (
            ("kv_cache", "weights"),
            ("cache",),
            "cache was not released: give tags of kv_cache, weights.",
        ),
        (("weights",), ("weights", "weights"), "tags has weights twice: give it once."),
    ],
)
def test_what_was_not_released_is_not_resumed(monkeypatch, released, tags, said):
    """SGLang looks for it in a set, and its scheduler ends by a KeyError."""
    world = World(monkeypatch)
    if released:
        world.release(*released)
    assert world.resume(*tags) == f"The memory was not resumed, because {said}"
    assert sorted(world.paused) == sorted(released)


def test_what_is_away_stays_away(monkeypatch):
    """Some trainers release twice. torch_memory_saver ends a process that pauses what is paused."""
    world = World(monkeypatch)
    assert world.release("weights") == world.release("weights") == ""
    assert world.paused == ["weights"]
    assert world.release() == "" and world.paused == ["weights", "kv_cache", "cuda_graph"]
    assert world.release() == "" and len(world.paused) == 3
    assert world.resume() == "" and not world.paused


def test_what_is_unknown_is_not_released(monkeypatch):
    world = World(monkeypatch)
    known = "give tags of kv_cache, weights, cuda_graph."
    said = f"The memory was not released, because tags has 'kv_cach': {known}"
    assert world.release("kv_cach") == said and not world.paused


def test_weights_that_other_servers_share_are_not_released(monkeypatch):
    """SGLang raises, and its scheduler ends."""
    world = World(monkeypatch)
    world.args.weight_cache_mode = "daemon"
    said = (
        "The memory was not released, because --weight-cache-mode is daemon, so that other servers "
        "have the same weights: give tags of kv_cache, cuda_graph."
    )
    assert world.release() == world.release("weights") == said and not world.paused
    assert world.release("kv_cache", "cuda_graph") == ""


def test_the_sentence_comes_to_who_asked():
    """SGLang's answers have no place for one, and its routes say HTTP 400 for what is raised."""

    async def asked(*answers: Any) -> Any:
        communicator: Any = FanOutCommunicator(lambda _obj: None, len(answers))
        waiting = asyncio.create_task(
            control.answers(type(communicator).__call__, communicator, object())
        )
        await asyncio.sleep(0)
        for answer in answers:
            communicator.handle_recv(answer)
        return await waiting

    done = io_struct.ReleaseMemoryOccupationReqOutput()
    assert asyncio.run(asked(done, done)) == [done, done]
    profiled = control.NotProfiled(success=False, message="a sentence.")
    kinds = (control.NotReleased, control.NotResumed, control.NotRecorded)
    for answer in (*(kind(message="a sentence.") for kind in kinds), profiled):
        with pytest.raises(ValueError, match=r"^a sentence\.$") as raised:
            asyncio.run(asked(done, pickle.loads(pickle.dumps(answer))))
        assert isinstance(raised.value, HTTPException) and raised.value.status_code == 400


@pytest.mark.parametrize("mode", [None, "stat"])
def test_a_server_that_counts_no_experts_says_so(mode):
    """SGLang's recorder of none raises, and its scheduler ends."""
    args: Any = SimpleNamespace(expert_distribution_recorder_mode=mode)
    scheduler: Any = SimpleNamespace(server_args=args)
    found = handlers.record_experts(lambda *given: given, scheduler, 1)
    if mode is not None:
        assert found == (scheduler, 1)
        return
    said = "This server counts no experts: start it with --expert-distribution-recorder-mode."
    assert found == control.NotRecorded(message=said)
