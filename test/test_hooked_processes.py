"""Whole processes: with the plugin and without it, gated, and refused."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from margingate.harness.embedded_model import ensure_model

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
        answers = {name: process.communicate(timeout=900)[0] for name, process in started.items()}
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
