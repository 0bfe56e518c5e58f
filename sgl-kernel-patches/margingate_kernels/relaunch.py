"""Launches of a Triton kernel that do not look up each time what was compiled for them.

Triton reads the arguments of every launch anew, and makes a text of them to find the compiled
kernel by. Behind each decode step that is time of the scheduler's thread. Here the compiled kernel
is kept with its constants, for arguments of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Relaunch:
    """A kernel with its constants, for arguments that Triton takes for the same each time: on one
    device, tensors of the same dtypes, and whole numbers that either all need 64 bits or none.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: Any) -> None:
        """
        Args:
            kernel: of `triton.jit`, whose constants are its last parameters; or its interpreter's.
            constants: by the names of these parameters, in their order.
            options: of Triton's launch, such as `num_warps`.

        Raises:
            TypeError: Triton compiles it anew for some values or addresses of its arguments, or
                the constants are others. Whole numbers must be in `do_not_specialize`; that a
                parameter is one is not seen here.
        """
        for each in getattr(kernel, "params", ()):
            fixed = each.do_not_specialize or each.do_not_specialize_on_alignment
            if not (each.is_constexpr or fixed):
                raise TypeError(
                    f"{each.name} is specialized by Triton: name it in do_not_specialize, or in "
                    "do_not_specialize_on_alignment."
                )
        ordered = list(kernel.arg_names[-len(constants) :])
        if ordered != list(constants):
            raise TypeError(f"constants are {list(constants)}; the kernel's are {ordered}.")
        self._kernel, self._constants, self._options = kernel, dict(constants), options
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the current device and stream, with all parameters but the constants."""
        if self._compiled is not None:
            self._compiled[grid](*args, *self._constants.values())
        else:  # what the interpreter returns is None
            self._compiled = self._kernel[grid](*args, **self._constants, **self._options)
