"""SGLang's profiles: one that cannot be taken or written ends no scheduler."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import ProfileReq, ProfileReqType
from sglang.srt.managers.scheduler_components import profiler_manager
from sglang.srt.utils import profile_utils

from margingate.runtime.schedule import profiling

Manager = profiler_manager.SchedulerProfilerManager


@pytest.fixture
def manager(monkeypatch) -> Any:
    """SGLang's own of one rank, with the hooks around."""
    ranks = SimpleNamespace(tp_rank=0, num_dp_ranks=1, pp_size=1, moe_ep_size=1)
    monkeypatch.setattr(profiler_manager, "get_parallel", lambda: ranks)
    group = SimpleNamespace(cpu_group=None)
    monkeypatch.setattr(profiler_manager, "get_dp_tp_group", lambda: group)
    monkeypatch.setattr("torch.distributed.barrier", lambda _group: None)
    for name, hook in (
        ("_profile", profiling.ask),
        ("_start_profile", profiling.contain),
        ("_stop_profile", profiling.contain),
    ):
        original = getattr(Manager, name)
        hooked: Any = partial(hook, original)
        monkeypatch.setattr(
            Manager, name, lambda *args, _hook=hooked, **named: _hook(*args, **named)
        )
    return Manager(get_forward_ct=lambda: 5)


def start(manager: Any, folder: Path, *activities: str, **more: Any) -> Any:
    asked: dict[str, Any] = {"output_dir": str(folder), "activities": list(activities)} | more
    return manager._profile(ProfileReq(profile_id="it", profile_prefix="", **asked))


def stop(manager: Any) -> Any:
    return manager._profile(ProfileReq(req_type=ProfileReqType.STOP_PROFILE))


def assert_works(manager: Any, folder: Path) -> None:
    assert start(manager, folder, "CPU").success and stop(manager).success
    assert list(folder.iterdir())


def test_a_folder_that_cannot_be_made(manager, tmp_path):
    """SGLang makes it as the profile ends, by itself where a number of steps was asked for."""
    (tmp_path / "file").touch()
    assert start(manager, tmp_path / "file" / "below", "CPU").success
    found = stop(manager)
    assert not found.success
    assert found.message.startswith("The profile was given up, because SGLang raised NotADirectory")
    assert not manager.profile_in_progress
    assert_works(manager, tmp_path / "folder")


def test_an_activity_of_another_vendors_gpus(manager, tmp_path):
    found = start(manager, tmp_path, "RPD")
    assert not found.success and "ModuleNotFoundError" in found.message
    assert_works(manager, tmp_path / "folder")


def test_stages_without_a_number_of_steps(manager, tmp_path):
    """SGLang adds one to none at the next forward."""
    found = start(manager, tmp_path, "CPU", profile_by_stage=True)
    said = "profile_by_stage is true, but num_steps is not set: give a number of steps."
    assert not found.success and found.message == said
    assert start(manager, tmp_path, "CPU", profile_by_stage=True, num_steps=1).success
    mode = SimpleNamespace(
        is_prefill=lambda: False, is_decode=lambda: True, name="DECODE", is_idle=lambda: False
    )
    for _ in range(3):
        manager._profile_batch_predicate(SimpleNamespace(forward_mode=mode, batch_size=lambda: 1))
    assert list(tmp_path.iterdir())


def test_sglangs_other_profiler(manager, monkeypatch, tmp_path):
    """SGLANG_PROFILE_V2: it asserts what it does not know, and cannot be stopped by hand."""
    monkeypatch.setattr(profiler_manager, "ProfileManager", Other)
    monkeypatch.setenv("SGLANG_PROFILE_V2", "1")
    other = Manager(get_forward_ct=lambda: 5)
    for found in (start(other, tmp_path, "CPU"), stop(other)):
        assert not found.success and found.message.startswith("The profile was given up")
    assert start(other, tmp_path, "CPU", profile_by_stage=True, num_steps=1).success


class Other(profile_utils.ProfileManager):
    def __init__(self, cpu_group: Any) -> None:
        self.cpu_group, self.profiler = cpu_group, None
        self.stage_based_trigger: Any = SimpleNamespace(configure=lambda **_of: None)
