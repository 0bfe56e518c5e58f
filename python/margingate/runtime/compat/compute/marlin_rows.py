"""Marlin's products of 17 to 64 rows in the tile that SGLang has for up to 16.

SGLang's Marlin takes another tile above 16 rows, which cuts the sums over inputs elsewhere. The
kernel is a template of the tile; here it is compiled, by SGLang's JIT and of SGLang's headers, for
more rows in the tile of few (`margingate_kernels/csrc/marlin_rows.cuh`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import margingate_kernels
from margingate.runtime.compat.compute import marlin
from margingate.runtime.compat.instance_patches import (
    ON_MARLIN_LAYERS,
    in_module,
    replace_in_module,
)

FEWEST, MOST = 17, 64  # rows of such a product
TILE = 128  # outputs and inputs; SGLang's first choice for few rows of a layer of whole tiles
GROUPS = (2, 4, 8)  # blocks of 16 inputs that share scales, of which SGLang's headers have code
BITS = 4  # of a weight; those of 8 bits in this tile do not fit into an SM's shared memory

_SOURCE = Path(margingate_kernels.__file__).parent / "csrc" / "marlin_rows.cuh"


@dataclass(frozen=True)
class Form:
    """What the kernel is compiled for."""

    dtype: torch.dtype  # of rows, scales and results
    has_zeros: bool
    group: int  # blocks of 16 inputs


_compiled: dict[Form, Any] = {}  # in use


def form_of(layer: Any) -> Form | None:
    """That of a layer which SGLang's Marlin may multiply by in this tile; None: it does not."""
    weights = marlin.weights(layer)
    if weights is None:
        return None
    scales, has_zeros = weights.scales, weights.zeros is not None
    return _form(weights.bits, marlin.shape(layer), scales.dtype, len(scales), has_zeros)


def serves(layer: Any) -> bool:
    """Whether such products of a layer are made by this kernel now."""
    return bool(_compiled) and form_of(layer) in _compiled  # else a layer may not be repacked yet


def use(forms: Iterable[Form]) -> None:
    """Compile the kernel where that was not done yet, and make all such products by it from now on.

    Raises:
        RuntimeError: it does not compile, or this SGLang has no such headers.
    """
    for form in forms:
        _compiled[form] = _compile(form)
    products = in_module(ON_MARLIN_LAYERS)
    if not isinstance(products, _Products):
        replace_in_module(ON_MARLIN_LAYERS, _Products(products))


def give_up() -> None:
    """Leave all products to SGLang's kernel again."""
    _compiled.clear()


def _compile(form: Form) -> Any:
    from sglang.kernels.jit.utils import load_jit, make_cpp_args
    from sglang.kernels.jit.utils.compile import KERNEL_PATH

    dtype, kind = make_cpp_args(form.dtype), "kU4" if form.has_zeros else "kU4B8"
    of = f"{dtype}, sglang::host::{kind}.id(), {form.group}"
    return load_jit(
        *("margingate_marlin_rows", *dtype, kind, str(form.group)),
        cuda_files=[str(_SOURCE)],
        cuda_wrappers=[("marlin_rows", f"margingate::marlin_rows<{of}>")],
        extra_include_paths=[str(KERNEL_PATH / "csrc")],
    )


class _Products:
    """In the place of SGLang's function: products of such rows by the kernel, others as ever."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __call__(self, a: torch.Tensor, c: Any, *args: Any, size_m: int, **more: Any) -> Any:
        kernel = None
        if _compiled and FEWEST <= size_m <= MOST and not more.get("is_zp_float"):
            form = _form_of_call(a, *args, **more)
            kernel = None if form is None else _compiled.get(form)
        if kernel is None:
            return self._original(a, c, *args, size_m=size_m, **more)
        weight, scales, _, zeros, _, _, locks, *_ = args
        results = a.new_empty(size_m, more["size_n"]) if c is None else c
        blocks = torch.cuda.get_device_properties(a.device).multi_processor_count
        partial = blocks * MOST * TILE if more["use_fp32_reduce"] else 0
        kernel.marlin_rows(
            *(a, weight, scales, a.new_empty(0) if zeros is None else zeros, results),
            *(a.new_empty(partial, dtype=torch.float32), locks),
        )
        return results


def _form_of_call(
    a: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    _global_scale: Any,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    *_others: Any,
    size_n: int,
    size_k: int,
    **_more: Any,
) -> Form | None:
    """As `form_of` of the layer that made it."""
    if order is not None and order.numel():
        return None
    bits = weight.numel() * 32 // (size_n * size_k)
    has_zeros = zeros is not None and zeros.numel() > 0
    return _form(bits, (size_n, size_k), a.dtype, len(scales), has_zeros)


def _form(
    bits: int, shape: tuple[int, int], dtype: torch.dtype, groups: int, has_zeros: bool
) -> Form | None:
    """Of weights of this shape, [outputs, inputs], whose inputs share scales in so many groups."""
    outputs, inputs = shape
    if bits != BITS or outputs % TILE or inputs % TILE or groups < 2:
        return None
    form = Form(dtype, has_zeros, inputs // groups // 16)
    return form if form.group in GROUPS else None
