"""The ledger of hooks fits the installed SGLang, and docs/hooks.md says what it is."""

import importlib.metadata
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest
from sentences import gate_sentence

from margingate.cli.main import main
from margingate.config import GateError
from margingate.runtime.compat import release
from margingate.runtime.compat.instance_patches import (
    INSTANCE_PATCHES,
    ON_ENGINE,
    ON_QUANTIZED,
    check_instance,
    on_quantized,
)
from margingate.runtime.hooks import registry
from margingate.runtime.start import startup_hooks

DOCUMENT = Path(__file__).parents[1] / "docs" / "hooks.md"
of_the_newest = pytest.mark.skipif(
    release.SGLANG_VERSION != release.NEWEST, reason="the page is of the newest SGLang"
)


# The ledger and the installed SGLang


def test_every_target_exists_with_the_parameters_of_the_ledger():
    for hook in startup_hooks.ALL_HOOKS:
        registry.check_target(hook)


def test_the_ledger_names_every_target_once_and_gives_reasons():
    targets = [hook.target for hook in startup_hooks.ALL_HOOKS]
    assert len(targets) == len(set(targets))
    for hook in startup_hooks.ALL_HOOKS:
        assert hook.why, hook.target
        assert hook.remove_when, hook.target
        assert hook.function.__module__.startswith("margingate.runtime."), hook.target


def test_the_hooks_can_be_called_the_way_their_targets_are():
    """By position where SGLang's parameters allow it, by name where they ask for it."""
    for hook in startup_hooks.ALL_HOOKS:
        if hook.parameters is None:
            continue
        target = inspect.unwrap(registry.resolve(hook))
        target = getattr(target, "__func__", target)
        taken = inspect.signature(target).parameters.values()
        by_name = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
        first = [] if hook.kind is registry.HookType.BEFORE else [object()]
        given = [*first, *(p for p in taken if p.kind is not p.KEYWORD_ONLY)]
        inspect.signature(hook.function).bind(*given, **dict.fromkeys(by_name))


def test_async_targets_have_async_hooks():
    for hook in startup_hooks.ALL_HOOKS:
        target = inspect.unwrap(registry.resolve(hook))
        both = (inspect.iscoroutinefunction(target), inspect.iscoroutinefunction(hook.function))
        assert both[0] == both[1], hook.target


def test_the_version_of_the_hooks_is_the_one_that_is_installed():
    assert importlib.metadata.version("sglang") == registry.SGLANG_VERSION
    assert registry.SGLANG_VERSION in release.SERVED
    release.check_version()


@pytest.mark.parametrize("installed", ["0.5.17", "0.5.22.post1", "0.5.24"])
def test_another_version_of_sglang_is_refused(monkeypatch, installed):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    with pytest.raises(GateError) as caught:
        release.check_version()
    text = gate_sentence(caught.value)
    assert f"patches SGLang 0.5.23 or 0.5.22, but SGLang is {installed}: " in text
    assert "pip install sglang==0.5.23." in text


def test_an_sglang_that_is_no_package_is_refused(monkeypatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(GateError) as caught:
        release.check_version()
    assert "SGLang is not installed as a package: pip install" in gate_sentence(caught.value)


def test_a_hook_whose_target_may_be_given_more_hands_on_all():
    varying = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    open_ended = [
        hook for hook in startup_hooks.ALL_HOOKS if (hook.parameters or "").endswith("...")
    ]
    assert len(open_ended) > 1
    for hook in open_ended:
        kinds = {p.kind for p in inspect.signature(hook.function).parameters.values()}
        assert varying <= kinds, hook.target


def test_what_is_replaced_on_an_instance_is_there():
    """Methods of the class, or what its constructor sets (it cannot be made without a GPU)."""
    for patch in INSTANCE_PATCHES:
        owner = pkgutil.resolve_name("sglang.srt." + patch.owner)
        if patch.kind == "module":  # imported where there is a GPU
            imports = [line for line in inspect.getsource(owner).splitlines() if "import" in line]
            assert hasattr(owner, patch.name) or any(patch.name in line for line in imports), patch
            continue
        source = inspect.getsource(owner.__init__)
        assert hasattr(owner, patch.name) or f"self.{patch.name}" in source, patch
    assert set(ON_ENGINE) < set(INSTANCE_PATCHES)
    with pytest.raises(GateError, match=r"TritonAttnBackend\.decode_attention_fwd, which SGLang"):
        check_instance(object(), INSTANCE_PATCHES[0])
    for patch in ON_QUANTIZED:
        method = object.__new__(pkgutil.resolve_name("sglang.srt." + patch.owner))
        assert on_quantized(method) == patch, "a sentence names the method that it is about"


# The document


@of_the_newest
def test_the_document_is_what_the_command_prints(capsys):
    assert main(["hooks"]) == 0
    printed = capsys.readouterr().out
    assert printed == DOCUMENT.read_text(), "run: margingate hooks > docs/hooks.md"


@of_the_newest
def test_the_document_has_a_row_with_six_cells_for_each_hook():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    processes = [row.split(" | ")[2] for row in rows]
    assert len(rows) == len(startup_hooks.ALL_HOOKS) + len(INSTANCE_PATCHES)
    assert all(row.count(" | ") == 5 for row in rows)
    early = [patch for patch in INSTANCE_PATCHES if patch.process == "startup"]
    assert processes.count("startup") == len(startup_hooks.STARTUP_HOOKS) + len(early)
    assert processes.count("launcher") == len(startup_hooks.TOKENIZER_HOOKS)
    assert processes.count("detokenizer") == len(startup_hooks.DETOKENIZER_HOOKS)
    assert processes.count("scheduler") == len(startup_hooks.SCHEDULER_HOOKS) + len(
        INSTANCE_PATCHES
    ) - len(early)


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
