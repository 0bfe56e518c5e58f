"""Images: what names one, which are gated, how they are encoded, and where their rows stand."""

from __future__ import annotations

import base64
import io
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from request_stand_in import CONFIG, classify, request
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputFormat,
    MultimodalInputs,
)
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.multimodal_cache import MultiModalStaticCache

from margingate.core.ledger import Row
from margingate.harness.pictures import SIZES, drawn, plain
from margingate.harness.tiny_models import tiny_model
from margingate.runtime.client import parameter_types
from margingate.runtime.compat.model import images
from margingate.runtime.probe.checks import check_images
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.request.admission import queue
from margingate.runtime.schedule.prefill_admission import Admission
from margingate.runtime.verify.rows import row_input
from margingate.runtime.verify.verifier import RowInput, Verifier

VOCABULARY = 1_000_000
GRID = (1, 4, 6)


def image(grid: tuple[int, int, int] = GRID, start: int = 2, **changes: Any) -> Any:
    """One of equal patches, as SGLang's processor makes it; its tokens begin at `start`."""
    frames, height, width = grid
    feature = torch.ones(frames * height * width, 8)
    data = {"image_grid_thw": torch.tensor([grid])}
    given = {"modality": Modality.IMAGE, "feature": feature, "model_specific_data": data}
    tokens = frames * height * width // 4
    item = MultimodalDataItem(**{**given, "offsets": [(start, start + tokens - 1)], **changes})
    item.set_pad_value()
    return item


def carrying(*items: Any, custom: Any = None, length: int = 12, delta: int = -3) -> Any:
    """A request that SGLang has padded by its own names of the images."""
    req = request(custom)
    classify(req, CONFIG)
    ids = array("q", range(length))
    for item in items:
        for start, end in item.offsets:
            ids[start : end + 1] = array("q", images.padding(item, end + 1 - start))
    req.origin_input_ids, req.to_finish = ids, None
    req.multimodal_inputs = MultimodalInputs(mm_items=list(items))
    req.multimodal_inputs.mrope_positions = torch.arange(length).repeat(3, 1)
    req.multimodal_inputs.mrope_position_delta = torch.tensor([[delta]])
    return req


def queued(req: Any, images_fail: str = "") -> str:
    """The sentence that it is answered with; empty where it is served."""
    said: list[str] = []
    req.set_finish_with_abort = said.append
    queue(req, images_fail)
    return said[0] if said else ""


# Names


def test_the_same_image_has_the_same_tokens_and_text_keeps_its_own():
    first, second = carrying(image()), carrying(image())
    assert not queued(first) and not queued(second)
    assert first.origin_input_ids == second.origin_input_ids
    assert first.origin_input_ids[:2] == array("q", [0, 1])
    assert first.origin_input_ids[8:] == array("q", range(8, 12))
    assert min(first.origin_input_ids[2:8]) >= VOCABULARY, "no client can send these"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (image((1, 4, 6)), image((1, 6, 4))),
        (image(), image(feature=torch.zeros(24, 8))),
        (image(), image(feature=torch.ones(24, 8, dtype=torch.float64)[:, :4])),
        (image(), image(modality=Modality.VIDEO)),
        (image(hash=7), image(hash=8)),
        (image(hash=7), image(hash=7, format=MultimodalInputFormat.PROCESSOR_OUTPUT)),
    ],
)
def test_two_images_share_no_token_and_no_embedding(one, other):
    """One colour upright and lying, other patches, another kind, what a client brought encoded."""
    first, second = carrying(one), carrying(other)
    queued(first), queued(second)
    padded = [set(req.origin_input_ids[2:8]) for req in (first, second)]
    assert padded[0] and not padded[0] & padded[1]
    assert one.hash != other.hash, "what the cache of embeddings is asked for"
    assert first.gate.prompt != second.gate.prompt


def test_sglang_alone_takes_one_colour_lying_for_upright():
    """Why the grid is in the name. Goes when SGLang has it there."""
    lying, upright = image((1, 4, 6)), image((1, 6, 4))
    assert lying.hash == upright.hash and lying.pad_value == upright.pad_value


def test_a_name_is_given_once():
    """A retracted request is queued again."""
    req = carrying(image())
    queued(req)
    ids, prompt = req.origin_input_ids[:], req.gate.prompt
    queued(req)
    assert req.origin_input_ids == ids and req.gate.prompt == prompt
    images.name_all(req)  # as for a session that queues its images again
    assert req.origin_input_ids == ids


