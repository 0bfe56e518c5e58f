"""`unpack_marlin` held to SGLang's own packers, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from typing import Any

import pytest
import torch
from jit_bodies import checks_in, hopper_ptx, jit_tests, run_checks

from margingate_kernels.marlin_weights import MarlinWeights, unpack_marlin
from margingate_kernels.marlin_weights_triton import unpack_kernel

# inputs, outputs, inputs of a group. The interpreter rounds to bfloat16 otherwise: float16.
SHAPES = [(256, 128, 64), (384, 192, 128), (128, 64, 32), (160, 64, 32)]


def packers() -> Any:
    """SGLang's, which ask for nothing of its compiled kernels but names of number types."""
    if "sgl_kernel" not in sys.modules:
        found = importlib.util.find_spec("sgl_kernel")
        assert found is not None
        module = types.ModuleType("sgl_kernel")
        module.__path__ = list(found.submodule_search_locations or ())
        module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
        sys.modules["sgl_kernel"] = module
    from sglang.test import test_marlin_utils

    return test_marlin_utils


def compare(device: str, name: str, zeros: bool) -> None:
    made = packers()
    from sgl_kernel.scalar_type import scalar_types

    kind = getattr(scalar_types, name)
    for inputs, outputs, group in SHAPES:
        torch.manual_seed(inputs + outputs)
        weight = torch.randn(inputs, outputs).half()
        if zeros:
            exact, packed, scales, points = made.awq_marlin_quantize(weight, kind, group)
        else:
            exact, packed, scales, *_ = made.marlin_quantize(weight, kind, group, False)
            points = None
        parts = [None if each is None else each.to(device) for each in (packed, scales, points)]
        found = unpack_marlin(MarlinWeights(*parts, kind.size_bits))
        assert found.dtype == torch.float16 and found.is_contiguous()
        assert torch.equal(found.cpu(), exact.T), (inputs, outputs, group)


def check_four_bits(device: str) -> None:
    compare(device, "uint4b8", zeros=False)


def check_four_bits_with_zero_points(device: str) -> None:
    compare(device, "uint4", zeros=True)


def check_eight_bits(device: str) -> None:
    compare(device, "uint8b128", zeros=False)


def check_eight_bits_with_zero_points(device: str) -> None:
    compare(device, "uint8", zeros=True)


CHECKS = checks_in(globals())
interpreted, test_in_interpreter, test_on_gpu = jit_tests(CHECKS, __file__)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_compiles_for_hopper(bits):
    pointers = {"packed": "*i32", "scales": "*bf16", "zeros": "*i32", "out": "*bf16"}
    sizes = {"inputs": "i32", "outputs": "i32"}
    constants = {"of_group": 128, "bits": bits, "has_zeros": True, "block": 64}
    assert "st.global" in hopper_ptx(unpack_kernel, pointers | sizes, constants, 4)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"bits": 3}, "4 or 8 bits, not 3"),
        ({"packed": torch.zeros(8, 128)}, "packed weights are int32"),
        ({"scales": torch.zeros(2, 64)}, "scales bfloat16 or float16"),
        ({"scales": torch.zeros(1, 64).half()}, "two groups of inputs or more"),
        ({"scales": torch.zeros(3, 64).half()}, "do not fit"),
        ({"packed": torch.zeros(8, 64, dtype=torch.int32)}, "do not fit"),
        ({"zeros": torch.zeros(2, 16, dtype=torch.int32)}, "zero points are int32"),
    ],
)
def test_what_does_not_fit_is_named(change, error):
    fitting = {"packed": torch.zeros(8, 128, dtype=torch.int32)}
    fitting |= {"scales": torch.zeros(2, 64).half(), "zeros": None, "bits": 4}
    with pytest.raises((TypeError, ValueError), match=error):
        unpack_marlin(MarlinWeights(**{**fitting, **change}))


if __name__ == "__main__":
    print(json.dumps(run_checks(CHECKS, unpack_kernel)))
