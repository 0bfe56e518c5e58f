"""Each quantization method and scheme of SGLang is measured by an operator, or refused by name."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt
import torch
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A16Nvfp4MoE,
)
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

from margingate.config import GateError
from margingate.runtime.compat import release
from margingate.runtime.compat.compute import schemes
from margingate.runtime.probe.checks import loaded_model

ROOTS = frozenset({"QuantizeMethodBase", "BaseLinearScheme", "BaseMoEScheme"})
MARKS = ("Method", "Scheme", "process_weights_after_loading")  # in the text of a file with one
PROCESSES = "process_weights_after_loading"  # what one without such a base has

# By the operator of the probe that measures what they compute (`operators`, `routed`, `scored`).
MEASURED = {
    "Linear": {"UnquantizedLinearMethod"},
    "Quantized": {"Fp8LinearMethod", "W8A8Fp8LinearMethod", "CompressedTensorsW8A8Fp8"},
    "Packed": {"AWQMarlinLinearScheme", "GPTQMarlinLinearScheme", "CompressedTensorsWNA16"},
    "Experts": {
        *("UnquantizedFusedMoEMethod", "Fp8MoEMethod", "W8A8FP8MoEMethod"),
        "CompressedTensorsW8A8Fp8MoE",
    },
    "PackedExperts": {
        *("AWQMoEScheme", "GPTQMarlinMoEScheme", "CompressedTensorsWNA16MoE"),
        *("CompressedTensorsWNA16TritonMoE", "MoeWNA16Method"),
    },
    "ScoredExperts": {"Mxfp4MoEMethod"},
    "row by row, or Head": {"UnquantizedEmbeddingMethod"},
}
# These hand over to a scheme, which is looked at instead.
OF_SCHEMES = {
    *("AWQLinearMethod", "AWQMoEMethod", "GPTQLinearMethod", "GPTQMoEMethod"),
    *("GPTQMarlinLinearMethod", "GPTQMarlinMoEMethod", "CompressedTensorsLinearMethod"),
    *("CompressedTensorsFusedMoEMethod", "QuarkLinearMethod", "QuarkFusedMoEMethod"),
    *("ModelSlimLinearMethod", "ModelSlimFusedMoEMethod"),
}
# Of attention: what they scale is refused by `refused_models.refuse_columns`.
OF_COLUMNS = {
    *("BaseKVCacheMethod", "Fp8KVCacheMethod", "CompressedTensorsKVCacheMethod"),
    *("ModelOptFp8KVCacheMethod", "QuarkKVCacheMethod"),
}
ABSTRACT = {
    *("LinearMethodBase", "FusedMoEMethodBase", "AWQLinearSchemeBase", "AWQMoESchemeBase"),
    *("GPTQLinearSchemeBase", "GPTQMoESchemeBase", "CompressedTensorsLinearScheme"),
    *("CompressedTensorsMoEScheme", "ModelSlimLinearScheme", "ModelSlimMoEScheme"),
    *("QuarkLinearScheme", "QuarkMoEScheme", "InklingMoEMethodBase"),
}
# By their folder or the beginning of their name: for other devices than NVIDIA's.
ELSEWHERE = ("NPU", "_NPU", "XPU", "ModelSlim", "Quark")
# What nobody measured, by what it does.
REFUSED = {
    "of 4 bits that Marlin and Triton do not have": {
        *("AWQLinearScheme", "GPTQLinearScheme", "BitsAndBytesLinearMethod"),
        *("BitsAndBytesMoEMethod", "GGUFLinearMethod", "GGUFEmbeddingMethod", "GGUFMoEMethod"),
        *("HummingLinearMethod", "HummingMoEMethod", "Mxfp4HummingMoEMethod"),
        *("ExpertPackMoEMethod", "CompressedTensorsMxInt4MoE"),
    },
    "NVFP4": {
        *("CompressedTensorsW4A16Fp4", "CompressedTensorsW4A16Nvfp4MoE"),
        *("CompressedTensorsW4A4Fp4", "CompressedTensorsW4A4Nvfp4MoE", "MiniMaxM3Nvfp4MoE"),
        *("ModelOptFp4LinearMethod", "ModelOptNvFp4A16LinearMethod"),
        *("ModelOptNvFp4EmbeddingMethod", "ModelOptNvFp4FusedMoEMethod"),
        *("ModelOptNvFp4OnlineFusedMoEMethod", "MuseSparkNvFp4FusedMoEMethod"),
        *("InklingNvfp4MoEMethod", "PetitNvFp4LinearMethod"),
    },
    "MXFP4 by other kernels": {
        *("Mxfp4MarlinMoEMethod", "Mxfp4FlashinferCutlassMoEMethod"),
        *("Mxfp4FlashinferTrtllmMoEMethod", "Mxfp4DynamicQuantMoEMethod"),
    },
    "FP8 of other kinds": {
        *("CompressedTensorsW8A16Fp8", "CompressedTensorsW4AFP8MoE", "W4AFp8MoEMethod"),
        *("ModelOptFp8LinearMethod", "ModelOptFp8MoEMethod"),
    },
    "INT8": {
        *("BlockInt8LinearMethod", "BlockInt8MoEMethod", "CompressedTensorsW8A8Int8"),
        *("W8A8Int8LinearMethod", "W8A8Int8MoEMethod"),
    },
    "unquantized, by kernels of one model or of a mode": {
        *("_InklingUnquantizedFusedMoEMethod", "BeamUnquantizedFusedMoEMethod"),
        *("InklingBatchDenseMLP", "KTEPWrapperMethod", "PagedExpertsMoEMethod"),
    },
    "on AMD and on CPUs with AMX": {
        *("PackWeightMethod", "AWQIntelAMXLinearScheme", "AWQIntelAMXMoEScheme"),
        *("GPTQIntelAMXLinearScheme", "GPTQIntelAMXMoEScheme"),
        *("AWQXPULinearScheme", "GPTQXPULinearScheme", "AWQAscendLinearScheme"),
        *("AWQAscendMoEScheme", "GPTQAscendLinearScheme", "GPTQMoEAscendScheme"),
        *("GGUFLinearAscendMethod", "GGUFEmbeddingAscendMethod", "GGUFMoEAscendMethod"),
    },
}
KNOWN = set().union(*MEASURED.values())
LOOKED_AT = KNOWN.union(OF_SCHEMES, OF_COLUMNS, ABSTRACT, *REFUSED.values())


def classes() -> Iterator[ast.ClassDef]:
    """Of all modules of SGLang that may have one, also of those that cannot be imported here."""
    for file in Path(sglang.srt.__path__[0]).rglob("*.py"):
        text = file.read_text()
        if any(mark in text for mark in MARKS):
            yield from (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef))


@pytest.fixture(scope="module")
def found() -> set[str]:
    """Names of all classes that SGLang may put on a layer as its method or scheme.

    Kernels are asked by a scheme: they are never on a layer.
    """
    every = list(classes())
    names = set(ROOTS)
    for _ in itertools.count():
        more = {each.name for each in every if names & {_name(base) for base in each.bases}} - names
        if not more:
            break
        names |= more
    alone = {each.name for each in every if PROCESSES in {_name(one) for one in each.body}}
    return (names | {name for name in alone if not name.endswith("Kernel")}) - ROOTS


def _name(node: ast.AST) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", "")


def test_somebody_looked_at_each_class(found):
    """A release with another one fails here: measure it, or say why it is refused."""
    new = {name for name in found - LOOKED_AT if not name.startswith(ELSEWHERE)}
    assert new == set()
    if release.SGLANG_VERSION == release.NEWEST:
        assert found >= LOOKED_AT, "these are gone"


def test_what_is_measured_is_what_a_start_lets_pass():
    assert set(schemes.KNOWN) == KNOWN


def on_a_layer(kind: type) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.quant_method = object()
    layer.scheme = kind.__new__(kind)
    return torch.nn.ModuleDict({"proj": layer})


def test_all_others_end_the_start_by_name(found):
    for name in sorted(found - KNOWN - OF_COLUMNS):
        with pytest.raises(GateError, match=rf"cannot measure proj, .* by {name}, .* or serve "):
            loaded_model.refuse_layers(on_a_layer(type(name, (), {})))


def test_experts_in_nvfp4_are_refused_and_what_is_derived_of_a_known_class_too():
    """Before anything is run: on the stock fast path nothing is."""
    derived = type("DerivedLinearMethod", (Fp8LinearMethod,), {})
    for kind in (CompressedTensorsW4A16Nvfp4MoE, derived):
        with pytest.raises(GateError, match=f"by {kind.__name__}, as it is set up here: use"):
            loaded_model.refuse_layers(on_a_layer(kind))


def test_a_known_class_that_is_set_up_for_another_kernel_is_refused(fp8_layer):
    assert schemes.unknown(fp8_layer) is None
    fp8_layer["proj"].quant_method.use_marlin = True
    assert schemes.unknown(fp8_layer) == ("proj", "Fp8LinearMethod")


@pytest.fixture
def fp8_layer() -> torch.nn.Module:
    """In blocks, as SGLang makes one and leaves it on Hopper."""
    config = Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128])
    layer = torch.nn.Module()
    layer.tp_group, layer.tp_size = SimpleNamespace(world_size=1, rank_in_group=0), 1
    layer.quant_method = Fp8LinearMethod(config)
    layer.quant_method.create_weights(
        layer, 256, [128, 128], 256, 256, torch.bfloat16, weight_loader=lambda *_: None
    )
    return torch.nn.ModuleDict({"proj": layer})


def _transposed(layer: Any) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.data.t(), requires_grad=False)


def _in_ue8m0(layer: Any) -> None:
    layer.weight_scale_inv.format_ue8m0 = True


def _with_a_copy(layer: Any) -> None:
    layer._block_fp8_bf16_weight = layer.weight.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_transposed, _in_ue8m0, _with_a_copy])
def test_an_update_needs_parameters_as_the_model_made_them(fp8_layer, change):
    assert schemes.fixed(fp8_layer) is None
    change(fp8_layer["proj"])
    assert schemes.fixed(fp8_layer) == ("proj", "Fp8LinearMethod")


@pytest.mark.parametrize("name", sorted(MEASURED["Packed"] | {"Mxfp4MoEMethod"}))
def test_packed_weights_are_never_loaded_into(name):
    """A stand-in of a CPU may keep the parameters that a GPU repacks."""
    assert schemes.fixed(on_a_layer(type(name, (), {}))) == ("proj", name)


def test_what_is_not_quantized_is_loaded_into():
    assert schemes.fixed(on_a_layer(type("UnquantizedLinearMethod", (), {}))) is None
