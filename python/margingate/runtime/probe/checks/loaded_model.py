"""A model as it was loaded: what in it is refused on either fast path, before it is measured."""

from __future__ import annotations

from typing import Any

import torch

from margingate.config import GateError
from margingate.runtime.compat.compute import marlin, quantization, schemes
from margingate.runtime.compat.compute.routers import experts
from margingate.runtime.probe.checks import rotary

SHARED = "rounds the inputs of experts in {} to FP8 by one scale for all rows of a forward"
BY_ROW = (
    "use a checkpoint with a weight_block_size, or with a scale for each channel of weights and "
    "each token (compressed-tensors), or serve it without the flag"
)
_OF_BLOCKS = "weight_scale_inv"
_UNFILLED = torch.finfo(torch.float32).min  # what SGLang makes scales of blocks of


def refuse(runner: Any) -> None:
    """Check the model of SGLang's ModelRunner. Raises GateError naming what no plan makes right."""
    refuse_layers(runner.model)
    rotary.refuse(runner)


def refuse_layers(model: torch.nn.Module) -> None:
    """Layers and experts by their method, and by the scales that were loaded. Raises GateError."""
    _refuse_unknown(model)
    _refuse_shared(model)
    _refuse_unread(model)
    _refuse_other_type(model)


def _refuse_unknown(model: torch.nn.Module) -> None:
    """On the stock fast path too, which measures no module: a kernel may round by all rows."""
    found = schemes.unknown(model)
    if found is not None:
        raise GateError(
            f"--deterministic-gate cannot measure {found[0]}, whose products SGLang computes by "
            f"{found[1]}, as it is set up here: use a checkpoint in BF16 or FP8, or one that "
            "SGLang hands to Marlin (AWQ, GPTQ, compressed-tensors), or serve this model without "
            "the flag."
        )


def _refuse_shared(model: torch.nn.Module) -> None:
    """Experts whose rows share a scale depend on their neighbours at any row count."""
    for name, module in experts(model):
        if quantization.are_known(module) and quantization.rounding(module) == quantization.BATCH:
            raise GateError(
                f"--deterministic-gate does not serve this model yet, because it "
                f"{SHARED.format(name)}: {BY_ROW}."
            )


def _refuse_unread(model: torch.nn.Module) -> None:
    """SGLang's loader for Llama renames these scales, finds no parameter of the new name, and goes
    on: such layers compute numbers that mean nothing.
    """
    scales = (each for each in model.named_parameters() if each[0].endswith(_OF_BLOCKS))
    for name, values in scales:
        if values.is_floating_point() and bool((values == _UNFILLED).any()):
            raise GateError(
                f"--deterministic-gate found that {name} was not read from the checkpoint, so its "
                "layer has no scales and answers mean nothing: use a checkpoint whose "
                "architecture SGLang reads FP8 blocks of (Qwen3 is one, Llama is not), or one in "
                "BF16."
            )


def _refuse_other_type(model: torch.nn.Module) -> None:
    """SGLang keeps scales of GPTQ's experts in float16, and its first forward would end by that."""
    for name, module in experts(model):
        if not marlin.are_experts(module):
            continue
        wanted, found = module.moe_runner_config.params_dtype, marlin.experts_scales(module).dtype
        if wanted != found:
            raise GateError(
                f"SGLang keeps the scales of {name} in {found}, and Marlin takes rows of that type "
                f"only, but the model's type is {wanted}: use --dtype {str(found).split('.')[-1]}."
            )
