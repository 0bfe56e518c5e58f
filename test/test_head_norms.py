"""Norms of Gemma 3's heads: as rows [n, size] in any layout, which SGLang's own kernel takes."""

import inspect

import pytest
import torch
from sglang.srt.layers.layernorm import Gemma3RMSNorm

from margingate.runtime.compat.compute import head_norms

SIZE = 256


class Kernel:
    """In the place of SGLang's method: rows go to a kernel here, and other inputs may not come."""

    def __init__(self) -> None:
        self.norm = Gemma3RMSNorm(SIZE)
        self.norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, norm, x, residual=None):
        assert norm is self.norm
        self.shapes.append(tuple(x.shape))
        return self.norm.forward_native(x, residual)


def heads(rows: int, count: int) -> torch.Tensor:
    """[rows, count, SIZE], a part of wider rows, as SGLang splits queries, keys and values."""
    wide = torch.randn(rows, (count + 2) * SIZE, generator=torch.Generator().manual_seed(rows))
    return wide[:, : count * SIZE].unflatten(-1, (count, SIZE))


@pytest.mark.parametrize("rows", (1, 2, 7))
@pytest.mark.parametrize("count", (1, 4))
def test_heads_are_rows(rows, count):
    kernel, x = Kernel(), heads(rows, count)
    found = head_norms.forward_rows(kernel, kernel.norm, x)
    assert kernel.shapes == [(rows * count, SIZE)]
    assert found.shape == x.shape
    torch.testing.assert_close(found, kernel.norm.forward_native(x))


def test_rows_and_residuals_stay_as_they_are():
    kernel, x = Kernel(), torch.randn(3, SIZE)
    head_norms.forward_rows(kernel, kernel.norm, x)
    out, residual = head_norms.forward_rows(kernel, kernel.norm, x, torch.ones_like(x))
    assert kernel.shapes == [(3, SIZE), (3, SIZE)]
    torch.testing.assert_close(residual, x + 1)
    assert out.shape == x.shape


def test_sglang_takes_its_kernel_for_rows_alone():
    """What the hook rests on: two axes go to the kernel, others to torch operators."""
    source = inspect.getsource(inspect.unwrap(Gemma3RMSNorm.forward_cuda))
    assert "x.dim() == 2" in source
    assert "gemma_rmsnorm(x" in source
