"""A profile that SGLang cannot take or write is none, and its scheduler goes on."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from sglang.srt.managers.io_struct import ProfileReqType

from margingate.runtime.client.control import NotProfiled

logger = logging.getLogger(__name__)


def ask(original: Any, manager: Any, received: Any) -> Any:
    """AROUND SchedulerProfilerManager._profile, which counts steps of stages from there on."""
    starts = received.req_type == ProfileReqType.START_PROFILE
    if starts and received.profile_by_stage and not received.num_steps:
        message = "profile_by_stage is true, but num_steps is not set: give a number of steps."
        return NotProfiled(success=False, message=message)
    return contain(original, manager, received)


def contain(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND _start_profile and _stop_profile: no folder to write to, or no library to count by."""
    try:
        return original(manager, *args, **kwargs)
    except Exception as error:
        logger.exception("margingate: SGLang failed on a profile, which is given up.")
        _give_up(manager)
        because = f"SGLang raised {type(error).__name__} ({error})"
        message = f"The profile was given up, because {because}: change what was asked for."
        return NotProfiled(success=False, message=message)


def _give_up(manager: Any) -> None:
    """Nothing is in progress afterwards."""
    if not hasattr(manager, "torch_profiler"):  # by SGLANG_PROFILE_V2, nothing was
        return
    if (profiler := manager.torch_profiler) is not None:
        with suppress(Exception):  # it may have been stopped
            profiler.stop()
    manager.torch_profiler, manager.rpd_profiler = None, None
    manager.profile_in_progress, manager.profile_by_stage = False, False
    manager.profiler_start_forward_ct = manager.profiler_target_forward_ct = None