def test_names_end_where_the_prompt_was_cut():
    req = carrying(image())
    req.origin_input_ids = req.origin_input_ids[:5]
    images.name_all(req)
    assert len(req.origin_input_ids) == 5 and min(req.origin_input_ids[2:]) >= VOCABULARY


def test_a_client_names_no_image():
    assert parameter_types.named_media(SimpleNamespace(mm_hashes=None)) == ""
    assert parameter_types.named_media(SimpleNamespace()) == ""
    said = parameter_types.named_media(SimpleNamespace(mm_hashes=["ab"]))
    assert said.startswith("mm_hashes name images")


# Which are gated


SENTENCE = "this request has {}, whose embeddings may depend on what is encoded beside them: send "


@pytest.mark.parametrize(
    ("item", "what"),
    [
        (image(modality=Modality.VIDEO), "video or sound"),
        (image(modality=Modality.AUDIO), "video or sound"),
        (
            image(format=MultimodalInputFormat.PROCESSOR_OUTPUT),
            "images that are processed or encoded already",
        ),
        (
            image(precomputed_embeddings=torch.ones(6, 4)),
            "images that are processed or encoded already",
        ),
        (image(offsets=[(2, 3), (5, 8)]), "an image whose tokens are in several places"),
    ],
)
def test_other_media_of_a_gated_request_are_answered_400(item, what):
    said = queued(carrying(item))
    assert said.startswith(SENTENCE.format(what)) and '"deterministic": false' in said
    assert queued(carrying(image(), item)) == said, "beside an image"
    assert queued(carrying(item, custom={"deterministic": False})) == ""


def test_images_in_a_prompt_that_was_cut_are_answered_400():
    """Its positions would be those of the whole prompt, in decode steps and not in verify rows."""
    req = carrying(image())
    req.origin_input_ids = req.origin_input_ids[:10]
    assert queued(req).startswith(SENTENCE.format("images in a prompt that was cut"))


def test_all_images_are_where_the_check_at_start_failed():
    said = queued(carrying(image()), "it rained")
    assert said.startswith(SENTENCE.format("images, and it rained")) and "send text alone" in said
    assert queued(carrying(image(), custom={"deterministic": False}), "it rained") == ""
    req = carrying()
    req.multimodal_inputs = None
    assert queued(req, "it rained") == "", "text"


# Forwards of the tower


