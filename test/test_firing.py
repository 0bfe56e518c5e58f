"""A hook that had to run by now and did not ends the process, with its name."""

import argparse
import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import server_arguments
from sentences import gate_sentence

from margingate.config import GateConfig, GateError
from margingate.runtime.hooks import firing
from margingate.runtime.request import guard
from margingate.runtime.start import arguments, startup_hooks
from margingate.runtime.start.engine import gate_to_launch
from margingate.runtime.start.install import confirm_launcher

# Loads the plugin before a test stands in for what it looks for.
server_args_class = server_arguments.server_args_class

CONFIGS = {
    "invariant": GateConfig(overlap="off"),
    "overlap": GateConfig(overlap="on"),
    "stock": GateConfig(overlap="off", fast_path="stock"),
}


# Seen by what it counts


def fired(monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    """As if just these hooks had run in this process."""
    monkeypatch.setattr(guard, "_tallies", {name: guard.Tally(fired=1) for name in targets})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_hooks_that_are_asked_for_are_in_the_tables(config):
    targets = {hook.target for hook in startup_hooks.ALL_HOOKS}
    needed = {*firing.at_start(config, ranks=2), *firing.by_a_request(config), *firing.CLIENT}
    assert needed <= targets
    without = set(firing.at_start(config, ranks=2, quantized=True))
    assert needed - without >= {firing.LINEAR} if config.invariant else not without


def test_a_hook_that_never_ran_ends_the_start_with_its_name(monkeypatch):
    config, when = CONFIGS["invariant"], "by the end of the checks"
    hooks = [*firing.LAYERS, firing.LINEAR]
    fired(monkeypatch, *hooks)
    firing.confirm(firing.at_start(config, ranks=1), when)
    with pytest.raises(GateError, match=r"GroupCoordinator\.all_reduce, and SGLang did not call"):
        firing.confirm(firing.at_start(config, ranks=2), when)
    assert not list(firing.at_start(CONFIGS["stock"], ranks=2))
    for missing in hooks:
        fired(monkeypatch, *(name for name in hooks if name != missing))
        with pytest.raises(GateError) as caught:
            firing.confirm(firing.at_start(config, ranks=1), when)
        text = gate_sentence(caught.value)
        assert f"patched sglang.srt.{missing}, and SGLang did not call it {when}: " in text


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_first_request_that_ends_without_a_hook_ends_the_process(monkeypatch, config):
    from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH

    def request(gated: bool = True, reason: Any = None, ids: tuple[int, ...] = (1,)) -> Any:
        gate = SimpleNamespace(gated=gated)
        reason = reason or FINISH_LENGTH(1)
        return SimpleNamespace(gate=gate, finished_reason=reason, output_ids=ids)

    needed = list(firing.by_a_request(config))
    fired(monkeypatch, *needed)
    firing.FirstRequest(config).ended(request())
    for missing in needed:
        fired(monkeypatch, *(name for name in needed if name != missing))
        first = firing.FirstRequest(config)
        for other in (request(gated=False), request(reason=FINISH_ABORT()), request(ids=())):
            first.ended(other)
        with pytest.raises(SystemExit, match=f"margingate: .* patched sglang.srt.{missing}, and"):
            first.ended(request())
        first.ended(request())  # it is told once


def looked_at(outputs: list[Any]) -> list[Any]:
    """What a client gets of these outputs of SGLang's, by the hook."""

    async def original(_manager: Any, _obj: Any, _request: Any) -> Any:
        for output in outputs:
            yield output

    async def collect() -> list[Any]:
        obj = SimpleNamespace(sampling_params={})
        return [each async for each in firing.generate_request(original, None, obj, None)]

    return asyncio.run(collect())


def output(**meta_info: Any) -> dict[str, Any]:
    return {"meta_info": {"finish_reason": None, **meta_info}}


def test_the_first_answer_has_passed_the_hooks_of_the_launcher(monkeypatch):
    monkeypatch.setattr(firing, "_answered", False)
    stop, abort = {"type": "stop"}, {"type": "abort"}
    fired(monkeypatch, *firing.CLIENT)
    given = [output(), output(finish_reason=abort), [output(), output(finish_reason=abort)]]
    assert looked_at(given) == given
    assert not firing._answered, "no answer ended yet"
    with pytest.raises(GateError, match="an answer that did not pass the gate's hook on its"):
        looked_at([output(), output(finish_reason=stop)])
    for missing in firing.CLIENT:
        fired(monkeypatch, *(name for name in firing.CLIENT if name != missing))
        assert looked_at([output()]) == [output()], "a streamed answer has no record before its end"
        with pytest.raises(GateError, match=f"patched sglang.srt.{missing}, and SGLang did not"):
            looked_at([output(finish_reason=stop, gate={"gated": True})])
    fired(monkeypatch, *firing.CLIENT)
    given = [output(), output(finish_reason=stop, gate={"gated": True})]
    assert looked_at(given) == given
    fired(monkeypatch)
    assert looked_at([output(finish_reason=stop)]), "later ones are not looked at"


# Seen by what it leaves in the arguments


def test_a_command_line_whose_arguments_carry_no_settings_ends_the_start(monkeypatch):
    asked = argparse.Namespace(deterministic_gate=True)
    monkeypatch.setattr(arguments, "attach", lambda made, options: None)
    with pytest.raises(SystemExit) as caught:
        arguments.from_command_line(lambda cls, args: SimpleNamespace(), object, asked)
    text = str(caught.value.code)
    assert text.startswith("margingate: --deterministic-gate was given, but SGLang made its")
    assert "ServerArgs.from_cli_args" in text
    good = SimpleNamespace(_margingate=GateConfig())
    assert arguments.from_command_line(lambda cls, args: good, object, asked) is good
    plain = argparse.Namespace(deterministic_gate=False)
    assert arguments.from_command_line(lambda cls, args: None, object, plain) is None


def test_settings_that_were_never_checked_end_the_start():
    arguments.confirm_settings(SimpleNamespace(_margingate=GateConfig(rows=16)))
    with pytest.raises(GateError, match=r"without the hook on ServerArgs\.resolve_once"):
        arguments.confirm_settings(SimpleNamespace(_margingate=GateConfig()))
    with pytest.raises(GateError, match=r"without the hook on ServerArgs\.from_cli_args"):
        arguments.confirm_settings(SimpleNamespace())


def test_an_engine_whose_arguments_carry_no_settings_launches_nothing(
    monkeypatch, server_args_class
):
    """Its first one began before there was any hook, and ignores what it is given beside them."""
    from sglang.srt.entrypoints.engine import Engine

    seen = []
    monkeypatch.setattr(
        Engine,
        "_launch_subprocesses",
        classmethod(lambda cls, server_args, **_rest: seen.append(gate_to_launch(server_args))),
    )
    monkeypatch.setattr("atexit.register", lambda function: None)
    given = server_args_class(model_path="dummy")
    for keywords in ({"deterministic_gate": True}, {"deterministic_gate": True, "gate_rows": 8}):
        with pytest.raises(GateError, match="give all arguments as keywords, without server_args"):
            Engine(server_args=given, **keywords)
    with pytest.raises(TypeError):  # of the launch that is none
        Engine(server_args=given)
    given._margingate = config = GateConfig(rows=16)
    with pytest.raises(TypeError):
        Engine(server_args=given, deterministic_gate=True)
    assert seen == [None, config]
    assert gate_to_launch(SimpleNamespace()) is None, "the wish ends with the Engine"


def test_a_scheduler_that_no_hooked_launcher_started_does_not_come_up():
    with pytest.raises(GateError, match=r"went around Engine\._launch_subprocesses"):
        confirm_launcher(SimpleNamespace())
    confirm_launcher(SimpleNamespace(_margingate_launched=True))
