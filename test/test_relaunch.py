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

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> Any:
            its = dict(zip(self.arg_names, args, strict=False))
            its |= {name: named[name] for name in self.arg_names if name in named}
            self.calls.append(("Triton", grid, [its[name] for name in self.arg_names]))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any) -> None:
            self._kernel.calls.append(("again", grid, list(args)))

        return launch


def test_a_second_launch_hands_over_what_triton_would() -> None:
    kernel, x = Kernel(["x", "stride", "width", "overlap"]), torch.zeros(4)
    launch = Relaunch(kernel, {"width": 8, "overlap": True}, num_warps=4)
    for rows in (1, 3):
        launch((rows, 1, 1), x, 5)
    (how, grid, values), (again, other, same) = kernel.calls
    assert (how, again) == ("Triton", "again")
    assert (grid, other) == ((1, 1, 1), (3, 1, 1))
    assert values == same == [x, 5, 8, True]


def test_constants_out_of_order_are_refused() -> None:
    with pytest.raises(TypeError, match="the kernel's are"):
        Relaunch(Kernel(["x", "width", "overlap"]), {"overlap": True, "width": 8})


def test_an_argument_that_triton_specializes_is_refused() -> None:
    @triton.jit
    def kernel(x: tl.tensor, width: tl.constexpr) -> None:
        tl.store(x, width)

    with pytest.raises(TypeError, match="x is specialized"):
        Relaunch(kernel, {"width": 1})


@pytest.fixture
def kernels(monkeypatch):
    """Those of top-2, which launch nothing."""
    made = {}
    for name in ("scan_parts", "merge_parts"):
        made[name] = Kernel(getattr(top2_triton, name).arg_names)
        monkeypatch.setattr(top2_triton, name, made[name])
    top2_triton._launches.cache_clear()
    yield made
    top2_triton._launches.cache_clear()


def test_the_top2_kernels_are_launched_again_as_at_first(kernels) -> None:
    out, workspace = empty_top2(3, "cpu"), top2_workspace(3, 4096, "cpu")
    logits = torch.zeros(3, 4096, dtype=torch.bfloat16)
    for _ in range(2):
        launch_top2(logits, out, workspace, 4096)
    for kernel in kernels.values():
        first, second = kernel.calls
        assert (first[0], second[0]) == ("Triton", "again") and first[1] == second[1]
        assert all(a is b or a == b for a, b in zip(first[2], second[2], strict=True))


def test_logits_of_another_form_are_not_launched_as_before(kernels) -> None:
    """Each differs from the others in what Triton compiles a kernel for."""
    wide = torch.zeros(3, 8192, dtype=torch.bfloat16)
    usual = wide[:, :4096]
    far = wide[:1].as_strided((1, 4096), (2**31, 1))
    for logits in (usual, wide[:, 1:4097], wide, usual.float(), far):
        launch_top2(logits, None, None, 4096)
    launch_top2(usual, None, None, 4095)
    for kernel in kernels.values():
        assert [how for how, *_ in kernel.calls] == ["Triton"] * 6
    launch_top2(usual[:2], None, None, 4096)
    for kernel in kernels.values():
        assert kernel.calls[-1][0] == "again", "fewer rows are another grid alone"
