"""The ledger of patches: it fits the installed SGLang, fails closed, and is documented."""

import asyncio
import importlib.metadata
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from margingate.cli.main import main
from margingate.config import GateConfig, GateError
from margingate.harness.embedded_model import ensure_model
from margingate.runtime.compat import release

DOCUMENT = Path(__file__).parents[1] / "docs" / "hooks.md"
TOY = "sglang.srt.margingate_toy"

# Resolves the arguments of a server without the flag, in a process that loads plugins as every
# process of SGLang does. Where ours are among them, it looks at the hooks, installs the others
# twice, as gated schedulers and launchers do, and starts a server whose threshold is refused.
PROBE = """
import json, runpy, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import prepare_server_args

made = prepare_server_args(sys.argv[1:])
made.resolve_once()
arguments = made.resolved_dict()
answer = {"arguments": {name: repr(value) for name, value in arguments.items()}}
answer["beside"] = sorted(name for name in vars(made) if "margingate" in name)
answer["registered"] = sorted(HookRegistry._hooks)
if not HookRegistry._hooks:
    print(json.dumps(answer))
    sys.exit()

from margingate.runtime.hooks import registry
from margingate.runtime.hooks.scheduler_table import SCHEDULER_HOOKS
from margingate.runtime.start.startup_hooks import ALL_HOOKS, STARTUP_HOOKS
from margingate.runtime.hooks.launcher_table import DETOKENIZER_HOOKS, TOKENIZER_HOOKS

def layers(hook):
    function = registry.resolve(hook)
    function, count = getattr(function, "__func__", function), 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    return count

def state():
    return {
        "patched": sorted(HookRegistry._patched),
        "applied": sorted(hook.path for hook in ALL_HOOKS if registry.is_applied(hook)),
        "layers": {hook.path: layers(hook) for hook in ALL_HOOKS},
    }

answer |= {"startup": sorted(h.path for h in STARTUP_HOOKS), "ungated": state()}
registry.install(SCHEDULER_HOOKS + TOKENIZER_HOOKS + DETOKENIZER_HOOKS)
answer["once"] = state()
registry.install(SCHEDULER_HOOKS + TOKENIZER_HOOKS + DETOKENIZER_HOOKS)
answer["twice"] = state()
print(json.dumps(answer), flush=True)
sys.argv += ["--deterministic-gate", "--gate-threshold", "-1"]
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""
# What SGLANG_PLUGINS lets in. The platform plugin stays where there is no accelerator: it decides
# which CPU operators SGLang takes, flag or not.
PLUGINS = {"with": "margingate,margingate_host", "without": "margingate_host"}


@dataclass(frozen=True)
class Probe:
    """A finished process."""

    code: int
    answer: dict[str, Any]
    stderr: str


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> dict[str, Probe]:
    """PROBE in two processes at once, with the gate's plugin and without."""
    folder = tmp_path_factory.mktemp("probes")
    command = [sys.executable, "-c", PROBE, "--model-path", str(ensure_model("smollm2"))]
    command += ["--device", "cpu", "--random-seed", "1"]
    with ExitStack() as stack:
        started = {}
        for name, allowed in PLUGINS.items():
            stderr = stack.enter_context((folder / name).open("w"))
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "SGLANG_PLUGINS": allowed},
            )
            stack.callback(process.kill)
            started[name] = process
        answers = {name: process.communicate(timeout=300)[0] for name, process in started.items()}
    errors = {name: (folder / name).read_text() for name in started}
    for name, answer in answers.items():
        assert answer, errors[name][-2000:]
    return {
        name: Probe(process.returncode, json.loads(answers[name]), errors[name])
        for name, process in started.items()
    }


@pytest.fixture
def probe(probes) -> dict[str, Any]:
    """What the process with the plugin printed."""
    return probes["with"].answer


@pytest.fixture(scope="module")
def hooks() -> types.ModuleType:
    """margingate.runtime.hooks.registry; the first test that asks waits for SGLang's import."""
    from margingate.runtime.hooks import registry

    return registry


@pytest.fixture(scope="module")
def table() -> types.ModuleType:
    from margingate.runtime.start import startup_hooks

    return startup_hooks


@pytest.fixture
def registry(hooks) -> Iterator[Any]:
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


def make(hooks: Any, target: str, parameters: str | None, function: Any = around) -> Any:
    kind = hooks.HookType.AFTER if function is after else hooks.HookType.AROUND
    return hooks.Hook(f"margingate_toy.{target}", kind, function, parameters, "why", "when")


