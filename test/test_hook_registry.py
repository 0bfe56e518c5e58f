"""Hooks are checked against their targets before any is registered, and applied once."""

import logging
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from sentences import gate_sentence

from margingate.config import GateError
from margingate.runtime.hooks import registry as hooks

TOY = "sglang.srt.margingate_toy"


@pytest.fixture
def registry() -> Iterator[Any]:
    """SGLang's registry, emptied for this test and put back after it."""
    registry = hooks.HookRegistry
    saved = dict(registry._hooks), set(registry._patched)
    registry.reset()
    yield registry
    registry.reset()
    registry._hooks.update(saved[0])
    registry._patched.update(saved[1])


@pytest.fixture
def toy(monkeypatch) -> types.ModuleType:
    """A module below sglang.srt with one function, one class and one thing that is no function."""
    import sglang.srt

    module = types.ModuleType(TOY)
    exec(
        "def double(value, times=2):\n    return value * times\n"
        "class Box:\n"
        "    def put(self, value):\n        return ['put', value]\n"
        "    @classmethod\n    def make(cls, value):\n        return [cls.__name__, value]\n"
        "    @staticmethod\n    def plain(value):\n        return value\n"
        "class Own(Box):\n    def __init__(self, size=1):\n        self.size = size\n"
        "class Heir(Own):\n    pass\n"
        "import msgspec\n"
        "class Record(msgspec.Struct):\n    size: int = 1\n"
        "    def __post_init__(self):\n        pass\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, TOY, module)
    monkeypatch.setattr(sglang.srt, "margingate_toy", module, raising=False)
    return module


def around(original: Any, *args: Any, **kwargs: Any) -> Any:
    return ("around", original(*args, **kwargs))


def after(result: Any, *_args: Any, **_kwargs: Any) -> Any:
    return ("after", result)


def other(original: Any, *args: Any, **kwargs: Any) -> Any:
    return ("other", original(*args, **kwargs))


def make(target: str, parameters: str | None, function: Any = around) -> Any:
    kind = hooks.HookType.AFTER if function is after else hooks.HookType.AROUND
    return hooks.Hook(f"margingate_toy.{target}", kind, function, parameters, "why", "when")


# Checks before registering


@pytest.mark.parametrize("target", ["absent", "Box.absent", "Absent.put", "absent.module.double"])
def test_a_missing_target_is_refused_and_named(toy, registry, target):
    with pytest.raises(GateError) as caught:
        hooks.register([make(target, None)])
    text = gate_sentence(caught.value)
    assert f"needs {TOY}.{target}, which SGLang {hooks.SGLANG_VERSION} has" in text
    assert f"reinstall sglang=={hooks.SGLANG_VERSION}" in text
    assert not registry._hooks


@pytest.mark.parametrize("parameters", ["value", "times value", "value times extra", ""])
def test_other_parameters_are_refused_and_both_lists_shown(toy, registry, parameters):
    with pytest.raises(GateError) as caught:
        hooks.register([make("double", parameters)])
    text = gate_sentence(caught.value)
    assert f"cannot patch {TOY}.double: " in text
    assert f"its parameters are (value times) instead of ({parameters})" in text
    assert not registry._hooks


def test_a_refused_hook_leaves_no_other_hook_of_its_list_behind(toy, registry):
    """SGLang applies what was registered before a plugin's exception; half a gate is none."""
    with pytest.raises(GateError):
        hooks.register([make("Box.put", "self value"), make("double", "wrong")])
    assert not any(registry._hooks.values())


def test_parameters_that_are_not_compared_still_need_a_target(toy):
    hooks.check_target(make("double", None))
    with pytest.raises(GateError):
        hooks.check_target(make("absent", None))


def test_a_classmethod_is_checked_with_and_without_its_class(toy, registry):
    hook = make("Box.make", "cls value")
    hooks.check_target(hook)
    hooks.install([hook])
    hooks.check_target(hook)  # wrapped by now


def test_a_plugin_that_replaced_a_target_with_another_one_is_refused(toy, monkeypatch):
    monkeypatch.setattr(toy, "double", lambda *args, **kwargs: None)
    with pytest.raises(GateError, match=r"its parameters are \(args kwargs\) instead of"):
        hooks.check_target(make("double", "value times"))


@pytest.mark.parametrize("target", ["Heir.__init__", "Record.__init__", "Record.__post_init__"])
def test_what_sglang_does_not_call_is_refused(toy, registry, target):
    """An inherited `__init__` is another class's; a record's are generated, or called in C."""
    with pytest.raises(GateError) as caught:
        hooks.register([make(target, None)])
    name = target.partition(".")[0]
    text = gate_sentence(caught.value)
    assert f"cannot patch {TOY}.{target}: SGLang makes a {name} without calling it" in text
    hooks.check_target(make("Own.__init__", "self size"))


@pytest.mark.parametrize(
    ("target", "parameters", "fits"),
    [
        ("double", "value times", True),
        ("double", "value times ...", True),
        ("double", "value ...", True),
        ("double", "value", False),
        ("double", "...", False),
        ("double", "times ...", False),
        ("double", "value times more ...", False),
        ("Box.make", "cls ...", False),
        ("Box.make", "cls value ...", True),
    ],
)
def test_a_target_may_have_more_optional_parameters_where_they_are_handed_on(
    toy, target, parameters, fits
):
    with nullcontext() if fits else pytest.raises(GateError, match="its parameters are"):
        hooks.check_target(make(target, parameters))


# Applying


def test_install_patches_functions_methods_and_classmethods(toy, registry):
    ledger = [
        make("double", "value times"),
        make("Box.put", "self value", after),
        make("Box.make", "cls value"),
        make("Box.plain", "value"),
    ]
    assert not any(hooks.is_applied(hook) for hook in ledger)
    hooks.install(ledger)
    assert all(hooks.is_applied(hook) for hook in ledger)
    assert toy.double(3) == ("around", 6)
    assert toy.Box().put(1) == ("after", ["put", 1])
    assert toy.Box.make(1) == ("around", ["Box", 1])
    assert toy.Box.plain(1) == ("around", 1)


def test_sglangs_log_names_the_plugin_however_late_a_hook_comes(toy, registry, caplog):
    with caplog.at_level(logging.INFO):
        hooks.install([make("double", "value times")])
    assert f"Applied 1 hook(s) to {TOY}.double (from: plugin=margingate, dist=" in caplog.text


def test_installing_twice_wraps_once(toy, registry):
    hook = make("double", "value times")
    for _ in range(2):
        hooks.install([hook])
        assert toy.double(3) == ("around", 6)
    assert len(registry._hooks[hook.path]) == 1


def test_a_function_with_hidden_state_of_its_own_is_not_taken_for_a_hook(toy, monkeypatch):
    def closing(value):
        def inner(value, times=2):
            return value * times * factor

        factor = value
        return inner

    monkeypatch.setattr(toy, "double", closing(1))
    assert not hooks.is_applied(make("double", None))


def test_two_plugins_on_one_target_get_along_before_it_is_patched(toy, registry):
    hook = make("double", "value times")
    registry.register(hook.path, other, hooks.HookType.AROUND)
    hooks.install([hook])
    assert hooks.is_applied(hook)
    assert toy.double(3) == ("around", ("other", 6))


def test_a_target_that_another_plugin_patched_first_is_refused(toy, registry):
    """SGLang patches a target once, and says nothing when it leaves a later hook out."""
    hook = make("double", "value times")
    registry.register(hook.path, other, hooks.HookType.AROUND)
    registry.apply_hooks()
    assert hook.path in registry._patched
    with pytest.raises(GateError) as caught:
        hooks.install([hook])
    text = gate_sentence(caught.value)
    assert f"could not patch {hook.path}, probably because another SGLang plugin" in text
    assert "SGLANG_PLUGINS" in text
    assert toy.double(3) == ("other", 6)


def test_a_hook_that_sglang_cannot_apply_is_refused(toy, registry, caplog):
    """It logs the exception and goes on: a class can only be replaced, for example."""
    hook = make("Box", None)
    with caplog.at_level(logging.CRITICAL), pytest.raises(GateError) as caught:
        hooks.install([hook])
    assert f"could not patch {TOY}.Box" in gate_sentence(caught.value)
