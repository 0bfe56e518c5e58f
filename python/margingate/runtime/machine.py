"""What a measurement was made on, and whether it holds here."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@cache
def device_name(device: str) -> str:
    """The GPU's name and capability, or the CPU's name and instruction set."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'} {torch.backends.cpu.get_cpu_capability()}"


@cache
def version(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe(server_args: Any) -> dict[str, str]:
    """What margins depend on, of arguments that SGLang has resolved."""
    dtype = str(server_args.get_model_config().dtype)
    return {
        "device": device_name(server_args.device),
        "dtype": dtype,
        "lm_head": "torch.float32" if server_args.enable_fp32_lm_head else dtype,
        "attention": " ".join(map(str, server_args.get_attention_backends())),
        "tensor_parallel": str(server_args.tp_size),
        "torch": str(version("torch")),
        "sglang": str(version("sglang")),
    }
