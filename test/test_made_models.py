"""Scripts that make model folders: a quantized weight is the weight within its rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmark.bench import checkpoints
from benchmark.bench.engines import sizes
from benchmark.models import (
    four_bits,
    fp8_blocks,
    fp8_channels,
    fp8_static,
    mxfp4,
    padded,
    random_mxfp4,
    random_weights,
    upcycled,
)
from margingate.errors import CliError
from margingate.harness.embedded_model import ensure_model
from margingate.harness.tiny_models import FAMILIES, tiny_model

TOKENS = torch.tensor([[1, 72, 1904, 30, 5, 411, 9]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's first layer, with its sizes."""
    source, folder = ensure_model("smollm2"), tmp_path_factory.mktemp("llama")
    tensors = load_file(source / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "layers." not in n or "layers.0." in n}
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    checkpoints.write(folder, source, config, kept)
    return folder


def made(monkeypatch, script, *arguments: object) -> tuple[dict, dict]:
    """The configuration and the tensors of the folder that a script makes, its last argument."""
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
    script.main()
    return checkpoints.read(Path(str(arguments[-1])))


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits[0]


CONFIGS = Path(fp8_blocks.__file__).parent / "configs"


def test_random_weights_have_the_sizes_and_a_usual_scale_and_can_be_rounded(tmp_path):
    """Of a shape in FP8, with fewer and smaller experts."""
    said = json.loads((CONFIGS / "qwen3-30b-a3b-fp8" / "config.json").read_text())
    said |= {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4}
    said |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 640}
    (tmp_path / "config.json").write_text(json.dumps(said))
    random_weights.make(tmp_path, tmp_path / "made", layers=1)
    config, tensors = checkpoints.read(tmp_path / "made")
    assert "quantization_config" not in config and config["num_hidden_layers"] == 1
    expert = tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    assert expert.dtype == torch.bfloat16 and expert.shape == (128, 128)
    assert 0.9 < expert.float().std() * 128**0.5 < 1.1
    assert (tmp_path / "made" / "tokenizer.json").exists()
    fp8_blocks.make(tmp_path / "made", tmp_path / "rounded")
    _, rounded = checkpoints.read(tmp_path / "rounded")
    assert rounded["model.layers.0.mlp.experts.3.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert rounded["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-30b-a3b", 61.1), ("qwen3-30b-a3b-fp8", 31.1), ("qwen3-8b-fp8", 9.4)],
)
def test_a_shape_takes_as_many_bytes_as_its_weights(name, billions):
    weights, token = sizes(json.loads((CONFIGS / name / "config.json").read_text()))
    assert weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert token == 2 * 2 * (36 * 8 if "8b-fp8" in name else 48 * 4) * 128


def test_gpt_oss_takes_the_bytes_of_its_published_checkpoint():
    """gpt-oss-20b: 13.76 GB. In BF16 41.8 GB."""
    said = json.loads((CONFIGS / "gpt-oss-20b" / "config.json").read_text())
    in_bf16, _ = sizes(said)
    weights, token = sizes(random_mxfp4.configured(said, None))
    assert (weights / 1e9, in_bf16 / 1e9) == (
        pytest.approx(13.76, rel=0.01),
        pytest.approx(41.8, rel=0.01),
    )
    assert token == 2 * 2 * 24 * 8 * 64


def test_random_mxfp4_has_the_names_and_a_usual_scale(monkeypatch, tmp_path):
    """Of gpt-oss-20b's shape, with smaller layers; read by the names that SGLang loads."""
    said = json.loads((CONFIGS / "gpt-oss-20b" / "config.json").read_text())
    said |= {"hidden_size": 128, "intermediate_size": 96, "num_local_experts": 4}
    said |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 640,
        "pad_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    config, tensors = made(monkeypatch, random_mxfp4, "--layers", 2, tmp_path, tmp_path / "made")
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (2, 2)
    experts = "model.layers.1.mlp.experts"
    shapes = {name: list(tensors[f"{experts}.{name}"].shape) for name in PUBLISHED}
    assert shapes == {
        "gate_up_proj_blocks": [4, 192, 4, 16],
        "gate_up_proj_scales": [4, 192, 4],
        "gate_up_proj_bias": [4, 192],
        "down_proj_blocks": [4, 128, 3, 16],
        "down_proj_scales": [4, 128, 3],
        "down_proj_bias": [4, 128],
    }
    weight = mxfp4.from_blocks(*(tensors[f"{experts}.down_proj_{n}"] for n in ("blocks", "scales")))
    assert 0.9 < weight.std() * 96**0.5 < 1.1 and abs(weight.mean()) < 0.01
    assert tensors["model.layers.0.self_attn.sinks"].shape == (2,)
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in tensors)
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)


