"""A Triton kernel is launched as it was compiled: the same arguments, and never another's."""

from typing import Any, cast

import pytest
import torch
import triton
import triton.language as tl

from margingate_kernels import empty_top2, top2_triton, top2_workspace
from margingate_kernels.relaunch import Relaunch
from margingate_kernels.top2 import launch_top2


class Kernel:
    """Stands in for one of Triton's: `calls` has how each launch was made, and with what."""

    def __init__(self, arg_names: list[str]) -> None:
        self.arg_names, self.calls = arg_names, cast(list[Any], [])
        self.compiled = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> Any:
            its = dict(zip(self.arg_names, args, strict=False))
            its |= {name: named[name] for name in self.arg_names if name in named}
            self.compiled += 1
            number = self.compiled
            self.calls.append(("Triton", grid, [its[name] for name in self.arg_names], number))
            return _Compiled(self, number)

        return launch


class _Compiled:
    def __init__(self, kernel: Kernel, number: int) -> None:
        self._kernel, self._number = kernel, number

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any) -> None:
            self._kernel.calls.append(("again", grid, list(args), self._number))

        return launch


def test_a_second_launch_hands_over_what_triton_would() -> None:
    kernel = Kernel(["x", "stride", "width", "overlap"])
    launch, x = Relaunch(kernel), torch.zeros(4)
    constants = {"width": 8, "overlap": True}
    for rows in (1, 3):
        launch((rows,), (x, 5), constants, num_warps=4)
    (how, grid, values, _), (again, other, same, number) = kernel.calls
    assert (how, again, number) == ("Triton", "again", 1)
    assert (grid, other) == ((1, 1, 1), (3, 1, 1))
    assert values == same == [x, 5, 8, True]


@pytest.mark.parametrize(
    ("stride", "dtype", "width", "warps"),
    [
        (2**31, torch.float32, 8, 4),
        (5, torch.bfloat16, 8, 4),
        (5, torch.float32, 16, 4),
        (5, torch.float32, 8, 8),
    ],
)
def test_what_triton_compiles_anew_is_not_launched_as_before(stride, dtype, width, warps) -> None:
    kernel = Kernel(["x", "stride", "width"])
    launch = Relaunch(kernel)
    launch((1,), (torch.zeros(4), 5), {"width": 8}, num_warps=4)
    launch((1,), (torch.zeros(4, dtype=dtype), stride), {"width": width}, num_warps=warps)
    assert [how for how, *_ in kernel.calls] == ["Triton", "Triton"]
    launch((1,), (torch.zeros(9), 6), {"width": 8}, num_warps=4)
    assert kernel.calls[-1][0] == "again" and kernel.calls[-1][3] == 1


def test_constants_out_of_order_are_refused() -> None:
    launch = Relaunch(Kernel(["x", "width", "overlap"]))
    with pytest.raises(TypeError, match="order"):
        launch((1,), (torch.zeros(4),), {"overlap": True, "width": 8})


def test_an_argument_that_triton_specializes_is_refused() -> None:
    @triton.jit
    def kernel(x: tl.tensor, width: tl.constexpr) -> None:
        tl.store(x, width)

    with pytest.raises(TypeError, match="x is specialized"):
        Relaunch(kernel)


def test_the_top2_kernels_are_launched_again_as_at_first(monkeypatch) -> None:
    kernels = [Kernel(each.arg_names) for each in (top2_triton.scan_parts, top2_triton.merge_parts)]
    for name, kernel in zip(("_scan", "_merge"), kernels, strict=True):
        monkeypatch.setattr(top2_triton, name, Relaunch(kernel))
    out, workspace = empty_top2(3, "cpu"), top2_workspace(3, 4096, "cpu")
    logits = torch.zeros(3, 4096, dtype=torch.bfloat16)
    for _ in range(2):
        launch_top2(logits, out, workspace, 4096)
    for kernel in kernels:
        first, second = kernel.calls
        assert (first[0], second[0]) == ("Triton", "again")
        assert first[1] == second[1]
        assert all(a is b or a == b for a, b in zip(first[2], second[2], strict=True))
    launch_top2(logits[:, 1:], out, workspace, 4095)  # another alignment: other constants
    assert [kernel.calls[-1][0] for kernel in kernels] == ["Triton", "Triton"]
