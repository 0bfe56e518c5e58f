"""Scales of FP8 blocks that no checkpoint filled end the start by name."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

from margingate.config import GateError
from margingate.runtime.probe.checks import loaded_model


@pytest.fixture
def model() -> torch.nn.Module:
    """A layer as SGLang makes it, before anything was read."""
    config = Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128])
    layer = torch.nn.Module()
    layer.tp_group = SimpleNamespace(world_size=1, rank_in_group=0)
    layer.tp_size = 1
    Fp8LinearMethod(config).create_weights(
        layer, 256, [128, 128], 256, 256, torch.bfloat16, weight_loader=lambda *_: None
    )
    return torch.nn.ModuleDict({"proj": layer})


def test_scales_that_were_not_read_are_named(model):
    with pytest.raises(GateError, match=r"proj\.weight_scale_inv was not read.*or one in BF16"):
        loaded_model.refuse_layers(model)


def test_one_block_is_enough(model):
    scales = model["proj"].weight_scale_inv
    kept = scales[1, 1].clone()
    scales.data.fill_(0.5)
    scales.data[1, 1] = kept
    with pytest.raises(GateError, match="was not read"):
        loaded_model.refuse_layers(model)


def test_scales_that_were_read_pass(model):
    model["proj"].weight_scale_inv.data.fill_(-1e-4)  # as made-up ones may be
    loaded_model.refuse_layers(model)
