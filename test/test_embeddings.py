"""Embeddings that a client brings to a model that takes none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from request_stand_in import OPT_OUT, classify, request
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models.granitemoehybrid import (
    GraniteMoeHybridForCausalLM,
    GraniteMoeHybridModel,
)
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.mixtral import MixtralForCausalLM
from sglang.srt.models.phi import PhiForCausalLM
from sglang.srt.models.qwen3_vl import Qwen3VLForConditionalGeneration

from margingate.runtime.compat.model.embeddings import Taken, taken_by
from margingate.runtime.request.admission import queue

NONE = "this model takes no embeddings in the place of tokens: send a text or token ids."
HALF = (
    "this server computes in float16, and SGLang gives it input_embeds in bfloat16: send a text or "
    "token ids, or start it with --dtype bfloat16."
)
GIVES = "_extend_forward_kwargs"  # ModelRunner's, in 0.5.23
of_this_release = pytest.mark.skipif(not hasattr(ModelRunner, GIVES), reason="another SGLang")
MODELS = (
    (LlamaForCausalLM, Taken()),
    (MixtralForCausalLM, Taken(overrides=NONE)),
    (PhiForCausalLM, Taken(NONE, NONE)),
    (Qwen3VLForConditionalGeneration, Taken(NONE, NONE)),
)


@pytest.mark.parametrize(("model", "taken"), MODELS)
def test_what_a_model_takes(model: type[Any], taken: Taken):
    assert taken_by(model, torch.bfloat16) == taken
    assert taken_by(model, torch.float16) == taken._replace(prompts=taken.prompts or HALF)


@of_this_release
def test_sglang_gives_any_model_bfloat16():
    runner = SimpleNamespace(is_generation=True, _pp_kwargs=lambda _: {})
    batch = SimpleNamespace(input_embeds=torch.zeros(1, 4), replace_embeds=None)
    rows = ModelRunner._extend_forward_kwargs(runner, batch, None)["input_embeds"]
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.nn.functional.linear(rows, torch.zeros(4, 4, dtype=torch.float16))


@of_this_release
@pytest.mark.parametrize("model", [model for model, taken in MODELS if taken.overrides])
def test_sglang_fails_where_a_model_does_not_take_them(model: type[Any]):
    ids, rows = torch.zeros(2, dtype=torch.int64), torch.ones(2, 4)
    batch = SimpleNamespace(
        input_ids=ids, input_embeds=None, replace_embeds=rows[:1], replace_positions=ids[:1]
    )
    bare = object.__new__(model)
    torch.nn.Module.__init__(bare)
    bare.model = SimpleNamespace(embed_tokens=lambda _: rows, get_input_embeddings=lambda: None)
    if not hasattr(bare, "get_input_embeddings"):
        runner = SimpleNamespace(model=bare, is_generation=True, _pp_kwargs=lambda _: {})
        with pytest.raises(AttributeError, match="get_input_embeddings"):
            ModelRunner._extend_forward_kwargs(runner, batch, None)
        return
    with pytest.raises(TypeError, match="input_embeds"):
        bare.forward(ids, ids, batch, input_embeds=rows)


@of_this_release
def test_an_override_changes_the_rows_beside_it():
    """So no gated prompt may be in such a forward: see test_edges."""
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    parts = {"pp_group": rank, "embedding_multiplier": 12.0, "layers_to_capture": ()}
    parts |= {"start_layer": 0, "end_layer": 0, "norm": torch.nn.Identity()}
    parts["embed_tokens"] = torch.nn.Embedding(9, 4)
    model, outer = (
        object.__new__(each) for each in (GraniteMoeHybridModel, GraniteMoeHybridForCausalLM)
    )
    for each in (model, outer):
        torch.nn.Module.__init__(each)
    for name, part in parts.items():
        setattr(model, name, part)
    outer.model = model
    ids, last = torch.tensor([3, 5]), torch.tensor([1])
    batch = SimpleNamespace(
        input_ids=ids, input_embeds=None, replace_embeds=torch.ones(1, 4), replace_positions=last
    )
    runner = SimpleNamespace(model=outer, is_generation=True, _pp_kwargs=lambda _: {})
    with torch.no_grad():
        alone = model(ids, None, SimpleNamespace())[0]
        embeds = ModelRunner._extend_forward_kwargs(runner, batch, None)["input_embeds"]
        beside = model(ids, None, SimpleNamespace(), embeds)[0]
    assert torch.equal(alone, beside * 12) and not torch.equal(alone, beside)


@pytest.mark.parametrize("name", ["input_embeds", "positional_embed_overrides"])
@pytest.mark.parametrize("sentence", ["", NONE])
def test_embeddings_that_a_model_does_not_take_are_refused(name: str, sentence: str):
    """Not gated: one such request ended the scheduler, and all requests with it."""
    req = request(OPT_OUT, **{name: [[0.5]]})
    req.to_finish = None
    classify(req)
    said: list[str] = []
    req.set_finish_with_abort = said.append
    queue(req, "", Taken(sentence, sentence))
    assert said == ([sentence] if sentence else [])
    assert (getattr(req, name) is None) is bool(sentence)
