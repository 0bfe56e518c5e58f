"""Families whose rows depend on their number and company on a CPU: same answers, same experts.

Mixtures of experts, windows and the text of a vision model in float32; a dense model in FP8 and in
4 bits; a mixture in FP8 in blocks and by outputs, and in 4 bits, and gpt-oss in MXFP4.
"""

from __future__ import annotations

import base64
import json
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from checks import (
    assert_clean,
    changed_in_company,
    changed_of_all,
    experts_of_tokens,
    forced,
)
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from transformers import AutoConfig

from benchmark.bench import checkpoints
from benchmark.models import four_bits, fp8_blocks, fp8_channels, mxfp4
from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.servers import retracting
from margingate.harness.tiny_models import FAMILIES, tiny_model
from margingate.runtime.compat.compute.quantization import has_experts

TOKENS = 16  # of an answer
DENSE = "qwen3"
IN_BLOCKS = (DENSE, "qwen3_moe-blocks")  # in FP8 with a scale a block, between layers in BF16
CHANNELS = "w8a8"  # a mixture in FP8 with a scale an output, beside those in blocks
PACKED, GROUP = ("gptq", "awq"), 32  # the dense model in 4 bits; inputs that share a scale
EXPERTS_PACKED = "gptq-experts"  # a mixture so
MXFP4, PUBLISHED = "mxfp4", "gpt_oss"  # the latter's experts as its published checkpoints have them
# What each is made of, beside those in FP8 blocks.
QUANTIZED = dict.fromkeys(PACKED, DENSE) | {
    **dict.fromkeys((EXPERTS_PACKED, CHANNELS), IN_BLOCKS[1]),
    MXFP4: PUBLISHED,
}
WINDOWED, LONGER = "gemma3_text", 40  # tokens of an answer, so that its windows of 16 are passed
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2}
EXPERTS = {"return_routed_experts": True}


@pytest.fixture(scope="module", params=[*FAMILIES, *QUANTIZED, "qwen3_vl"])
def model(request: pytest.FixtureRequest, run_folder: Path, tmp_path_factory) -> Path:
    """In place of SmolLM2: a family's tiny model, so a server of each, one after the other."""
    packed = request.param in (*PACKED, EXPERTS_PACKED)
    folder = tiny_model(QUANTIZED.get(request.param, request.param), run_folder)
    named = packed or request.param == MXFP4
    rounded = tmp_path_factory.mktemp("model") / (request.param if named else "fp8")
    if packed:
        four_bits.make(request.param.partition("-")[0], folder, rounded, GROUP)
    elif request.param == MXFP4:
        mxfp4.make(folder, rounded)
    elif request.param in IN_BLOCKS:
        fp8_blocks.make(folder, rounded)
    elif request.param == CHANNELS:
        fp8_channels.make(folder, rounded)
    return rounded if rounded.exists() else folder


@pytest.fixture(scope="module")
def dtype(model: Path) -> tuple[str, str]:
    """What a server of this model is started with; SGLang has no rounded layers in float32, and
    keeps the scales of GPTQ's experts in float16.
    """
    if model.name == EXPERTS_PACKED:
        return ("--dtype", "float16")
    return ("--dtype", "bfloat16" if model.name in ("fp8", MXFP4, *PACKED) else "float32")


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[Prompt]:
    """8 prompts, two of each data set."""
    pairs = read_prompts(PROMPTS)
    return chat_prompts([pair for i, pair in enumerate(pairs) if i % 6 < 2], model)


@pytest.fixture(scope="module")
def chosen(model: Path) -> int:
    """How many experts the model's layers choose for a token, all together; 0 without any."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    mixture = model.name != MXFP4 and has_experts(SimpleNamespace(hf_text_config=config))
    return config.num_hidden_layers * config.num_experts_per_tok if mixture else 0


@pytest.fixture(scope="module")
def ask(chosen: int) -> dict[str, object]:
    """What an answer is to bring beside its tokens."""
    return LOGPROBS | (EXPERTS if chosen else {})


@pytest.fixture(scope="module")
def experts_of(chosen: int) -> tuple[str, ...]:
    """The option, for a mixture."""
    return ("--enable-return-routed-experts",) if chosen else ()


@pytest.fixture(scope="module")
def client(start, model: Path, dtype, experts_of) -> Client:
    """Of a server that retracts a request in every few forwards; alone there is none to retract."""
    args = ("--gate-debug", "--gate-inject-faults", *experts_of)
    server = start(*dtype, *args, stock_path=False, env=retracting(5))
    return Client(server.base_url, LONGER if model.name.endswith(WINDOWED) else TOKENS)


@pytest.fixture(scope="module")
def alone(client, prompts, ask) -> list[Answer]:
    """Each prompt's answer alone, nothing cached."""
    client.flush()
    return client.alone(prompts, **ask)


