"""What the tests of both kernel files need: checks in the interpreter, a CUDA graph, PTX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

Check = Callable[[str], None]  # takes the device
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def checks_in(names: Mapping[str, Any]) -> dict[str, Check]:
    """A module's functions named check_NAME, by NAME."""
    return {
        name.removeprefix("check_"): check
        for name, check in names.items()
        if name.startswith("check_")
    }


def jit_tests(checks: Mapping[str, Check], file: str, **environment: str) -> tuple[Any, Any, Any]:
    """The fixture `interpreted` of a test module, and its tests of each check: in the interpreter,
    and on a GPU.

    environment: of the process with the interpreter.
    """

    @pytest.fixture(scope="module")
    def interpreted() -> dict[str, str]:
        return run_in_interpreter(file, **environment)

    @pytest.mark.parametrize("name", checks)
    def in_interpreter(name: str, interpreted: dict[str, str]) -> None:
        assert interpreted[name] == "ok", interpreted[name]

    @pytest.mark.parametrize("name", checks)
    @needs_gpu
    def on_gpu(name: str) -> None:
        checks[name]("cuda")

    return interpreted, in_interpreter, on_gpu


def run_in_interpreter(file: str, **environment: str) -> dict[str, str]:
    """Run a test file as a script, which prints what `run_checks` returns; that."""
    chosen = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(Path(file))]
    done = subprocess.run(
        command,
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, str] = json.loads(done.stdout)
    return outcome


def run_checks(checks: Mapping[str, Check], kernel: object) -> dict[str, str]:
    """Every check on CPU tensors, in the interpreter: its name and "ok" or the traceback.

    kernel: any that the checks call, to make sure that it is interpreted.
    """
    assert isinstance(kernel, triton.runtime.interpreter.InterpretedFunction)
    outcome = {}
    for name, check in checks.items():
        try:
            check("cpu")
            outcome[name] = "ok"
        except Exception:
            outcome[name] = traceback.format_exc()
    return outcome


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `step`, which is run before, so that its kernels are compiled."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def for_hopper(
    kernel: object, types: dict[str, str], constants: dict[str, object], warps: int, stages: int = 3
) -> Any:
    """A kernel for a Hopper GPU; none has to be there. Arguments not in `types` are fixed."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    signature = {name: types.get(name, "constexpr") for name in names}
    source = triton.compiler.ASTSource(kernel, signature, constants, {})
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def hopper_ptx(
    kernel: object, types: dict[str, str], constants: dict[str, object], warps: int
) -> str:
    """As `for_hopper`: its PTX."""
    ptx: str = for_hopper(kernel, types, constants, warps).asm["ptx"]
    return ptx
