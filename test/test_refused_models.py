"""Models and K/V columns that the gate is not served with, and experts that are not returned."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import server_arguments
import torch
from sentences import sentence
from server_arguments import GATE, exits, model_config

from margingate.config import GateConfig, GateError
from margingate.runtime.start import refusals, refused_models

# Fixtures: pytest finds them by their names here.
folder = server_arguments.folder
prepare = server_arguments.prepare
put_back = server_arguments.put_back
server_args_class = server_arguments.server_args_class

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("text", [{}, {"num_experts": 8}, WINDOWS])
def test_a_decoder_is_served_whatever_its_family(text):
    """Experts are refused by the operator that nobody knows, and by no name of a family."""
    refused_models.refuse_model(model_config(text))


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (model_config(is_generation=False), "does not generate text"),
        (model_config(attention_arch=SimpleNamespace(name="MLA")), "uses latent attention (MLA)"),
        (model_config(attention_arch=SimpleNamespace(name="SSM")), "keeps recurrent state"),
        (model_config(is_encoder_decoder=True), "is an encoder-decoder"),
        (model_config(is_multimodal=True), "is multimodal and none of Qwen2-VL, Qwen2.5-VL and"),
        (
            model_config(linear_attn_registry_result=(object(), object())),
            "keeps recurrent state (Mamba or linear attention)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind_of_model_is_refused_in_words(model, what):
    with pytest.raises(GateError) as caught:
        refused_models.refuse_model(model)
    text = sentence(caught.value)
    assert text.startswith(f"--deterministic-gate does not serve this model yet, because it {what}")
    assert text.endswith(": serve it without the flag.")


@pytest.mark.parametrize(
    ("text", "changes", "refused"),
    [
        ({}, {}, False),
        ({}, {"has_attention_sinks": True}, False),
        ({"attention_chunk_size": 8192}, {}, True),
        ({}, {"is_hybrid_swa_compress": True}, True),
    ],
)
@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "OneForCausalLM"])
def test_a_second_pool_is_served_of_windows_alone(architecture, text, changes, refused):
    """For an architecture with two pools and without."""
    two = architecture != "OneForCausalLM"
    names = SimpleNamespace(get_text_config=lambda: None, architectures=[architecture])
    said = pytest.raises(GateError, match="chunks that are no windows: ")
    with said if refused and two else nullcontext():
        refused_models.refuse_model(model_config(text, hf_config=names, **changes))


def test_mxfp4_is_served_of_gpt_oss_alone():
    """Of others SGLang has the same experts, but nobody looked at how their weights come there."""
    packed = {"quant_method": "mxfp4"}
    gpt_oss = SimpleNamespace(
        get_text_config=lambda: None,
        architectures=["GptOssForCausalLM"],
        quantization_config=packed,
    )
    refused_models.refuse_model(model_config(quantization="mxfp4", hf_config=gpt_oss))
    other = SimpleNamespace(**{**vars(gpt_oss), "architectures": ["OtherForCausalLM"]})
    rounded = SimpleNamespace(**{**vars(gpt_oss), "quantization_config": None})
    for config in (other, rounded):
        with pytest.raises(GateError, match=r"quantized \(mxfp4\), of which.*gpt-oss in MXFP4"):
            refused_models.refuse_model(model_config(quantization="mxfp4", hf_config=config))


def test_what_is_quantized_otherwise_is_refused_with_what_would_do():
    plain = model_config().hf_config
    rounded = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    blocks = SimpleNamespace(**vars(plain), quantization_config=rounded)
    static = SimpleNamespace(**vars(plain), quantization_config={"activation_scheme": "static"})
    experts = {"num_experts": 8}
    for model in (
        model_config(quantization=None, hf_config=plain),
        model_config(quantization="fp8", hf_config=blocks),
        model_config(quantization="fp8", hf_config=plain),  # by the server: a scale a row of inputs
        model_config(quantization="w8a8_fp8", hf_config=plain),
        model_config(experts, quantization="fp8", hf_config=blocks),
        model_config(experts, quantization="fp8", hf_config=static),
        model_config(experts, quantization="compressed-tensors", hf_config=plain),
    ):
        refused_models.refuse_model(model)
    with pytest.raises(GateError, match=r"by one scale for all rows.*: use a checkpoint with"):
        refused_models.refuse_model(model_config(experts, quantization="fp8", hf_config=plain))
    with pytest.raises(GateError, match=r"quantized \(awq\), of which.*: use a checkpoint in BF16"):
        refused_models.refuse_model(model_config(quantization="awq", hf_config=plain))


def experts_wanted(**changes: Any) -> SimpleNamespace:
    given = {"enable_return_routed_experts": True, "chunked_prefill_size": 64}
    return SimpleNamespace(**(given | changes))


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2}
VERIFIED = {"rows": 16, "fast_path": "stock"}


@pytest.mark.parametrize(
    ("config", "text", "args", "because"),
    [
        ({"rows": 16}, {}, {}, "is for mixtures of experts"),
        ({"rows": 16}, {"num_experts_per_tok": 2}, {}, "is for mixtures of experts"),
        ({"rows": 16}, MIXTURE, {"chunked_prefill_size": -1}, "--chunked-prefill-size is -1"),
        ({"rows": 16}, MIXTURE, {"chunked_prefill_size": 15}, "is 15 and --gate-rows is 16"),
        (VERIFIED, MIXTURE, {}, "may depend on the batch: use --gate-guarantee exact"),
        ({"rows": 16, "repair": "column"}, MIXTURE, {}, "nor with --gate-repair column"),
    ],
)
def test_experts_are_returned_where_all_rows_are_canonical(config, text, args, because):
    with pytest.raises(GateError, match=because) as caught:
        refusals.refuse_experts(experts_wanted(**args), GateConfig(**config), model_config(text))
    sentence(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"rows": 16},
        VERIFIED | {"guarantee": "exact"},
        VERIFIED | {"policy": "always"},
        VERIFIED | {"policy": "observe"},
    ],
)
def test_experts_are_returned_elsewhere(config):
    made = GateConfig(**config)
    refusals.refuse_experts(experts_wanted(), made, model_config(MIXTURE))
    refusals.refuse_experts(experts_wanted(enable_return_routed_experts=False), made, None)


def test_experts_in_mxfp4_are_not_returned():
    """Their runner's choice passes SGLang's record of experts by."""
    said = SimpleNamespace(
        architectures=["GptOssForCausalLM"], quantization_config={"quant_method": "mxfp4"}
    )
    model = model_config(MIXTURE, quantization="mxfp4", hf_config=said)
    with pytest.raises(GateError, match="keeps no ids: drop the option") as caught:
        refusals.refuse_experts(experts_wanted(), GateConfig(rows=16), model)
    sentence(caught.value)


def test_experts_of_a_model_without_any_are_refused_at_start(prepare):
    assert "for mixtures of experts" in exits(prepare, GATE, "--enable-return-routed-experts")


def test_the_names_of_sglangs_attention_kinds_are_the_expected_ones():
    from sglang.srt.configs.model_config import AttentionArch

    assert {kind.name for kind in AttentionArch} == {"MHA", "MLA", "SSM"}


def test_a_quantized_model_is_refused_when_it_is_loaded(prepare):
    said = exits(prepare, GATE, "--quantization", "w8a8_int8")
    assert "because it is quantized (w8a8_int8), of which" in said


@pytest.mark.parametrize(
    ("name", "dtype", "refused"),
    [
        ("auto", torch.float16, False),
        ("bf16", torch.bfloat16, False),
        ("bf16", torch.float16, True),
        ("bfloat16", torch.float32, True),
    ],
)
def test_columns_have_the_type_of_the_model(name, dtype, refused):
    config = SimpleNamespace(dtype=dtype)
    args = SimpleNamespace(kv_cache_dtype=name, _model_config=config)
    if not refused:
        refused_models.refuse_column_type(args)
        return
    with pytest.raises(GateError, match=f"--kv-cache-dtype is {name}, but the model's type"):
        refused_models.refuse_column_type(args)


def test_columns_that_a_checkpoint_scales_are_refused():
    model = torch.nn.Sequential(torch.nn.Identity())
    runner = SimpleNamespace(model=model, dtype=torch.bfloat16, kv_cache_dtype=torch.bfloat16)
    refused_models.refuse_columns(runner)
    model[0].k_scale_float = 1.0
    refused_models.refuse_columns(runner)
    model[0].k_scale_float = 0.5
    with pytest.raises(GateError, match="because 0 scales its K/V columns"):
        refused_models.refuse_columns(runner)
    runner.kv_cache_dtype = torch.float8_e4m3fn
    with pytest.raises(GateError, match=r"K/V columns are torch\.float8_e4m3fn and it computes in"):
        refused_models.refuse_columns(runner)


@pytest.mark.parametrize("kind", ["decoder_bidirectional", "encoder_only"])
def test_a_prompt_that_sees_its_later_tokens_is_refused(kind):
    """HRM-Text's on the stock path: the gate cut such prompts, which SGLang leaves whole."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    model = torch.nn.Sequential(RadixAttention(2, 8, 1.0, 2, 0))
    refused_models.refuse_other_masks(model, GateConfig(rows=8))
    model.append(RadixAttention(2, 8, 1.0, 2, 1, attn_type=AttentionType(kind)))
    with pytest.raises(GateError, match=rf"because 1 lets tokens .* later ones \({kind}\): serve"):
        refused_models.refuse_other_masks(model, GateConfig(rows=8))
    refused_models.refuse_other_masks(model, GateConfig(rows=8, policy="observe"))
