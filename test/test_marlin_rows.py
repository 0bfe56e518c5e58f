"""Marlin's products of 17 to 64 rows in one tile with fewer: which calls, and when it is used."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
import torch
from sglang.srt.layers.quantization import marlin_utils

from margingate.runtime.compat.compute import marlin_rows
from margingate.runtime.compat.compute.marlin_rows import Form
from margingate.runtime.probe.operators import marlin_tiles
from margingate.runtime.probe.operators.observed_calls import ObservedCall
from margingate.runtime.probe.operators.operator import Packed

INPUTS, OUTPUTS, GROUPS = 256, 128, 2
AWQ = Form(torch.bfloat16, True, 8)
MARLIN = Path(sglang.__file__).parent / "kernels/jit/csrc/gemm/marlin"


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """No kernel is in use, here or afterwards."""
    monkeypatch.setattr(marlin_rows, "_compiled", {})
    monkeypatch.setattr(marlin_utils, "gptq_marlin_gemm", by_sglang, raising=False)
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def by_sglang(a: torch.Tensor, c: Any, *_args: Any, size_m: int, size_n: int, **_: Any) -> Any:
    """A sum in another order above 16 rows."""
    result = a.float().sum(1, keepdim=True) + (size_m > 16) * 2**-4
    return result.expand(-1, size_n).to(a.dtype)


class Kernel:
    """As SGLang's JIT loads one; adds in the order of few rows, where it is right."""

    def __init__(self, off: float = 0.0) -> None:
        self.off, self.seen = off, []

    def marlin_rows(self, rows, weight, scales, zeros, results, partial, locks) -> None:
        self.seen.append((len(rows), zeros.numel(), partial.numel()))
        results.copy_((rows.float().sum(1, keepdim=True) + self.off).expand_as(results))


