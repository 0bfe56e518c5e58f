"""Environment variables that may choose kernels, or what SGLang makes of a request.

Nobody can list them all, so every variable of these families counts, but for those whose names say
that they place files and processes, or only speak to the log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache

from margingate.config import GateError

FAMILIES = (
    *("ATEN_", "DNNL_", "ONEDNN_", "MKL_", "MKLDNN_", "OMP_", "KMP_", "GOMP_", "OPENBLAS_"),
    *("TORCH", "PYTORCH_", "AT_", "C10_", "TRITON_", "HELION_", "TILELANG_", "TL_"),
    *("CUBLAS", "CUDNN_", "CUTLASS_", "CUTE_", "CUDA_", "NVIDIA_", "NVTE_", "NCCL_", "NVSHMEM_"),
    *("FLASHINFER_", "TRTLLM_", "DG_", "DEEP_GEMM_", "DISABLE_ADDMM", "USE_TRITON_", "QUACK_"),
    *("SGLANG_", "SGL_", "SYNC_TOKEN_IDS_ACROSS_TP", "XGRAMMAR_", "LLGUIDANCE_", "OUTLINES_"),
    *("AITER_", "ROCM_", "HIP_", "HSA_", "MIOPEN_", "LD_PRELOAD"),
    *("MARGINGATE_",),
    *("BLIS_", "GOTO_", "NPY_", "GLIBC_TUNABLES"),  # these last two choose code by the processor
)

# Reason -> names, as expressions for the whole name.
WITHOUT_EFFECT = {
    "places files": r".*_(DIRS?|DIRECTORY|PATHS?|LIBS?|HOME|ROOT|FILE|CACHE|WORKSPACE_BASE)",
    "only speaks to the log, or profiles": r"(SGLANG|SGL|NCCL|TORCH|CUTE_DSL|TRITON|FLASHINFER|DG)"
    r"_(\w+_)?(LOG|LOGS|LOGGING|LOGLEVEL|PROFILE|PROFILER|TRACE|VERBOSE)(_\w+)?"
    r"|(MKL|DNNL|ONEDNN|OMP)_(VERBOSE|DISPLAY_ENV|PROFILE\w*)|NCCL_DEBUG(_SUBSYS)?"
    r"|SGLANG_IS_IN_CI(_AMD)?|TORCH_SHOW_CPP_STACKTRACES|TORCH_DISABLE_ADDR2LINE",
    "another in every start": r"SGLANG_RUN_ID|TORCHELASTIC_\w+",
    "says which device, whose name counts": r"(CUDA|NVIDIA|HIP)_VISIBLE_DEVICES|CUDA_DEVICE_ORDER"
    r"|SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS|NVIDIA_DRIVER_CAPABILITIES|NVIDIA_REQUIRE_\w+",
    "says what an image holds, whose libraries count": r"(CUDA|CUDNN|NCCL|NVIDIA|TORCH|PYTORCH)"
    r"_(\w+_)?VERSION|NVIDIA_PRODUCT_NAME|TORCH_CUDA_ARCH_LIST|FLASHINFER_CUDA_ARCH_LIST",
    "how processes find each other and how long they wait": r"SGLANG_(\w+_)?(PORT|PORT_BASE|HOST|"
    r"HOST_IP|TIMEOUT|TIMEOUT_SECS|INTERVAL|INTERVAL_S)|NCCL_SOCKET_IFNAME|SGLANG_TCP_STORE_PORT",
    "how idle threads wait": r"OMP_WAIT_POLICY|KMP_BLOCKTIME|GOMP_SPINCOUNT",
    "how dumps are made": r"SGLANG_(CUDA_COREDUMP|PYSPY_DUMP)\w*|CUDA_(\w+_)?COREDUMP\w*",
    "how forwards are scheduled": r"SGLANG_(TEST_RETRACT|RETRACT_DECODE|SCHEDULER_|INIT_NEW_TOKEN|"
    r"MIN_NEW_TOKEN_RATIO|NEW_TOKEN_RATIO|CLIP_MAX_NEW_TOKENS|PREFILL_DELAYER_)\w*",
}
_SKIPPED = re.compile("|".join(f"(?:{names})" for names in WITHOUT_EFFECT.values()))


def counts(name: str) -> bool:
    """Whether a variable of this name may change an answer."""
    return name.startswith(FAMILIES) and not _SKIPPED.fullmatch(name)


def chosen(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that count, by name; of this process, now."""
    return {name: environment[name] for name in sorted(environment) if counts(name)}


@cache
def of_process() -> dict[str, str]:
    """`chosen`, as it was when this was first asked: before the gate measures anything.

    Libraries that measuring loads set variables of their own, and a start that reads a kept probe
    does not load them.
    """
    return chosen()


def choice(name: str, values: Sequence[str]) -> str:
    """The value of one of the gate's own variables, which are for benchmarks; the first if unset.

    Raises:
        GateError: it is set to something else.
    """
    found = os.environ.get(name, values[0])
    if found not in values:
        raise GateError(f"{name} is {found}: set it to one of {', '.join(values)}, or unset it.")
    return found
