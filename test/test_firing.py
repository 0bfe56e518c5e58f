"""A hook that had to run by now and did not ends the process, with its name."""

import asyncio
import types
from typing import Any

import pytest
from sentences import gate_sentence

from margingate.config import GateConfig, GateError
from margingate.runtime.hooks import firing
from margingate.runtime.request import guard
from margingate.runtime.start import startup_hooks

CONFIGS = {
    "invariant": GateConfig(overlap="off"),
    "overlap": GateConfig(overlap="on"),
    "stock": GateConfig(overlap="off", fast_path="stock"),
}


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
        gate = types.SimpleNamespace(gated=gated)
        reason = reason or FINISH_LENGTH(1)
        return types.SimpleNamespace(gate=gate, finished_reason=reason, output_ids=ids)

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
        obj = types.SimpleNamespace(sampling_params={})
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
