"""Programmatic launch: a kernel's programs start up while the kernel before it still runs.

They wait for its end before they touch memory, so that only the launch is hidden, and nothing is
read early. Hopper and later.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched so."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """Of a Triton launch, for a body that waits for the kernel before it."""
    overlap = can_overlap(device)
    return {"overlap": overlap, **({"launch_pdl": True} if overlap else {})}


@triton.jit
def wait_for_the_kernel_before(overlap: tl.constexpr) -> None:
    """Wait for its end, with all that it wrote."""
    if overlap:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_the_next_kernel_start(overlap: tl.constexpr) -> None:
    """As soon as all programs of this one have come here. Without it, as soon as they have ended.

    The next one's programs take room while they wait, so attention does without: 1 to 3 % faster.
    """
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
