"""What the probe found, kept between starts; redone for any other machine, model or version."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import margingate
from margingate.paths import cache_root
from margingate.runtime.compat.arguments import environment, settings, settings_table
from margingate.runtime.compat.process import machine, ranks
from margingate.runtime.probe.measuring.classes import Finding

logger = logging.getLogger(__name__)

SCHEMA = 15
LIBRARIES = (
    *("torch", "sglang", "triton", "flashinfer-python", "flashinfer-cubin", "sgl-deep-gemm"),
    *("sglang-kernel", "sglang-kernel-cpu", "quack-kernels", "tilelang"),
)
NVIDIA = "nvidia-"  # cuBLAS, cuDNN, NCCL and CUTLASS, whatever CUDA they are for


def identity(
    runner: Any,
    groups: Iterable[str],
    largest: int,
    prefill: Sequence[int] = (),
    graphs: Sequence[int] = (),
    *,
    busiest: int = 0,
) -> dict[str, Any]:
    """Everything that the findings depend on; builtins only.

    Args:
        graphs: rows of decode graphs.
        busiest: rows of the largest decode step, where plans depend on it.
    """
    return {
        "schema": SCHEMA,
        "operators": sorted(groups),
        "rows": largest,
        "prefill": list(prefill),
        "graphs": list(graphs),
        "busiest": busiest,
        "model": runner.model_config.model_path,
        "attention": type(runner.attn_backend).__name__,
        "device": machine.device_name(runner.device),
        "units": machine.arithmetic_units(runner.device),
        "threads": torch.get_num_threads(),
        "tensor_parallel": [ranks.tp_rank(), ranks.tp_size(runner)],
        "versions": {"margingate": margingate.__version__, "cuda": torch.version.cuda}
        | {name: machine.version(name) for name in LIBRARIES}
        | machine.versions(NVIDIA),
        "arithmetic": {
            "float32": torch.get_float32_matmul_precision(),
            "bf16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            "fp16": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        },
        "settings": settings_table.values(
            settings.view(runner.server_args), settings_table.names(settings_table.ARITHMETIC)
        ),
        "environment": environment.of_process(),
    }


def path(key: dict[str, Any]) -> Path:
    """One file a model, attention backend and rank: other versions and devices replace it."""
    chosen = [key[name] for name in ("model", "operators", "attention", "tensor_parallel")]
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]
    return cache_root() / "probe" / f"{digest}.json"


def load(key: dict[str, Any]) -> list[Finding] | None:
    """Findings made for exactly this identity; None, with a log line, for anything else."""
    file = path(key)
    try:
        record = json.loads(file.read_text())
        made_for = dict(record["identity"])
        same = made_for["schema"] == SCHEMA  # else records need not have what these have
        found = [Finding.from_record(entry) for entry in record["findings"]] if same else []
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("margingate: the probe is redone: %s is not readable (%s).", file, error)
        return None
    other = [name for name in key if made_for.get(name) != json.loads(json.dumps(key[name]))]
    if other:
        logger.info("margingate: the probe is redone: %s differ from %s.", ", ".join(other), file)
        return None
    return found


def save(key: dict[str, Any], findings: Sequence[Finding]) -> None:
    """Replace the file at once; a cache that cannot be written costs a log line, no more."""
    file = path(key)
    record = {"identity": key, "findings": [finding.record() for finding in findings]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            json.dump(record, out, indent=1)
        Path(out.name).replace(file)
    except OSError as error:
        logger.warning("margingate: the probe is not kept: %s cannot be written (%s).", file, error)