def sentence(caught: pytest.ExceptionInfo[GateError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("--deterministic-gate ")
    assert text.endswith(".")
    return text


# The ledger and the installed SGLang


def test_every_target_exists_with_the_parameters_of_the_ledger(hooks, table):
    for hook in table.ALL_HOOKS:
        hooks.check_target(hook)


def test_the_ledger_names_every_target_once_and_gives_reasons(table):
    targets = [hook.target for hook in table.ALL_HOOKS]
    assert len(targets) == len(set(targets))
    for hook in table.ALL_HOOKS:
        assert hook.why, hook.target
        assert hook.remove_when, hook.target
        assert hook.function.__module__.startswith("margingate.runtime."), hook.target


def test_the_hooks_can_be_called_the_way_their_targets_are(hooks, table):
    """By position where SGLang's parameters allow it, by name where they ask for it."""
    for hook in table.ALL_HOOKS:
        if hook.parameters is None:
            continue
        target = inspect.unwrap(hooks.resolve(hook))
        target = getattr(target, "__func__", target)
        taken = inspect.signature(target).parameters.values()
        by_name = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
        first = [] if hook.kind is hooks.HookType.BEFORE else [object()]
        given = [*first, *(p for p in taken if p.kind is not p.KEYWORD_ONLY)]
        inspect.signature(hook.function).bind(*given, **dict.fromkeys(by_name))


def test_async_targets_have_async_hooks(hooks, table):
    for hook in table.ALL_HOOKS:
        target = inspect.unwrap(hooks.resolve(hook))
        both = (inspect.iscoroutinefunction(target), inspect.iscoroutinefunction(hook.function))
        assert both[0] == both[1], hook.target


def test_the_version_of_the_hooks_is_the_one_that_is_installed(hooks):
    assert importlib.metadata.version("sglang") == hooks.SGLANG_VERSION
    assert hooks.SGLANG_VERSION in release.SERVED
    release.check_version()


@pytest.mark.parametrize("installed", ["0.5.17", "0.5.22.post1", "0.5.24"])
def test_another_version_of_sglang_is_refused(monkeypatch, installed):
    from margingate.runtime.compat import release

    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    with pytest.raises(GateError) as caught:
        release.check_version()
    text = sentence(caught)
    assert f"patches SGLang 0.5.23 or 0.5.22, but SGLang is {installed}: " in text
    assert "pip install sglang==0.5.23." in text


def test_an_sglang_that_is_no_package_is_refused(monkeypatch):
    from margingate.runtime.compat import release

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(GateError) as caught:
        release.check_version()
    assert "SGLang is not installed as a package: pip install" in sentence(caught)


# Checks before registering


@pytest.mark.parametrize("target", ["absent", "Box.absent", "Absent.put", "absent.module.double"])
def test_a_missing_target_is_refused_and_named(hooks, toy, registry, target):
    with pytest.raises(GateError) as caught:
        hooks.register([make(hooks, target, None)])
    text = sentence(caught)
    assert f"needs {TOY}.{target}, which SGLang {hooks.SGLANG_VERSION} has" in text
    assert f"reinstall sglang=={hooks.SGLANG_VERSION}" in text
    assert not registry._hooks


@pytest.mark.parametrize("parameters", ["value", "times value", "value times extra", ""])
def test_other_parameters_are_refused_and_both_lists_shown(hooks, toy, registry, parameters):
    with pytest.raises(GateError) as caught:
        hooks.register([make(hooks, "double", parameters)])
    text = sentence(caught)
    assert f"cannot patch {TOY}.double: " in text
    assert f"its parameters are (value times) instead of ({parameters})" in text
    assert not registry._hooks


def test_a_refused_hook_leaves_no_other_hook_of_its_list_behind(hooks, toy, registry):
    """SGLang applies what was registered before a plugin's exception; half a gate is none."""
    with pytest.raises(GateError):
        hooks.register([make(hooks, "Box.put", "self value"), make(hooks, "double", "wrong")])
    assert not any(registry._hooks.values())


def test_parameters_that_are_not_compared_still_need_a_target(hooks, toy):
    hooks.check_target(make(hooks, "double", None))
    with pytest.raises(GateError):
        hooks.check_target(make(hooks, "absent", None))


def test_a_classmethod_is_checked_with_and_without_its_class(hooks, toy, registry):
    hook = make(hooks, "Box.make", "cls value")
    hooks.check_target(hook)
    hooks.install([hook])
    hooks.check_target(hook)  # wrapped by now


def test_a_plugin_that_replaced_a_target_with_another_one_is_refused(hooks, toy, monkeypatch):
    monkeypatch.setattr(toy, "double", lambda *args, **kwargs: None)
    with pytest.raises(GateError, match=r"its parameters are \(args kwargs\) instead of"):
        hooks.check_target(make(hooks, "double", "value times"))


@pytest.mark.parametrize("target", ["Heir.__init__", "Record.__init__", "Record.__post_init__"])
def test_what_sglang_does_not_call_is_refused(hooks, toy, registry, target):
    """An inherited `__init__` is another class's; a record's are generated, or called in C."""
    with pytest.raises(GateError) as caught:
        hooks.register([make(hooks, target, None)])
    name = target.partition(".")[0]
    assert f"cannot patch {TOY}.{target}: SGLang makes a {name} without calling it" in sentence(
        caught
    )
    hooks.check_target(make(hooks, "Own.__init__", "self size"))


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
    hooks, toy, target, parameters, fits
):
    with nullcontext() if fits else pytest.raises(GateError, match="its parameters are"):
        hooks.check_target(make(hooks, target, parameters))


def test_a_hook_whose_target_may_be_given_more_hands_on_all(hooks, table):
    varying = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    open_ended = [hook for hook in table.ALL_HOOKS if (hook.parameters or "").endswith("...")]
    assert len(open_ended) > 1
    for hook in open_ended:
        kinds = {p.kind for p in inspect.signature(hook.function).parameters.values()}
        assert varying <= kinds, hook.target


# Seen to run


def fired(monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    """As if just these hooks had run in this process."""
    from margingate.runtime.request import guard

    monkeypatch.setattr(guard, "_tallies", {name: guard.Tally(fired=1) for name in targets})


CONFIGS = {
    "invariant": GateConfig(overlap="off"),
    "overlap": GateConfig(overlap="on"),
    "stock": GateConfig(overlap="off", fast_path="stock"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_hooks_that_are_asked_for_are_in_the_tables(table, config):
    from margingate.runtime.hooks import firing

    targets = {hook.target for hook in table.ALL_HOOKS}
    needed = {*firing.at_start(config, ranks=2), *firing.by_a_request(config), *firing.CLIENT}
    assert needed <= targets
    without = set(firing.at_start(config, ranks=2, quantized=True))
    assert needed - without >= {firing.LINEAR} if config.invariant else not without


def test_a_hook_that_never_ran_ends_the_start_with_its_name(monkeypatch):
    from margingate.runtime.hooks import firing

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
        assert f"patched sglang.srt.{missing}, and SGLang did not call it {when}: " in sentence(
            caught
        )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_first_request_that_ends_without_a_hook_ends_the_process(monkeypatch, config):
    from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH

    from margingate.runtime.hooks import firing

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
    from margingate.runtime.hooks import firing

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
    from margingate.runtime.hooks import firing

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


# Applying


def test_install_patches_functions_methods_and_classmethods(hooks, toy, registry):
    ledger = [
        make(hooks, "double", "value times"),
        make(hooks, "Box.put", "self value", after),
        make(hooks, "Box.make", "cls value"),
        make(hooks, "Box.plain", "value"),
    ]
    assert not any(hooks.is_applied(hook) for hook in ledger)
    hooks.install(ledger)
    assert all(hooks.is_applied(hook) for hook in ledger)
    assert toy.double(3) == ("around", 6)
    assert toy.Box().put(1) == ("after", ["put", 1])
    assert toy.Box.make(1) == ("around", ["Box", 1])
    assert toy.Box.plain(1) == ("around", 1)


def test_sglangs_log_names_the_plugin_however_late_a_hook_comes(hooks, toy, registry, caplog):
    with caplog.at_level(logging.INFO):
        hooks.install([make(hooks, "double", "value times")])
    assert f"Applied 1 hook(s) to {TOY}.double (from: plugin=margingate, dist=" in caplog.text


def test_installing_twice_wraps_once(hooks, toy, registry):
    hook = make(hooks, "double", "value times")
    for _ in range(2):
        hooks.install([hook])
        assert toy.double(3) == ("around", 6)
    assert len(registry._hooks[hook.path]) == 1


def test_a_function_with_hidden_state_of_its_own_is_not_taken_for_a_hook(hooks, toy, monkeypatch):
    def closing(value):
        def inner(value, times=2):
            return value * times * factor

        factor = value
        return inner

    monkeypatch.setattr(toy, "double", closing(1))
    assert not hooks.is_applied(make(hooks, "double", None))


def test_two_plugins_on_one_target_get_along_before_it_is_patched(hooks, toy, registry):
    hook = make(hooks, "double", "value times")
    registry.register(hook.path, other, hooks.HookType.AROUND)
    hooks.install([hook])
    assert hooks.is_applied(hook)
    assert toy.double(3) == ("around", ("other", 6))


def test_a_target_that_another_plugin_patched_first_is_refused(hooks, toy, registry):
    """SGLang patches a target once, and says nothing when it leaves a later hook out."""
    hook = make(hooks, "double", "value times")
    registry.register(hook.path, other, hooks.HookType.AROUND)
    registry.apply_hooks()
    assert hook.path in registry._patched
    with pytest.raises(GateError) as caught:
        hooks.install([hook])
    text = sentence(caught)
    assert f"could not patch {hook.path}, probably because another SGLang plugin" in text
    assert "SGLANG_PLUGINS" in text
    assert toy.double(3) == ("other", 6)


def test_a_hook_that_sglang_cannot_apply_is_refused(hooks, toy, registry, caplog):
    """It logs the exception and goes on: a class can only be replaced, for example."""
    hook = make(hooks, "Box", None)
    with caplog.at_level(logging.CRITICAL), pytest.raises(GateError) as caught:
        hooks.install([hook])
    assert f"could not patch {TOY}.Box" in sentence(caught)


# Whole processes


def test_without_the_flag_only_the_startup_hooks_are_there(probe):
    ungated = probe["ungated"]
    assert probe["registered"] == ungated["patched"] == ungated["applied"] == probe["startup"]


def test_without_the_flag_no_other_target_is_wrapped(probe):
    before, after = probe["ungated"]["layers"], probe["once"]["layers"]
    for path, count in before.items():
        assert after[path] == (count if path in probe["startup"] else count + 1), path


def test_a_gated_process_has_every_hook_once(probe):
    assert probe["once"]["applied"] == sorted(probe["once"]["layers"])
    assert probe["twice"] == probe["once"]


def test_without_the_flag_the_arguments_are_those_of_sglang_alone(probes):
    assert (probes["without"].code, probes["without"].answer["registered"]) == (0, [])
    with_plugin, without = (
        {
            name: re.sub(" at 0x[0-9a-f]+", "", value)
            for name, value in probes[key].answer["arguments"].items()
        }
        for key in ("with", "without")
    )
    assert len(without) > 400
    assert with_plugin == without
    assert probes["with"].answer["beside"] == []


def test_a_refused_launch_exits_with_one_and_one_line(probes):
    """`python -m sglang.launch_server ... --deterministic-gate --gate-threshold -1`."""
    launched = probes["with"]
    lines = [line for line in launched.stderr.splitlines() if line.startswith("margingate: ")]
    assert launched.code == 1
    assert len(lines) == 1
    assert lines[0].startswith("margingate: --gate-threshold is -1.0, but a margin is compared")
    assert launched.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in launched.stderr


# The document


of_the_newest = pytest.mark.skipif(
    release.SGLANG_VERSION != release.NEWEST, reason="the page is of the newest SGLang"
)


@of_the_newest
def test_the_document_is_what_the_command_prints(capsys, table):
    assert main(["hooks"]) == 0
    printed = capsys.readouterr().out
    assert printed == DOCUMENT.read_text(), "run: margingate hooks > docs/hooks.md"


@of_the_newest
def test_the_document_has_a_row_with_six_cells_for_each_hook(table):
    from margingate.runtime.compat.instance_patches import INSTANCE_PATCHES

    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    processes = [row.split(" | ")[2] for row in rows]
    assert len(rows) == len(table.ALL_HOOKS) + len(INSTANCE_PATCHES)
    assert all(row.count(" | ") == 5 for row in rows)
    early = [patch for patch in INSTANCE_PATCHES if patch.process == "startup"]
    assert processes.count("startup") == len(table.STARTUP_HOOKS) + len(early)
    assert processes.count("launcher") == len(table.TOKENIZER_HOOKS)
    assert processes.count("detokenizer") == len(table.DETOKENIZER_HOOKS)
    assert processes.count("scheduler") == len(table.SCHEDULER_HOOKS) + len(INSTANCE_PATCHES) - len(
        early
    )


def test_what_is_replaced_on_an_instance_is_there(table):
    """Methods of the class, or what its constructor sets (it cannot be made without a GPU)."""
    import pkgutil

    from margingate.runtime.compat.instance_patches import (
        INSTANCE_PATCHES,
        ON_ENGINE,
        ON_QUANTIZED,
        check_instance,
        on_quantized,
    )

    for patch in INSTANCE_PATCHES:
        owner = pkgutil.resolve_name("sglang.srt." + patch.owner)
        source = inspect.getsource(owner.__init__)
        assert hasattr(owner, patch.name) or f"self.{patch.name}" in source, patch
    assert set(ON_ENGINE) < set(INSTANCE_PATCHES)
    with pytest.raises(GateError, match=r"TritonAttnBackend\.decode_attention_fwd, which SGLang"):
        check_instance(object(), INSTANCE_PATCHES[0])
    for patch in ON_QUANTIZED:
        method = object.__new__(pkgutil.resolve_name("sglang.srt." + patch.owner))
        assert on_quantized(method) == patch, "a sentence names the method that it is about"


def test_the_command_without_sglang_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "margingate.runtime.start.startup_hooks", None)
    package = sys.modules.get("margingate.runtime.start")
    if package is not None:
        monkeypatch.delattr(package, "startup_hooks", raising=False)
    assert main(["hooks"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("margingate: the ledger names functions of SGLang, which cannot be")
    assert "pip install sglang==0.5.23." in said.err
