"""Vision models: rotary positions by section, and a tower that is not measured with the layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from server_arguments import model_config
from test_observed_calls import linear

from margingate.config import GateError
from margingate.harness.tiny_models import VISION
from margingate.runtime.compat.model import vision
from margingate.runtime.probe.operators.observed_calls import refuse_unmeasured
from margingate.runtime.probe.operators.operator import dense_operators
from margingate.runtime.start import refused_models

KNOWN = SimpleNamespace(
    architectures=["Qwen3VLForConditionalGeneration"], get_text_config=lambda: None
)


def test_the_towers_are_where_sglangs_models_have_them():
    """Each architecture is a class of SGLang's, which makes its tower under that name."""
    import ast
    import inspect

    from sglang.srt.models import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe

    kinds = {
        name: kind
        for module in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe)
        for name, kind in vars(module).items()
        if name in vision.TOWERS
    }
    assert kinds.keys() == vision.TOWERS.keys()
    for name, kind in kinds.items():
        source = "\n".join(inspect.getsource(each) for each in kind.__mro__[:2])
        made = {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
        assert f"self.{vision.TOWERS[name]}" in made, name


def test_text_is_at_the_same_position_in_each_section():
    positions = torch.tensor([4, 0, 7])
    plain = vision.section_positions(SimpleNamespace(model_is_mrope=False), positions)
    assert plain is None
    found = vision.section_positions(SimpleNamespace(model_is_mrope=True), positions)
    assert found is not None and found.tolist() == [[4, 0, 7]] * 3 and found.is_contiguous()


# The tower


def tower_model(name: str) -> Any:
    """A decoder of one layer behind a tower with a layer, a norm and a convolution."""
    kind = type(name, (torch.nn.Module,), {})
    model = kind()
    model.visual = torch.nn.Module()
    model.visual.proj = torch.nn.Conv2d(3, 4, 2)
    model.visual.qkv_proj, model.visual.norm = linear(4, 4), torch.nn.LayerNorm(4)
    model.visually = torch.nn.Module()  # a name that begins alike
    model.visually.o_proj = linear(4, 4)
    model.qkv_proj = linear(4, 4)
    return model


def test_a_tower_is_not_measured_and_all_else_is():
    model = tower_model("Qwen3VLForConditionalGeneration")
    measured = list(dense_operators(model, {}))
    assert [each.name for each in measured] == ["visually.o_proj", "qkv_proj"]
    refuse_unmeasured(model, {id(each.module) for each in measured})
    with pytest.raises(GateError, match=r"cannot measure visually\.o_proj, a Module with weight"):
        refuse_unmeasured(model, {id(model.qkv_proj)})


def test_a_model_may_have_been_loaded_without_its_tower():
    """With --language-model-only; then there is nothing to check at start."""
    model = tower_model("Qwen3VLForConditionalGeneration")
    assert vision.has_tower(model) and not vision.has_tower(tower_model("Another"))
    model.visual = None
    assert not vision.has_tower(model)


def test_the_same_module_of_another_model_is_measured():
    """Nobody has looked whether text gets there."""
    model = tower_model("AnotherForConditionalGeneration")
    measured = list(dense_operators(model, {}))
    assert "visual.qkv_proj" in [each.name for each in measured]
    with pytest.raises(GateError, match=r"cannot measure visual\.proj, a Conv2d with weight, bias"):
        refuse_unmeasured(model, {id(each.module) for each in measured})


def test_models_whose_tower_is_known_are_served():
    refused_models.refuse_model(model_config(is_multimodal=True, hf_config=KNOWN))
    with pytest.raises(GateError, match="is multimodal and none of Qwen2-VL"):
        refused_models.refuse_model(model_config(is_multimodal=True))
    with pytest.raises(GateError, match=r"is quantized \(awq\)"):
        refused_models.refuse_model(
            model_config(is_multimodal=True, hf_config=KNOWN, quantization="awq")
        )


def test_a_tiny_model_of_each_kind_can_be_made():
    names = {name.replace("_", "") for name in VISION}
    known = {name.removesuffix("ForConditionalGeneration").lower() for name in vision.TOWERS}
    assert names <= {name.replace("_", "") for name in known}