def call(rows: int, zeros: bool = True, order: int = 0, fp32: bool = True, **more: int) -> Any:
    """As SGLang's apply_awq_marlin_linear."""
    a = torch.arange(rows * INPUTS).reshape(rows, INPUTS).bfloat16() / 512
    packed = torch.zeros(INPUTS // 16, OUTPUTS * more.pop("bits", 4) // 2, dtype=torch.int32)
    scales = torch.ones(GROUPS, OUTPUTS, dtype=torch.bfloat16)
    points = torch.zeros(GROUPS if zeros else 0, OUTPUTS // 8, dtype=torch.int32)
    named = torch.zeros(order, dtype=torch.int32)
    sizes = {"size_n": OUTPUTS, "size_k": INPUTS} | more
    return marlin_utils.gptq_marlin_gemm(
        *(a, None, packed, scales, None, points, named, named, torch.zeros(4), "uint4"),
        size_m=rows,
        **sizes,
        use_atomic_add=False,
        use_fp32_reduce=fp32,
        is_zp_float=False,
    )


def used(monkeypatch, kernel: Kernel, *forms: Form) -> None:
    monkeypatch.setattr(marlin_rows, "_compile", lambda _: kernel)
    marlin_rows.use(forms or (AWQ,))


def test_calls_of_17_to_64_rows_go_to_the_kernel(monkeypatch):
    kernel = Kernel()
    used(monkeypatch, kernel)
    marlin_rows.use([AWQ])
    assert not isinstance(marlin_utils.gptq_marlin_gemm._original, marlin_rows._Products), "once"
    for rows in (1, 16, 65, 128):
        assert call(rows).shape == (rows, OUTPUTS) and not kernel.seen
    for rows in (17, 64):
        few = torch.cat([by_sglang(one, None, size_m=1, size_n=OUTPUTS) for one in rows_of(rows)])
        assert torch.equal(call(rows), few)
    call(20, fp32=False)
    of_zeros = GROUPS * OUTPUTS // 8
    assert kernel.seen == [(n, of_zeros, 4 * 64 * 128) for n in (17, 64)] + [(20, of_zeros, 0)]
    marlin_rows.give_up()
    call(17)
    assert len(kernel.seen) == 3


def rows_of(count: int) -> Any:
    return (torch.arange(count * INPUTS).reshape(count, INPUTS).bfloat16() / 512).split(1)


@pytest.mark.parametrize(
    "other",
    [
        *({"zeros": False}, {"order": INPUTS}, {"bits": 8}, {"size_n": OUTPUTS + 64}),
        {"size_k": INPUTS * 2},
    ],
)
def test_calls_of_another_form_stay_with_sglang(monkeypatch, other):
    kernel = Kernel()
    used(monkeypatch, kernel)
    call(32, **other)
    assert not kernel.seen


def operator(group: int = 128, outputs: int = OUTPUTS) -> Packed:
    weights = SimpleNamespace(
        qweight=torch.zeros(INPUTS // 16, outputs * 2, dtype=torch.int32),
        scales=torch.ones(INPUTS // group, outputs, dtype=torch.bfloat16),
        qzeros=torch.zeros(INPUTS // group, outputs // 8, dtype=torch.int32),
        scheme=SimpleNamespace(quant_config="4 bits"),
        output_size_per_partition=outputs,
        input_size_per_partition=INPUTS,
    )

    def apply(_layer: Any, x: torch.Tensor, _bias: Any) -> torch.Tensor:
        sizes = {"size_m": len(x), "size_n": outputs, "size_k": INPUTS}
        zeros, order = weights.qzeros, torch.zeros(0)
        return marlin_utils.gptq_marlin_gemm(
            *(x, None, weights.qweight, weights.scales, None, zeros, order, order, order, "uint4"),
            **sizes,
            use_fp32_reduce=True,
        )

    weights.quant_method = SimpleNamespace(apply=apply)
    return Packed("o_proj", weights, ObservedCall(width=INPUTS))


def test_the_form_is_that_of_whole_tiles_and_groups_that_have_code():
    assert marlin_rows.form_of(operator().module) == AWQ
    assert marlin_rows.form_of(operator(group=64).module) == Form(torch.bfloat16, True, 4)
    assert marlin_rows.form_of(operator(group=256).module) is None, "one group"
    assert marlin_rows.form_of(operator(group=16).module) is None
    assert marlin_rows.form_of(operator(outputs=OUTPUTS + 64).module) is None


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(Kernel(), ""), (Kernel(off=0.5), "o_proj has other bits in it"), (None, "no compiler")],
)
def test_it_is_used_where_it_compiles_and_is_right(monkeypatch, caplog, kernel, said):
    def compiled(_form: Form) -> Kernel:
        if kernel is None:
            raise RuntimeError("no compiler\nand more")
        return kernel

    monkeypatch.setattr(marlin_rows, "_compile", compiled)
    monkeypatch.setattr(Packed, "device", torch.device("cuda"))
    monkeypatch.setattr(Packed, "sample", sample)
    monkeypatch.setattr(marlin_tiles.ranks, "of_all", lambda value: [value])
    same = [operator()]
    before = same[0].signature
    assert marlin_tiles.settle({"o": same}) is not bool(said)
    assert bool(marlin_rows._compiled) is not bool(said)
    assert (same[0].signature == before) is bool(said), "what is kept of others is not taken"
    assert [f"is not used: {said}." in message for message in caplog.messages] == [True] * bool(
        said
    )


def sample(_self: Any, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 9, (rows, INPUTS), generator=generator).bfloat16() / 8


def test_others_are_left_alone(monkeypatch):
    assert not marlin_tiles.settle({"o": [operator()]}), "on a CPU"
    monkeypatch.setattr(Packed, "device", torch.device("cuda"))
    assert not marlin_tiles.settle({"o": [operator(group=256)], "n": [SimpleNamespace()]})


def test_sglangs_kernel_takes_what_ours_gives_it():
    """The template's parameters, and the arguments of its launch, by name and in order."""
    template = (MARLIN / "kernel.h").read_text()
    (parameters,) = re.findall(r"#define MARLIN_KERNEL_PARAMS(.*?)\n\n", template, re.S)
    names = re.findall(r"(\w+)\s*(?:,|$)", parameters.replace("\\", " "))
    assert names == [
        *("A", "B", "C", "C_tmp", "scales_ptr", "scale2_ptr", "zp_ptr", "g_idx", "num_groups"),
        *("prob_m", "prob_n", "prob_k", "lda", "locks", "use_atomic_add", "use_fp32_reduce"),
        "max_shared_mem",
    ]
    (kinds,) = re.findall(r"template <([^<]*?)>\n__global__ void Marlin", template)
    assert re.findall(r"(\w+)\s*(?:,|$)", re.sub(r"//.*", "", kinds).strip()) == [
        *("scalar_t", "w_type_id", "threads", "thread_m_blocks", "thread_n_blocks"),
        *("thread_k_blocks", "m_block_size_8", "stages", "group_blocks", "is_zp_float"),
    ]
    whole = (MARLIN / "gptq_marlin.cuh").read_text()
    small = whole[whole.index("small_batch_thread_configs[]") :].partition(";")[0]
    first = re.search(r"\{\s*(\d+),\s*(\d+),\s*(\d+)\}", small)
    assert first and first.groups() == ("128", "128", "256"), "SGLang's tile of up to 16 rows"