def seen(calls: list[int]) -> Any:
    """A tower whose embedding of an image depends on how many are in the forward."""

    def embed(items: list[Any]) -> torch.Tensor:
        calls.append(len(items))
        sizes = [len(item.feature) // 4 for item in items]
        return torch.cat([torch.full((size, 3), float(len(items))) for size in sizes])

    return embed


def test_each_image_of_a_forward_has_one_of_the_tower(monkeypatch):
    """With SGLang's own function around it, which caches what it gets by image."""
    monkeypatch.setattr(mm_schedule, "embedding_cache", MultiModalStaticCache(1 << 20))
    made = [image(), image((1, 6, 4)), image((1, 2, 8))]
    for item in made:
        images.name_all(carrying(item))
    wanted = [
        mm_schedule.PerImageRequestInfo(i, [item], item.offsets, 0, 12)
        for i, item in enumerate([*made, made[0]])
    ]
    calls: list[int] = []
    stock = mm_schedule._batch_encode_per_image_misses
    found = images.encode_alone(stock, seen(calls), wanted, torch.device("cpu"))
    assert calls == [1, 1, 1] and len(found) == 3
    assert all(torch.all(each == 1) for each in found.values())
    assert {len(each) for each in found.values()} == {6, 4}
    images.encode_alone(stock, seen(calls), wanted, torch.device("cpu"))
    assert calls == [1, 1, 1], "all of them are cached"
    images.forget_embeddings()
    images.encode_alone(stock, seen(calls), wanted[:1], torch.device("cpu"))
    assert calls == [1] * 4, "by weights that were replaced since"


def test_sglang_still_sees_whose_function_encodes():
    """It asks whether the tower moves patches to the device itself."""

    class Qwen3VLForConditionalGeneration:
        def get_image_feature(self, items: list[Any]) -> list[torch.Tensor]:
            return [torch.ones(1, 1, 2) for _ in items]

    embed = Qwen3VLForConditionalGeneration().get_image_feature
    wrapped = images.one_by_one(embed)
    assert mm_schedule._can_skip_pre_embed_feature_move(embed)
    assert mm_schedule._can_skip_pre_embed_feature_move(wrapped)
    assert not mm_schedule._can_skip_pre_embed_feature_move(images.one_by_one(seen([])))
    assert [tuple(each.shape) for each in wrapped([1, 2])] == [(1, 1, 2)] * 2


def test_a_tower_that_gives_other_bits_is_found_out():
    same = check_images._encode(seen([]), [image(), image((1, 6, 4))])
    assert same == (True, False), "one at a time; not together"
    count = iter(range(9))
    drifts = check_images._encode(
        lambda items: torch.cat([torch.full((6, 3), float(next(count))) for _ in items]),
        [image(), image()],
    )
    assert drifts[0] is False


def test_rotation_is_not_compiled_on_a_gpu():
    q = SimpleNamespace(is_cuda=False)
    assert images.rotate(lambda *args, **named: (args, named), q, 1, unsqueeze_dim=2) == (
        (q, 1),
        {"unsqueeze_dim": 2},
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_patches_of_an_image_do_not_depend_on_others_of_its_request(run_folder, family):
    """By the image, not by its patches, SGLang may name it: they must not depend on more."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny_model(family, run_folder))
    urls = [drawn(size, seed) for seed, size in enumerate((*SIZES, *SIZES))] + [plain((96, 64))]
    pictures = [opened(url) for url in urls]
    whole = processor(images=pictures, return_tensors="pt")
    parts = whole["pixel_values"].split(whole["image_grid_thw"].prod(dim=1).tolist())
    for picture, part in zip(pictures, parts, strict=True):
        alone = processor(images=[picture], return_tensors="pt")["pixel_values"]
        assert torch.equal(alone, part)


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


# Prefill forwards, and rows behind a prompt


def prompt(gated: bool, media: Any = None) -> Any:
    gate = SimpleNamespace(gated=gated, kept=None)
    embeds = {"input_embeds": None, "positional_embed_overrides": None}
    embeds["multi_item_delimiter_indices"] = None
    return SimpleNamespace(gate=gate, multimodal_inputs=media, **embeds)


IMAGES = object()


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (prompt(True), prompt(True), True),
        (prompt(True), prompt(False), True),
        (prompt(True), prompt(False, IMAGES), False),
        (prompt(False, IMAGES), prompt(True), False),
        (prompt(False, IMAGES), prompt(False), True),
        (prompt(False), prompt(False, IMAGES), True),
        (prompt(True, IMAGES), prompt(True, IMAGES), True),
        (prompt(True, IMAGES), prompt(True), False),
        (prompt(True), prompt(True, IMAGES), False),
        (prompt(True, IMAGES), prompt(False), False),
        (prompt(True, IMAGES), prompt(False, IMAGES), False),
    ],
)
def test_gated_prompts_share_forwards_with_their_like(first, second, meet):
    admission = Admission(Prefill(together=True), 64)
    adder = SimpleNamespace(can_run_list=[first])
    found = admission.add_one_req(lambda *_: "SGLang's", adder, second, False, None)
    assert found == ("SGLang's" if meet else AddReqResult.OTHER)


def test_rows_behind_an_image_stand_where_its_positions_end():
    req = carrying(image(), delta=-3)
    queued(req)
    assert req.gate.media and req.gate.shift == -3
    req.output_ids, req.return_logprob = [11, 12, 13], False
    req.kv = SimpleNamespace(cache_protected_len=0, req_pool_idx=4)
    found = row_input(req, Row("r", 3, 0))
    assert (found.position, found.token, found.shift) == (13, 12, -3)


def test_a_verify_row_is_rotated_by_its_shifted_position():
    """Its column and its length stay those of the row."""
    verifier = Verifier.__new__(Verifier)
    verifier.device, verifier._pins = "cpu", False
    verifier._page_table = torch.arange(40, dtype=torch.int32).view(2, 20)
    made = verifier._on_device([RowInput(1, 13, 7, shift=-3), RowInput(0, 5, 8)])
    assert made.positions.tolist() == [13, 5] and made.rotary.tolist() == [10, 5]
    assert made.slots.tolist() == [33, 5] and made.seq_lens_cpu.tolist() == [14, 6]
