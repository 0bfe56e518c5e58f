"""LongRoPE, whose table SGLang chooses for all rows of a forward, ends a start of long contexts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.layers.rotary_embedding.rope_variant import Phi3LongRoPEScaledRotaryEmbedding
from sglang.srt.models.gemma3_causal import Gemma3RotaryEmbedding
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from margingate.config import GateError
from margingate.runtime.probe.checks import rotary

SHORT, LONG, SIZE = 32, 256, 8


@pytest.fixture
def long_rope() -> torch.nn.Module:
    factors: dict[str, Any] = {
        "short_factor": [1.0] * (SIZE // 2),
        "long_factor": [4.0] * (SIZE // 2),
    }
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": SHORT, **factors}
    made = factory.get_rope(SIZE, SIZE, LONG, 10000, True, scaling, torch.float32)
    assert isinstance(made, Phi3LongRoPEScaledRotaryEmbedding)
    return made


def runner(context: int, *modules: torch.nn.Module) -> Any:
    model = torch.nn.ModuleList(modules)
    return SimpleNamespace(model=model, model_config=SimpleNamespace(context_len=context))


def test_sglang_rotates_a_row_by_what_its_neighbours_need(long_rope):
    """Why it is refused. Where no row stands beyond the first table, none has an effect."""
    heads = torch.randn(1, 2 * SIZE).repeat(2, 1)

    def first(beside: int) -> torch.Tensor:
        return long_rope(torch.tensor([7, beside]), heads, heads)[0][0]

    assert torch.equal(first(3), first(SHORT))
    assert not torch.equal(first(3), first(SHORT + 1))


def test_contexts_beyond_the_first_table_are_refused(long_rope):
    with pytest.raises(GateError, match=r"longrope.* has 256: use --context-length 32, or serve"):
        rotary.refuse(runner(LONG, torch.nn.Linear(2, 2), long_rope))
    rotary.refuse(runner(SHORT, long_rope))


def test_other_tables_pass():
    plain = factory.get_rope(SIZE, SIZE, LONG, 10000, True, None, torch.float32)
    rotary.refuse(runner(LONG, plain, torch.nn.Linear(2, 2)))


def of_transformers(kind: str, **more: Any) -> torch.nn.Module:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}
    sizes = {"hidden_size": SIZE, "num_attention_heads": 1, "max_position_embeddings": LONG}
    return LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=parameters))


def cosines(module: torch.nn.Module, *positions: int) -> torch.Tensor:
    """Of the first position."""
    return module(torch.zeros(1), torch.tensor([positions]))[0][0, 0]


FACTORS = {"short_factor": [1.0] * (SIZE // 2), "long_factor": [4.0] * (SIZE // 2)}


@pytest.mark.parametrize(
    ("kind", "more", "first"),
    [
        ("longrope", {**FACTORS, "original_max_position_embeddings": SHORT}, SHORT),
        ("dynamic", {}, LONG),
    ],
)
def test_so_are_those_of_transformers(kind, more, first):
    """As with `--model-impl transformers`."""
    module = of_transformers(kind, **more)
    alone = cosines(module, 7, 3)
    assert torch.equal(alone, cosines(module, 7, first - 1))
    assert not torch.equal(alone, cosines(module, 7, first))
    rotary.refuse(runner(first, module))
    with pytest.raises(GateError, match=rf"\({kind}\).* use --context-length {first}, or serve"):
        rotary.refuse(runner(first + 1, module))


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_others_of_transformers_pass(kind):
    rotary.refuse(runner(LONG + 1, of_transformers(kind)))


def test_gemmas_of_sglang_pass():
    """It has a kind for each kind of layer."""
    rotary.refuse(runner(1 << 20, Gemma3RotaryEmbedding(Gemma3TextConfig())))
