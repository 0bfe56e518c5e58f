"""Scales of FP8 blocks that loading did not fill: such layers compute numbers that mean nothing."""

from __future__ import annotations

import torch

from margingate.config import GateError

_NAME = "weight_scale_inv"
_UNFILLED = torch.finfo(torch.float32).min  # what SGLang makes them of


def refuse(model: torch.nn.Module) -> None:
    """Check a loaded model. Raises GateError naming the first scales that were not read.

    SGLang's loader for Llama renames these scales, finds no parameter of the new name, and goes on.
    """
    scales = (each for each in model.named_parameters() if each[0].endswith(_NAME))
    for name, values in scales:
        if values.is_floating_point() and bool((values == _UNFILLED).any()):
            raise GateError(
                f"--deterministic-gate found that {name} was not read from the checkpoint, so its "
                "layer has no scales and answers mean nothing: use a checkpoint whose "
                "architecture SGLang reads FP8 blocks of (Qwen3 is one, Llama is not), or one in "
                "BF16."
            )