PUBLISHED = tuple(
    f"{layer}_{part}"
    for layer in ("gate_up_proj", "down_proj")
    for part in ("blocks", "scales", "bias")
)


def test_gpt_oss_in_mxfp4_by_plain_rounding(monkeypatch, tmp_path):
    source = tiny_model("gpt_oss", tmp_path)
    before = load_file(source / "model.safetensors")
    _, after = made(monkeypatch, mxfp4, source, tmp_path / "rounded")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = mxfp4.from_blocks(after[f"{name}_blocks"], after[f"{name}_scales"])
    error = (found - before[name].transpose(1, 2)).square().mean().sqrt()
    assert error < 0.15 * before[name].std(), "an output's inputs are a row, as they share scales"
    assert name not in after and torch.equal(
        after[f"{name}_bias"], before[f"{name}_bias"].to(torch.bfloat16)
    )


def test_fp8_by_blocks(monkeypatch, llama, tmp_path):
    """Edges are smaller blocks: 576 are four and a half."""
    before = load_file(llama / "model.safetensors")
    config, after = made(monkeypatch, fp8_blocks, llama, tmp_path)
    method = config["quantization_config"]
    assert (method["quant_method"], method["weight_block_size"]) == ("fp8", [128, 128])
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, scales = after[name], after[f"{name}_scale_inv"]
    assert weight.dtype == torch.float8_e4m3fn and scales.shape == (5, 5)
    for rows in range(0, 576, 128):
        for columns in range(0, 576, 128):
            block = before[name][rows : rows + 128, columns : columns + 128].float()
            scale = scales[rows // 128, columns // 128]
            torch.testing.assert_close(scale, block.abs().max() / 448)
            found = weight[rows : rows + 128, columns : columns + 128].float() * scale
            # Three bits behind the point, and below 2 ** -6 steps of 2 ** -9.
            assert (
                (found - block).abs() <= (block.abs() / 16).clamp(min=scale / 1024) * 1.001
            ).all()
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in after.values()) == 7


def test_fp8_by_outputs(monkeypatch, llama, tmp_path):
    before = load_file(llama / "model.safetensors")
    config, after = made(monkeypatch, fp8_channels, llama, tmp_path)
    assert config["quantization_config"] == {"quant_method": "w8a8_fp8"}
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, scales, plain = after[name], after[f"{name}_scale"], before[name].float()
    assert weight.dtype == torch.float8_e4m3fn and scales.shape == (576, 1)
    torch.testing.assert_close(scales[:, 0], plain.abs().amax(1) / 448)
    off = (weight.float() * scales - plain).abs()
    assert (off <= torch.maximum(plain.abs() / 16, scales / 1024) * 1.001).all()
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in after.values()) == 7
    zeros, ones = fp8_channels.to_channels(torch.zeros(2, 3))
    assert not zeros.float().any() and torch.equal(ones, torch.ones(2, 1))


def test_fp8_by_one_scale_each(monkeypatch, llama, tmp_path):
    before = load_file(llama / "model.safetensors")
    config, after = made(monkeypatch, fp8_static, llama, tmp_path)
    assert config["quantization_config"] == {"quant_method": "fp8", "activation_scheme": "static"}
    name = "model.layers.0.self_attn.q_proj"
    weight, scale, plain = (
        after[f"{name}.weight"],
        after[f"{name}.weight_scale"],
        before[f"{name}.weight"],
    )
    torch.testing.assert_close(scale, plain.float().abs().max() / 448)
    off = (weight.float() * scale - plain.float()).abs()
    assert (off <= (plain.float().abs() / 16).clamp(min=scale / 1024) * 1.001).all()
    given = [tensor for key, tensor in after.items() if key.endswith("input_scale")]
    assert len(given) == 7 and all(float(each) == pytest.approx(32 / 448) for each in given)


def test_fp8_of_zeros_and_of_the_largest():
    weight = torch.zeros(130, 3)
    weight[129] = torch.tensor([-1.0, 0.5, 3e-9])
    again = fp8_blocks.from_blocks(*fp8_blocks.to_blocks(weight))
    torch.testing.assert_close(again, weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "group"), [("gptq", 64), ("awq", 64), ("awq", 32)])