def test_each_token_but_the_last_has_its_experts(client, prompts, alone, chosen):
    """And they are those that prompt and answer have as one prompt, but for near-ties where a
    prefill has other bits than a decode step.
    """
    if not chosen:
        pytest.skip("this model routes nothing")
    whole, kept = [], []
    for prompt, answer in zip(prompts, alone, strict=True):
        kept.append(experts_of_tokens(answer, chosen))
        assert len(kept[-1]) == len(prompt.input_ids) + len(answer.tokens) - 1
        whole.append(Prompt(prompt.name, (*prompt.input_ids, *answer.tokens)))
    scored = client.together(whole, sampling_params={"max_new_tokens": 0}, **EXPERTS)
    found = {answer.name: experts_of_tokens(answer, chosen) for answer in scored}
    pairs = [
        pair
        for prompt, rows in zip(prompts, kept, strict=True)
        for pair in zip(rows, found[prompt.name], strict=True)
    ]
    other = sum(one != two for one, two in pairs)
    assert other <= (0 if client.gate_state()["scores"] == "as_decoded" else len(pairs) // 100)


def test_batched_shuffled_cached_and_retracted(client, prompts, alone, ask):
    """One request at a time is retracted, so that each batch has answers of both kinds."""
    assert changed_of_all(alone, client.alone(prompts, **ask)) == [], (
        "alone, with the prompts cached"
    )
    assert all(answer.meta["num_retractions"] == 0 for answer in alone)
    retracted = []
    for seed in range(2):
        order = random.Random(seed).sample(prompts, len(prompts))
        cached = client.together(order, **ask)
        assert changed_of_all(alone, cached) == [], "batched, with the prompts cached"
        # Whole chunks of a prompt are: a short one has none.
        assert any(answer.meta["cached_tokens"] > 0 for answer in cached)
        client.flush()
        cold = client.together(order, **ask)
        assert changed_of_all(alone, cold) == [], "batched, nothing cached at first"
        retracted += [answer.meta["num_retractions"] for answer in (*cached, *cold)]
    assert client.gate_state()["largest_batch"] >= 6
    assert retracted.count(0) >= 4 and sum(retracted) >= 4, retracted
    assert_clean(client)


def test_forced_flips_are_repaired(client, prompts, alone, ask):
    client.flush()
    answers = client.together(prompts, sampling_params=forced([1, 5, 6, 13]), **ask)
    assert changed_of_all(alone, answers) == []
    assert all(answer.meta["gate"]["flips"] >= 2 for answer in answers)
    assert_clean(client)


def test_forced_flips_at_the_edge_of_a_window(client, model, prompts):
    """The first row that has left a key of the prompt behind, and 1, 2 and 200 rows behind it;
    while it is repaired, the rows behind it have windows of its column, or none of it any more.
    """
    if not model.name.endswith(WINDOWED):
        pytest.skip("this model sees everything")
    tokens = 4  # of the prompt
    window = AutoConfig.from_pretrained(model).sliding_window  # with the row's own key
    edge = window - tokens + 1  # its column is at position `window`
    short, params = Prompt("short", prompts[0].input_ids[:tokens]), {"max_new_tokens": 230}
    client.flush()
    reference = client.alone([short], sampling_params=params, **LOGPROBS)
    assert len(reference[0].tokens) == 230
    each = [edge, edge + 1, edge + 2, edge + 200]
    for rows in (*([row] for row in each), each):
        (answer,) = client.alone([short], sampling_params=params | forced(rows), **LOGPROBS)
        assert changed_of_all(reference, [answer]) == [], rows
        assert answer.meta["gate"]["flips"] == len(rows), (rows, answer.meta["gate"])
    beside = [short, *prompts[:3]]
    answers = client.together(beside, sampling_params=params | forced(each), **LOGPROBS)
    assert changed_of_all(reference, answers[:1]) == []
    assert_clean(client)


@pytest.fixture(scope="module")
def method(model: Path) -> dict[str, object]:
    """What the model says of its quantization; nothing where it has none."""
    config = json.loads((model / "config.json").read_text())
    found: dict[str, object] = config.get("quantization_config", {})
    return found


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory) -> Path:
    """The same model with its first two layers in each other's place: other weights, one form."""
    config, tensors = checkpoints.read(model)
    places = {"model.layers.0.": "model.layers.1.", "model.layers.1.": "model.layers.0."}

    def moved(name: str) -> str:
        own = name[: len("model.layers.0.")]
        return places.get(own, own) + name[len(own) :]

    folder: Path = tmp_path_factory.mktemp("other") / model.name
    checkpoints.write(folder, model, config, {moved(name): each for name, each in tensors.items()})
    return folder


