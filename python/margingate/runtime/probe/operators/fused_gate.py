"""SGLang's kernel for the gate of a shared expert, which reads the gate's weight and not the layer.

It multiplies rows by the gate, and adds the shared expert's rows, as much as that says, to those of
the experts. It is called by the name that the module of Qwen's blocks has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from margingate.runtime.compat.instance_patches import ON_SHARED_GATES, module_of

# hidden [n, h], weight [h], shared expert's rows [n, h], experts' rows [n, h], which it adds to
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def kernel() -> Kernel:
    """What is called now."""
    found: Kernel = getattr(module_of(ON_SHARED_GATES), ON_SHARED_GATES.name)
    return found


def replace_kernel(function: Kernel) -> None:
    """Have this called in its place, in all models of the process."""
    setattr(module_of(ON_SHARED_GATES), ON_SHARED_GATES.name, function)


@contextmanager
def replaced(function: Kernel) -> Iterator[None]:
    """As `replace_kernel`, meanwhile."""
    before = kernel()
    replace_kernel(function)
    try:
        yield
    finally:
        replace_kernel(before)


def gates(model: Any) -> dict[int, Any]:
    """The gates that the kernel may be given, by the address of their weights."""
    found = (getattr(module, "shared_expert_gate", None) for module in model.modules())
    return {gate.weight.data_ptr(): gate for gate in found if isinstance(gate, torch.nn.Linear)}
