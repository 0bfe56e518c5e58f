"""Text of vision models: rotary positions by section, a tower that is left out, images refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_policy import AddReqResult
from test_arguments import model_config
from test_observed_calls import linear
from test_request import CONFIG, classify, request

from margingate.config import GateError
from margingate.harness.tiny_models import VISION
from margingate.runtime.compat import vision
from margingate.runtime.probe.check_prefill import Prefill
from margingate.runtime.probe.observed_calls import refuse_unmeasured
from margingate.runtime.probe.operators import dense_operators
from margingate.runtime.request.admission import refuse
from margingate.runtime.schedule.prefill_admission import Admission
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


# Requests with images


@pytest.mark.parametrize(
    ("custom", "media", "refused"),
    [
        (None, object(), True),
        (None, None, False),
        ({"deterministic": False}, object(), False),
        ({"deterministic": True}, object(), True),
    ],
)
def test_images_of_a_gated_request_are_answered_400(custom, media, refused):
    req = request(custom)
    classify(req, CONFIG)
    said: list[str] = []
    # As SGLang does: they come after the request was made.
    req.multimodal_inputs, req.to_finish, req.set_finish_with_abort = media, None, said.append
    refuse(req)
    assert bool(said) is refused
    if refused:
        assert said[0].startswith("this request has images, video or sound, whose embeddings")
        assert '"deterministic": false' in said[0]


def prompt(gated: bool, media: Any = None) -> Any:
    gate = SimpleNamespace(gated=gated, kept=None)
    return SimpleNamespace(gate=gate, multimodal_inputs=media)


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (prompt(True), prompt(True), True),
        (prompt(True), prompt(False), True),
        (prompt(True), prompt(False, object()), False),
        (prompt(False, object()), prompt(True), False),
        (prompt(False, object()), prompt(False), True),
        (prompt(False), prompt(False, object()), True),
    ],
)
def test_images_are_in_no_forward_with_a_gated_prompt(first, second, meet):
    admission = Admission(Prefill(together=True), 64)
    adder = SimpleNamespace(can_run_list=[first])
    found = admission.add_one_req(lambda *_: "SGLang's", adder, second, False, None)
    assert found == ("SGLang's" if meet else AddReqResult.OTHER)