def post(client: Client, path: str, **body: object) -> requests.Response:
    return requests.post(f"{client.base_url}/{path}", json=body, timeout=120)


def tensors_of(folder: Path) -> dict[str, object]:
    """As /update_weights_from_tensor takes them, of one rank. By themselves those in FP8 could not
    be read: torch pickles them in a way that SGLang does not let pass.
    """
    bucket = FlattenedTensorBucket(list(checkpoints.read(folder)[1].items()))
    content = {
        "flattened_tensor": bucket.get_flattened_tensor(),
        "metadata": bucket.get_metadata(),
    }
    sent = base64.b64encode(pickle.dumps(content)).decode()
    return {"serialized_named_tensors": [sent], "load_format": "flattened_bucket"}


def test_other_weights_in_blocks_and_these_again(
    client, model, other, method, prompts, alone, ask, start, dtype, experts_of
):
    """From disk, and back by tensors in a session: the answers are those of fresh servers."""
    if "weight_block_size" not in method:
        pytest.skip("these are not in FP8 blocks")
    before = client.gate_state()["fingerprint"]
    assert post(client, "update_weights_from_disk", model_path=str(other)).ok
    others = client.alone(prompts, **ask)
    assert len(changed_of_all(alone, others)) > len(prompts) // 2, "the weights are others"
    assert changed_of_all(others, client.together(prompts, **ask)) == []
    marks = {answer.meta["gate"]["fingerprint"] for answer in others}
    for path, body in (
        ("begin_weight_update", {}),
        ("update_weights_from_tensor", tensors_of(model)),
        ("end_weight_update", {}),
    ):
        assert post(client, path, **body).ok
    assert changed_of_all(alone, client.together(prompts, **ask)) == []
    assert changed_of_all(alone, client.alone(prompts, **ask)) == []
    assert client.gate_state()["fingerprint"] == before and before not in marks
    assert_clean(client)
    if experts_of:  # one of the two is enough
        fresh = Client(
            start(*dtype, *experts_of, "--model-path", str(other), stock_path=False).base_url,
            TOKENS,
        )
        assert changed_of_all(others, fresh.together(prompts, **ask)) == []


def test_weights_that_sglang_keeps_in_another_form_stay(
    client, model, other, method, prompts, alone, ask
):
    """By whatever way: SGLang would end half way, and the server with it."""
    if not method or "weight_block_size" in method:
        pytest.skip("SGLang loads into these")
    before = client.gate_state()
    for path, body in (
        ("begin_weight_update", {}),
        ("update_weights_from_disk", {"model_path": str(other)}),
        ("update_weights_from_tensor", tensors_of(other)),
    ):
        refused = post(client, path, **body)
        assert refused.status_code == 400
        assert "SGLang keeps those of model.layers.0." in refused.json()["message"]
    assert changed_of_all(alone[:3], client.together(prompts[:3], **ask)) == []
    after = client.gate_state()
    assert (after["fingerprint"], after["weight_generation"]) == (
        (before["fingerprint"], before["weight_generation"])
    )
    assert_clean(client)


@pytest.mark.parametrize("model", ["mixtral", *IN_BLOCKS], indirect=True, scope="module")
def test_the_stock_server_does_not_pass(start, dtype, prompts, ask, experts_of):
    """The control, by the same comparison: what it answers alone it repeats, but not in a batch."""
    client = Client(start(*dtype, *experts_of, gate=False).base_url, 4 * TOKENS)  # BF16 hides most
    alone = client.alone(prompts, **ask)
    client.flush()
    assert changed_of_all(alone, client.alone(prompts, **ask)) == []
    assert changed_in_company(client, prompts, alone, **ask)
