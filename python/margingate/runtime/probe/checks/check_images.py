"""Whether images are encoded canonically: measured on the model's tower, before the first request.

An image alone in a forward of the tower has a shape of its own, and the kernels that a GPU takes
for a shape are the same each time. So its embedding should not depend on what was encoded before;
that is looked for on made-up images of several sizes. Then a prompt that carries an image must have
the columns of text where it is text, and those of the image wherever it is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from margingate.runtime.compat.model import images, vision
from margingate.runtime.compat.process.ranks import agreed
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.probe.measuring.classes import SEED
from margingate.runtime.verify.internal_prefill import extend, internal_request, release, stored

logger = logging.getLogger(__name__)

# Frames, rows and columns of patches: small, odd in blocks of 2 x 2, wide, tall, and larger.
GRIDS = ((1, 4, 4), (1, 6, 10), (1, 2, 26), (1, 30, 4), (1, 34, 38))
BEFORE, BEHIND = 70, 9  # tokens of text around the image in the prompt

_OF_TEXT = "text beside one has other columns than text alone"
_OF_CUTS = "its columns depend on where the prompt is cut"
NONE, UNGATED = "this model takes none", "nothing is gated here"


def measure(scheduler: Any, prefill: Prefill) -> str:
    """Why images are not canonical, in words that follow "images, and"; empty where they are.

    A collective of all ranks.
    """
    model = scheduler.tp_worker.model_runner.model
    if not vision.has_tower(model):
        return NONE
    made = _made_up(scheduler)
    try:
        with torch.no_grad():
            alone, together = _encode(model.get_image_feature, made)
            text, cuts = _prefilled(scheduler, made[1], prefill)
    finally:
        images.forget_embeddings()
    found = agreed(scheduler, [alone, text, cuts, together])
    logger.info(
        "margingate: images of five sizes have %s bits when they are encoded again, and %s in one "
        "forward of all five.",
        "the same" if found[0] else "other",
        "the same" if found[3] else "others",
    )
    why = ("a second forward encodes one with other bits", _OF_TEXT, _OF_CUTS)
    failed = next((each for each, holds in zip(why, found, strict=False) if not holds), "")
    if failed:
        logger.warning(
            "margingate: gated requests with images are answered 400, since %s; please report it.",
            failed,
        )
    return failed


def _made_up(scheduler: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(SEED)
    width = vision.patch_width(scheduler.model_config)
    return [images.made_up(grid, width, generator) for grid in GRIDS]


def _encode(embed: Callable[[list[Any]], Any], made: Sequence[Any]) -> tuple[bool, bool]:
    """Whether each image has the same bits twice, and the same in one forward of all of them.

    Alone, after images of other sizes, and after the forward of all.
    """
    alone = images.one_by_one(embed)
    first = [part.clone() for part in alone(list(made))]
    whole = embed(list(made))
    whole = torch.cat(whole) if isinstance(whole, list) else whole
    again = alone(list(reversed(made)))[::-1]
    same = all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    return same, torch.equal(torch.cat(first), whole.reshape(-1, whole.shape[-1]))


def _prefilled(scheduler: Any, image: Any, prefill: Prefill) -> tuple[bool, bool]:
    """Whether text has the same columns with an image to come, and an image with any cut in it."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = vision.tokens_of(scheduler.model_config, GRIDS[1])
    length = BEFORE + tokens + BEHIND
    ids = torch.randint(3, scheduler.model_config.vocab_size, (length,), generator=generator)
    prompt = ids.tolist()
    image.offsets = [(BEFORE, BEFORE + tokens - 1)]
    positions = torch.arange(length).repeat(3, 1)
    plain = _columns(scheduler, prompt[:BEFORE], None, [0, BEFORE])
    inputs = images.inputs_of([image], positions)
    # With the image in sight, and none of its tokens in the forward.
    beside = _columns(scheduler, prompt[:BEFORE], inputs, [0, BEFORE])
    text = all(torch.equal(*pair) for pair in zip(plain, beside, strict=True))
    if not prefill.together:  # no chunk is cut at any place but the grid's
        return text, True
    prompt[BEFORE : BEFORE + tokens] = images.padding(image, tokens)
    whole = _columns(scheduler, prompt, inputs, [0, length])
    cuts = [0, BEFORE + 1, BEFORE + tokens // 2, length - 1, length]
    in_parts = _columns(scheduler, prompt, images.inputs_of([image], positions), cuts)
    return text, all(torch.equal(*pair) for pair in zip(whole, in_parts, strict=True))


def _columns(
    scheduler: Any, prompt: Sequence[int], inputs: Any, cuts: Sequence[int]
) -> list[torch.Tensor]:
    """The columns of a prompt that is prefilled alone, in these pieces; and its last logits."""
    req = internal_request("margingate-image", prompt, inputs)
    try:
        for start, end in pairwise(cuts):
            logits = extend(scheduler, [(req, start, end)])
        return [logits.clone(), *stored(scheduler, req, len(prompt))]
    finally:
        release(scheduler, req)
