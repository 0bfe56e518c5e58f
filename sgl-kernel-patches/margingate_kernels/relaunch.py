"""Launches of a Triton kernel that do not look up each time what was compiled for them.

Triton reads the arguments of every launch anew, and makes a text of them to find the compiled
kernel by. For the two kernels behind each decode step that takes the scheduler's thread longer than
all else that the gate does there. Here the compiled kernel is kept, under less to compare.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

_INT32 = range(-(2**31), 2**31)  # Triton takes whole numbers outside of it as 64 bits wide


class Relaunch:
    """One kernel. Its arguments must not be specialized, by value or by address."""

    def __init__(self, kernel: Any) -> None:
        """
        Args:
            kernel: of `triton.jit`, whose constants are its last parameters; or its interpreter's.

        Raises:
            TypeError: Triton compiles it anew for some values or addresses.
        """
        for each in getattr(kernel, "params", ()):
            fixed = each.do_not_specialize or each.do_not_specialize_on_alignment
            if not (each.is_constexpr or fixed):
                raise TypeError(
                    f"{each.name} is specialized by Triton: name it in do_not_specialize, or in "
                    "do_not_specialize_on_alignment."
                )
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constants: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """Launch on the current device and stream.

        Args:
            grid: programs along up to three axes.
            args: tensors on that device, and whole numbers: all parameters but the constants.
            constants: by the names of the parameters that are constants.
            options: of Triton's launch, such as `num_warps`.
        """
        grid = (*grid, 1, 1)[:3]
        key = (
            torch.cuda.current_device() if args[0].is_cuda else -1,
            *[each in _INT32 if isinstance(each, int) else each.dtype for each in args],
            *constants.values(),
            *constants,
            *options.values(),
        )
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*args, *constants.values())
            return
        ordered = list(self._kernel.arg_names[len(args) :])
        if ordered != list(constants):
            raise TypeError(f"constants are {list(constants)}; the kernel's order is {ordered}.")
        compiled = self._kernel[grid](*args, **constants, **options)
        if compiled is not None:  # None: Triton's interpreter
            self._compiled[key] = compiled
