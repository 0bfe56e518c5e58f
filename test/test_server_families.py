"""Families whose rows depend on their number and company on a CPU: same answers.

Mixtures of experts, windows and a vision model in float32; a dense model in FP8 and in 4 bits; a
mixture in FP8, and gpt-oss in MXFP4.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from checks import assert_clean, forced
from PIL import Image

from benchmark.models import four_bits, fp8_blocks, mxfp4
from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.servers import retracting
from margingate.harness.tiny_models import FAMILIES, tiny_model

TOKENS = 16  # of an answer
DENSE = "qwen3"
IN_BLOCKS = (DENSE, "qwen3_moe-blocks")  # in FP8 with a scale a block, between layers in BF16
PACKED, GROUP = ("gptq", "awq"), 32  # the dense model in 4 bits; inputs that share a scale
MXFP4, PUBLISHED = (
    "mxfp4",
    "gpt_oss",
)  # the latter's experts, as its published checkpoints have them
WINDOWED, LONGER = "gemma3_text", 40  # tokens of an answer, so that its windows of 16 are passed
ASK = {"return_logprob": True, "top_logprobs_num": 2}


@pytest.fixture(scope="module", params=[*FAMILIES, *PACKED, MXFP4, "qwen3_vl"])
def model(request: pytest.FixtureRequest, run_folder: Path, tmp_path_factory) -> Path:
    """In place of SmolLM2: a family's tiny model, so a server of each, one after the other."""
    packed = request.param in PACKED
    made_of = {MXFP4: PUBLISHED} | dict.fromkeys(PACKED, DENSE)
    folder = tiny_model(made_of.get(request.param, request.param), run_folder)
    rounded = tmp_path_factory.mktemp("model") / (
        request.param if made_of.get(request.param) else "fp8"
    )
    if packed:
        four_bits.make(request.param, folder, rounded, GROUP)
    elif request.param == MXFP4:
        mxfp4.make(folder, rounded)
    elif request.param in IN_BLOCKS:
        fp8_blocks.make(folder, rounded)
    return rounded if rounded.exists() else folder


@pytest.fixture(scope="module")
def dtype(model: Path) -> tuple[str, str]:
    """What a server of this model is started with; SGLang has no rounded layers in float32."""
    return ("--dtype", "bfloat16" if model.name in ("fp8", MXFP4, *PACKED) else "float32")


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[Prompt]:
    """8 prompts, two of each data set."""
    pairs = read_prompts(PROMPTS)
    return chat_prompts([pair for i, pair in enumerate(pairs) if i % 6 < 2], model)


@pytest.fixture(scope="module")
def client(start, model: Path, dtype) -> Client:
    """Of a server that retracts a request in every few forwards; alone there is none to retract."""
    args = ("--gate-debug", "--gate-inject-faults")
    server = start(*dtype, *args, stock_path=False, env=retracting(5))
    return Client(server.base_url, LONGER if model.name.endswith(WINDOWED) else TOKENS)


@pytest.fixture(scope="module")
def alone(client, prompts) -> list[Answer]:
    """Each prompt's answer alone, nothing cached."""
    client.flush()
    return client.alone(prompts, **ASK)


def changed(reference: Sequence[Answer], answers: Sequence[Answer]) -> list[str]:
    """The names of answers whose tokens, text or log-probs are not those of the reference."""
    wanted = {answer.name: readings(answer) for answer in reference}
    assert sorted(wanted) == sorted(answer.name for answer in answers)
    return [answer.name for answer in answers if readings(answer) != wanted[answer.name]]


def readings(answer: Answer) -> tuple[object, ...]:
    logprobs = answer.meta["output_token_logprobs"], answer.meta["output_top_logprobs"]
    assert len(logprobs[0]) == len(answer.tokens) > 0
    return (answer.tokens, answer.text, *logprobs)


def test_batched_shuffled_cached_and_retracted(client, prompts, alone):
    """One request at a time is retracted, so that each batch has answers of both kinds."""
    assert changed(alone, client.alone(prompts, **ASK)) == [], "alone, with the prompts cached"
    assert all(answer.meta["num_retractions"] == 0 for answer in alone)
    retracted = []
    for seed in range(2):
        order = random.Random(seed).sample(prompts, len(prompts))
        cached = client.together(order, **ASK)
        assert changed(alone, cached) == [], "batched, with the prompts cached"
        # Whole chunks of a prompt are: a short one has none.
        assert any(answer.meta["cached_tokens"] > 0 for answer in cached)
        client.flush()
        cold = client.together(order, **ASK)
        assert changed(alone, cold) == [], "batched, nothing cached at first"
        retracted += [answer.meta["num_retractions"] for answer in (*cached, *cold)]
    assert client.gate_state()["largest_batch"] >= 6
    assert retracted.count(0) >= 4 and sum(retracted) >= 4, retracted
    assert_clean(client)


def test_forced_flips_are_repaired(client, prompts, alone):
    client.flush()
    answers = client.together(prompts, sampling_params=forced([1, 5, 6, 13]), **ASK)
    assert changed(alone, answers) == []
    assert all(answer.meta["gate"]["flips"] >= 2 for answer in answers)
    assert_clean(client)


def test_images_are_refused_unless_the_request_opts_out(client, model, prompts, alone):
    """On a vision model; what it is answered then is beside gated text, and in no gated part."""
    if not model.name.endswith("_vl"):
        pytest.skip("this model takes no images")
    body = with_image({"temperature": 0, "max_new_tokens": 4})
    url = f"{client.base_url}/generate"
    reply = requests.post(url, json=body, timeout=60)
    assert reply.status_code == 400 and "this request has images, video or sound" in reply.text
    body = with_image({**body["sampling_params"], "deterministic": False})
    client.flush()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(requests.post, url, json=body, timeout=120) for _ in range(2)]
        beside = client.together(prompts, **ASK)
        served = [each.result().json()["meta_info"]["gate"] for each in asked]
    assert changed(alone, beside) == [], "beside images"
    assert [record["gated"] for record in served] == [False, False]
    assert "deterministic is false" in served[0]["because"]
    assert_clean(client)


def with_image(params: dict[str, object]) -> dict[str, object]:
    """The body of a request to /generate with a red image of 96 by 64."""
    content = io.BytesIO()
    Image.new("RGB", (96, 64), (200, 30, 40)).save(content, "PNG")
    data = base64.b64encode(content.getvalue()).decode()
    text = "<|vision_start|><|image_pad|><|vision_end|>What is this?"
    image = f"data:image/png;base64,{data}"
    return {"text": text, "image_data": image, "sampling_params": params}


@pytest.mark.parametrize("model", ["mixtral", *IN_BLOCKS], indirect=True, scope="module")
def test_the_stock_server_does_not_pass(start, dtype, prompts):
    """The control, by the same comparison: what it answers alone it repeats, but not in a batch."""
    client = Client(start(*dtype, gate=False).base_url, TOKENS)
    alone = client.alone(prompts, **ASK)
    client.flush()
    assert changed(alone, client.alone(prompts, **ASK)) == []
    client.flush()
    assert changed(alone, client.together(prompts, **ASK))
