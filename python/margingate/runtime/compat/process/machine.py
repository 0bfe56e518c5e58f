"""What a measurement was made on, and whether it holds here."""

from __future__ import annotations

import ctypes
import platform
import re
from functools import cache
from importlib import metadata
from typing import Any

import torch

from margingate.processor import CPUINFO, cpu_name
from margingate.runtime.compat import release
from margingate.runtime.compat.arguments import settings


@cache
def device_name(device: str) -> str:
    """The GPU's name and capability, or the CPU's name and instruction set."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"
    return f"{cpu_name() or 'CPU'} {torch.backends.cpu.get_cpu_capability()}"


_INSTRUCTIONS = re.compile(r"(s?sse|avx|amx|fma|f16c|bmi|asimd|sve|sme(?!p)|fphp|bf16|i8mm)\w*|fp")
_BLOCKS = ("cache size", "cpu family", "model", "CPU part")  # what libraries cut matrices by


@cache
def arithmetic_units(device: str) -> dict[str, Any]:
    """What chooses kernels besides the device's name, which on a virtual machine says little.

    Of a CPU its instructions and cache; of a GPU its multiprocessors (MIG leaves some) and driver.
    """
    if device != "cpu":
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {"multiprocessors": found.multi_processor_count, "driver": _driver()}
    return units_of(CPUINFO.read_text() if CPUINFO.exists() else "")


def _driver() -> int | None:
    """The newest CUDA that the driver runs, as 12080 for 12.8; None where it does not say."""
    found = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return None if status else found.value


def units_of(cpuinfo: str) -> dict[str, Any]:
    """`arithmetic_units` of the first CPU in a text like /proc/cpuinfo's."""
    first = cpuinfo.partition("\n\n")[0].splitlines()
    entries = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in first)}
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    instructions = sorted(flag for flag in flags if _INSTRUCTIONS.fullmatch(flag))
    return {"instructions": " ".join(instructions)} | {
        name: entries[name] for name in _BLOCKS if name in entries
    }


@cache
def versions(*prefixes: str) -> dict[str, str]:
    """Of all installed distributions whose names begin so."""
    found = ((each.metadata["Name"] or "", each.version) for each in metadata.distributions())
    return {name: version for name, version in sorted(found) if name.startswith(prefixes)}


@cache
def version(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def interpreter() -> dict[str, str]:
    """Python, which searches stop expressions, and the C library, which `math` computes by."""
    return {"python": platform.python_version(), "libc": " ".join(platform.libc_ver())}


def is_confidential() -> bool:
    """Whether SGLang serves in confidential computing mode, which it asks the driver for once."""
    return release.of_release("is_confidential", _is_confidential)()


def _is_confidential() -> bool:
    from sglang.srt.utils.common import is_confidential_compute

    return bool(is_confidential_compute())


def describe(server_args: Any) -> dict[str, str]:
    """What margins depend on, of arguments that SGLang has resolved."""
    args = settings.view(server_args)
    dtype = str(settings.model_config(server_args).dtype)
    return {
        "device": device_name(args.device),
        "dtype": dtype,
        "lm_head": "torch.float32" if args.enable_fp32_lm_head else dtype,
        "attention": " ".join(map(str, settings.attention_backends(server_args))),
        "tensor_parallel": str(args.tp_size),
        "torch": str(version("torch")),
        "sglang": str(version("sglang")),
    }
