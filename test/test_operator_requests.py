"""An operator's requests that no route of SGLang's has checked, and those a step too early."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from sglang.srt.managers import io_struct
from sglang.srt.managers.communicator import FanOutCommunicator

from margingate.config import GateConfig
from margingate.runtime.client import control
from margingate.runtime.compat.arguments.server_args import ATTRIBUTE
from margingate.runtime.hooks.launcher_table import TOKENIZER_HOOKS

MODES = "give abort, retract or in_place."
SELECTORS = "give target, draft or all."
# What comes by gRPC where a client leaves the mode out, and from an Engine.
NOTED = [
    (io_struct.PauseGenerationReqInput(mode=""), f"mode is '': {MODES}"),
    (io_struct.PauseGenerationReqInput(mode=None), f"mode is None: {MODES}"),
    (
        io_struct.OpenSessionReqInput(capacity_of_str_len=1, timeout="60"),
        "timeout is '60': give a number of seconds.",
    ),
]
SENT = [
    (io_struct.BeginWeightUpdateReqInput(selector="drafts"), f"selector is 'drafts': {SELECTORS}"),
    (io_struct.CheckWeightsReqInput(selector=["all"]), f"selector is ['all']: {SELECTORS}"),
]
UNFINISHED = io_struct.UpdateWeightsFromTensorReqOutput(
    success=False,
    message=f"The weights were not updated, because {control.UNFINISHED}: let them finish.",
)
DONE = io_struct.UpdateWeightsFromTensorReqOutput(success=True, message="")


def hook_on(method: str) -> Any:
    name = f"managers.tokenizer_manager.TokenizerManager.{method}"
    return next(hook for hook in TOKENIZER_HOOKS if hook.target == name)


@pytest.mark.parametrize(("asked", "said"), NOTED)
def test_a_word_that_sglang_does_not_know_is_refused_before_anything_is_noted(asked, said):
    """Its scheduler ends over it: at once over a mode, and a second later over a timeout."""
    pauses = isinstance(asked, io_struct.PauseGenerationReqInput)
    hook = hook_on("pause_generation" if pauses else "open_session")
    manager = SimpleNamespace(server_args=SimpleNamespace(**{ATTRIBUTE: GateConfig()}))

    async def original(*_given: Any) -> None:
        raise AssertionError("not called")

    with pytest.raises(ValueError) as raised:
        asyncio.run(hook.function(original, manager, asked))
    assert str(raised.value) == said
    assert isinstance(raised.value, HTTPException) and raised.value.status_code == 400


@pytest.mark.parametrize(
    "asked",
    [
        *(
            io_struct.PauseGenerationReqInput(mode=mode)
            for mode in ("abort", "retract", "in_place")
        ),
        *(
            io_struct.OpenSessionReqInput(capacity_of_str_len=1, timeout=timeout)
            for timeout in (None, 60, 0.5)
        ),
        *(
            io_struct.BeginWeightUpdateReqInput(selector=selector)
            for selector in ("target", "draft", "all")
        ),
        io_struct.FlushCacheReqInput(),
    ],
)
def test_what_it_knows_passes(asked):
    control.check(asked)


def ask(obj: Any, *answers: list[Any]) -> tuple[Any, int]:
    """What comes back, and how often it was sent; `answers`: of the schedulers, time after time."""
    sent: list[Any] = []
    communicator: Any = FanOutCommunicator(sent.append, len(answers[0]))

    async def run() -> Any:
        waiting = asyncio.create_task(
            control.answers(type(communicator).__call__, communicator, obj)
        )
        for times, each in enumerate(answers, 1):
            async with asyncio.timeout(5):
                while len(sent) < times and not waiting.done():
                    await asyncio.sleep(0.001)
            if waiting.done():
                break
            for answer in each:
                communicator.handle_recv(answer)
        return await waiting

    return asyncio.run(run()), len(sent)


@pytest.mark.parametrize(("asked", "said"), SENT)
def test_nor_is_it_sent(asked, said):
    with pytest.raises(ValueError) as raised:
        ask(asked, [DONE])
    assert str(raised.value) == said


def test_what_comes_while_the_last_request_ends_is_sent_again():
    """Its answer is sent a step before SGLang drops it from its batch."""
    obj = io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=[])
    assert ask(obj, [UNFINISHED], [DONE]) == ([DONE], 2)
    assert ask(obj, [DONE, UNFINISHED], [DONE, DONE]) == ([DONE, DONE], 2)
    released = io_struct.ReleaseMemoryOccupationReqOutput()
    early = control.NotReleased(message=f"Not released, because {control.UNFINISHED}.")
    assert ask(io_struct.ReleaseMemoryOccupationReqInput(), [early], [released]) == ([released], 2)


@pytest.mark.parametrize(
    ("answers", "times"),
    [
        ([(False, UNFINISHED.message, 0), (True, "", 0)], 2),
        ([(False, "no such folder", 0)], 1),
        ([(True, UNFINISHED.message, 0)], 1),
    ],
)
def test_an_update_from_disk_is_too(answers, times):
    """It is sent in another way than the other messages."""
    manager = SimpleNamespace(server_args=SimpleNamespace(**{ATTRIBUTE: GateConfig()}))
    sent: list[Any] = []

    async def original(_manager: Any, obj: Any) -> Any:
        sent.append(obj)
        return answers[len(sent) - 1]

    hook = hook_on("_wait_for_model_update_from_disk")
    assert asyncio.run(hook.function(original, manager, "it")) == answers[-1]
    assert sent == ["it"] * times


def test_but_not_for_long(monkeypatch):
    monkeypatch.setattr(control, "_AGAIN", (0.001,))
    obj = io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=[])
    assert ask(obj, [UNFINISHED], [UNFINISHED]) == ([UNFINISHED], 2)


def test_another_refusal_is_not_asked_for_twice():
    failed = io_struct.UpdateWeightsFromTensorReqOutput(success=False, message="no such folder")
    assert ask(
        io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=[]), [failed]
    ) == ([failed], 1)