def test_four_bits(monkeypatch, llama, tmp_path, form, group):
    """Unpacked here by the formats' definitions, without the script's own functions."""
    before = load_file(llama / "model.safetensors")
    config, after = made(monkeypatch, four_bits, "--group", group, form, llama, tmp_path)
    assert config["quantization_config"]["group_size"] == group
    layers = [name.removesuffix(".qweight") for name in after if name.endswith(".qweight")]
    assert len(layers) == 7
    for layer in layers:
        weight = before[f"{layer}.weight"].float()
        zeros, scales = nibbles(after[f"{layer}.qzeros"]), after[f"{layer}.scales"].float()
        if form == "gptq":
            values, zeros = nibbles(after[f"{layer}.qweight"].t().contiguous()).t(), zeros + 1
            assert (zeros == 8).all()
            own = after[f"{layer}.g_idx"].long()
            assert own.tolist() == [place // group for place in range(weight.shape[1])]
        else:
            values = awq_columns(nibbles(after[f"{layer}.qweight"]))
            zeros, own = awq_columns(zeros), torch.arange(weight.shape[1]) // group
        found = ((values - zeros[own]) * scales[own]).t()
        steps = (found - weight).abs() / scales[own].t()
        assert steps.max() <= (0.52 if form == "gptq" else 1.05), layer
        assert steps.mean() < 0.3


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of int32 as [rows, 8 * columns], the lowest four bits first."""
    assert words.dtype == torch.int32
    return torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1)


def awq_columns(values: torch.Tensor) -> torch.Tensor:
    """AWQ's order undone: the second four bits hold column 2, the fifth column 1."""
    eights = values.view(len(values), -1, 8)
    return eights[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)


def test_groups_that_do_not_fit_are_one_sentence(monkeypatch, llama, tmp_path):
    with pytest.raises(SystemExit, match=r"has 576 inputs, not in whole groups of 128: give anoth"):
        made(monkeypatch, four_bits, "gptq", llama, tmp_path)


def test_padding_keeps_the_function(monkeypatch, llama, tmp_path):
    config, after = made(monkeypatch, padded, llama, tmp_path)
    sizes = {size for name, t in after.items() for size in t.shape if "norm" not in name}
    assert sizes == {768, 256, 1536, config["vocab_size"]}
    wanted, found = logits(llama), logits(tmp_path)
    assert (found - wanted).abs().max() < 0.02 * wanted.std()  # norms are rounded once more
    assert fp8_blocks.to_blocks(after["model.layers.0.self_attn.k_proj.weight"])[1].shape == (2, 6)
    qwen2 = made(monkeypatch, padded, "--qwen2", llama, tmp_path / "qwen2")[0]
    assert qwen2["architectures"] == ["Qwen2ForCausalLM"]
    assert torch.equal(logits(tmp_path / "qwen2"), found)


def test_experts_without_noise_are_the_model_and_with_it_are_not(monkeypatch, llama, tmp_path):
    config, after = made(monkeypatch, upcycled, "--noise", "0", llama, tmp_path / "same")
    assert config["model_type"] == "mixtral" and config["num_local_experts"] == 8
    wanted = logits(llama)
    torch.testing.assert_close(logits(tmp_path / "same"), wanted, rtol=1e-4, atol=1e-3)
    moved = made(monkeypatch, upcycled, "--noise", "0.05", llama, tmp_path / "moved")[1]
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    one, other, own = (
        t.float() for t in (moved[name.format(0)], moved[name.format(7)], after[name.format(0)])
    )
    noise = (one - own).square().mean() ** 0.5 / own.square().mean() ** 0.5
    assert 0.045 < noise < 0.055 and not torch.equal(one, other)
    assert (logits(tmp_path / "moved") - wanted).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_has_usual_margins_and_does_not_repeat_itself(family, tmp_path):
    folder = tiny_model(family, tmp_path)
    assert tiny_model(family, tmp_path) == folder and [*tmp_path.iterdir()] == [folder]
    found = logits(folder)
    top = found.topk(2).values
    assert 2 < found.std() < 4 and 0.1 < (top[:, 0] - top[:, 1]).median() < 2
    assert len(set(found.argmax(-1).tolist())) >= len(found) - 1


def test_a_family_that_is_not_known_is_one_sentence(tmp_path):
    with pytest.raises(
        CliError, match=r"family 'llama'; choose one of: gemma3_text, glm4_moe, gpt_oss, mixtral"
    ):
        tiny_model("llama", tmp_path)
