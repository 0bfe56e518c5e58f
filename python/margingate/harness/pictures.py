"""Prompts with images, drawn from a seed, for vision models that write one as Qwen's do."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from margingate.harness.client import Prompt

# Width and height in pixels: of few patches and of many, wide and tall.
SIZES = ((64, 64), (96, 160), (352, 64), (96, 448), (448, 320))
_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
_QUESTIONS = (
    "What is in this picture?",
    "Describe the colours that you see, from left to right, and say which one is the brightest.",
)


def drawn(size: tuple[int, int], seed: int) -> str:
    """A picture of coloured boxes, as a data URL of a PNG."""
    from PIL import Image, ImageDraw

    draw = random.Random(seed)
    image = Image.new("RGB", size, _colour(draw))
    canvas = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = draw.randrange(size[0]), draw.randrange(size[1])
        box = (left, top, left + draw.randrange(8, 80), top + draw.randrange(8, 80))
        canvas.rectangle(box, fill=_colour(draw))
    return _url(image)


def plain(size: tuple[int, int]) -> str:
    """A picture of one colour: all of its patches are the same."""
    from PIL import Image

    return _url(Image.new("RGB", size, (200, 30, 40)))


def picture_prompts(model_path: Path | str) -> list[Prompt]:
    """One of each size, one with another question, two with two pictures, two that only lie and
    stand.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return [
        Prompt(name, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), tuple(urls))
        for name, text, urls in _asked()
    ]


def _asked() -> Iterator[tuple[str, str, Sequence[str]]]:
    of_sizes = [drawn(size, seed) for seed, size in enumerate(SIZES)]
    for size, url in zip(SIZES, of_sizes, strict=True):
        yield f"{size[0]}x{size[1]}", _chat(_MARK + _QUESTIONS[0]), [url]
    yield "asked in another way", _chat(_MARK + _QUESTIONS[1]), of_sizes[-1:]
    yield "two", _chat(f"{_MARK}{_MARK}Which is larger?"), [of_sizes[1], of_sizes[4]]
    yield "two swapped", _chat(f"{_MARK}{_MARK}Which is larger?"), [of_sizes[4], of_sizes[1]]
    yield "lying", _chat(_MARK + _QUESTIONS[0]), [plain((160, 96))]
    yield "upright", _chat(_MARK + _QUESTIONS[0]), [plain((96, 160))]


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _colour(draw: random.Random) -> tuple[int, int, int]:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)


def _url(image: object) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")  # type: ignore[attr-defined]
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
