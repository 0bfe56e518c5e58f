"""Experts with weights in MXFP4, as SGLang's `triton_kernels` runner has them (gpt-oss).

A weight is a number of 4 bits times a power of two that 32 of them share; rows stay as they are.
The runner's choice of experts is one table of all rows, sorted by expert: no part of it is a row's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from margingate.runtime.compat.compute.quantization import checkpoint_says
from margingate.runtime.compat.model.architectures import checkpoint_config

METHOD = "mxfp4"  # as SGLang's ModelConfig and checkpoints call it
RUNNER = "triton_kernel"  # as --moe-runner-backend calls it
ARCHITECTURE = "GptOssForCausalLM"  # the one whose weights SGLang brings into this form
WEIGHTS = ("w13_weight_triton_tensor", "w2_weight_triton_tensor")  # of a method; inputs by outputs
SCALES = ("w13_precision_config", "w2_precision_config")

_tiles = threading.local()  # the height that `tile_height` has set in this thread


def is_asked(args: Any) -> bool:
    """Whether the named model's files have such weights, before SGLang has decided anything."""
    config = checkpoint_config(args)
    method = (config.get("quantization_config") or {}).get("quant_method")
    return method == METHOD and ARCHITECTURE in (config.get("architectures") or ())


def runner(args: Any) -> str:
    """The --moe-runner-backend of gpt-oss, as its experts are measured: in MXFP4, or else in BF16,
    for which SGLang would take `triton_kernels` too.
    """
    return RUNNER if is_asked(args) else "triton"


def is_served(model: Any) -> bool:
    """Whether SGLang's ModelConfig says gpt-oss with such weights, and no other model with them."""
    from_files = checkpoint_says(model, "quant_method") == METHOD
    names = getattr(model.hf_config, "architectures", None) or ()
    return model.quantization == METHOD and from_files and ARCHITECTURE in names


def are_experts(experts: Any) -> bool:
    """Whether these are SGLang's FusedMoE with such weights, run by `triton_kernels`."""
    method = _method(experts)
    return method is not None and getattr(method, WEIGHTS[0], None) is not None


def are_widened(experts: Any) -> bool:
    """Whether SGLang made such weights BF16 when it loaded them, for its Triton runner."""
    weight = getattr(experts, "w13_weight", None)
    return _method(experts) is not None and weight is not None and weight.dtype == torch.bfloat16


def shapes(experts: Any) -> tuple[list[int], list[int]]:
    """[experts, inputs, outputs] of both products of `are_experts`."""
    first, second = (getattr(experts.quant_method, name) for name in WEIGHTS)
    return list(first.shape), list(second.shape)


def describe(experts: Any) -> str:
    """What chooses the kernels of `are_experts`, beside shapes: layouts and numbers of scales."""
    method = experts.quant_method
    said = [type(method).__name__]
    for name in SCALES:
        config = getattr(method, name)
        scales = getattr(config, "b_mx_scale", None)
        said += [_layout(scales), str(getattr(config, "b_microblock_size", None))]
    said += [_layout(getattr(method, name)) for name in WEIGHTS]
    return " ".join(said)


def hidden_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and scales of `are_experts`, by name: they are no parameters of the model."""
    for name, module in model.named_modules():
        if are_experts(module):
            method = module.quant_method
            for each in WEIGHTS:
                yield f"{name}.{each}", _data(getattr(method, each))
            for each in SCALES:
                scales = getattr(getattr(method, each), "b_mx_scale", None)
                if scales is not None:
                    yield f"{name}.{each}", _data(scales)


def is_table(chosen: Any) -> bool:
    """Whether a router's result is the table of all rows that `triton_kernels` takes."""
    names = ("a_ragged_metadata", "gather_indx", "scatter_indx", "gate_scal", "n_expts_act")
    return all(hasattr(chosen, name) for name in names)


def rows_of(table: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [rows, k] of a table, a row in the order in which SGLang chose."""
    places, k = table.scatter_indx.long(), int(table.n_expts_act)
    sizes = table.a_ragged_metadata.slice_sizes.long()
    experts = torch.arange(len(sizes), device=sizes.device)
    ids = torch.empty_like(places)
    ids[places] = torch.repeat_interleave(experts, sizes, output_size=len(places))
    weights = torch.empty_like(table.gate_scal)
    weights[places] = table.gate_scal
    return weights.view(-1, k), ids.view(-1, k)


def with_scores(table: Any, scores: torch.Tensor) -> Any:
    """SGLang's table that carries the scores [rows, experts] that it was made of."""
    found = _carrier()(*table)
    found.scores = scores
    return found


def scores_of(table: Any) -> torch.Tensor:
    """The scores that `with_scores` put there. Raises RuntimeError where nothing did."""
    scores: torch.Tensor | None = getattr(table, "scores", None)
    if scores is None:
        raise RuntimeError("experts in MXFP4 were given a choice that was not measured at start")
    return scores


@contextmanager
def tile_height(rows: int | None) -> Iterator[None]:
    """Have `triton_kernels` cut experts' rows into tiles of `rows`; None: as it chooses itself."""
    before = getattr(_tiles, "height", None)
    if rows == before:
        yield
        return
    from triton_kernels.matmul_details.opt_flags import update_opt_flags_constraints

    update_opt_flags_constraints({"block_m": rows})
    _tiles.height = rows
    try:
        yield
    finally:
        update_opt_flags_constraints({"block_m": before})
        _tiles.height = before


def _method(experts: Any) -> Any:
    """SGLang's method of experts whose weights came in MXFP4; None of others."""
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod

    method = getattr(experts, "quant_method", None)
    return method if isinstance(method, Mxfp4MoEMethod) else None


@cache
def _carrier() -> Any:
    from sglang.srt.layers.moe.topk import TritonKernelTopKOutput

    class Table(TritonKernelTopKOutput):
        """SGLang's own, with room for one attribute more."""

        scores: torch.Tensor

    return Table


def _layout(tensor: Any) -> str:
    """Of one of triton_kernels' tensors; a torch tensor has none."""
    return str(tensor.storage.layout) if _is_wrapped(tensor) else ""


def _data(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.storage.data if _is_wrapped(tensor) else tensor
    return found


def _is_wrapped(tensor: Any) -> bool:
    return not isinstance(tensor, torch.Tensor) and hasattr(tensor, "storage")
