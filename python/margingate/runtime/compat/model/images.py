"""Images of requests as SGLang keeps them: by what they are known, and how they are encoded.

SGLang knows an image by 64 bits of its patches, or of the file that they were made of, and finds
embeddings and columns by these. It encodes all images that a prefill forward lacks in one forward
of the model's tower.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.layers.rotary_embedding.utils import apply_rotary_pos_emb_native_eager
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputFormat,
    MultimodalInputs,
)

from margingate.runtime.compat import release

_NAMED = "margingate_named"  # among an item's own data: it has its name from here
_GRIDS = ("image_grid_thw", "video_grid_thw")


def name_all(req: Any) -> None:
    """Once SGLang has padded its prompt: each image by what its embedding depends on.

    That is its grid too: images of one colour have the same patches, upright and lying. The prompt
    is padded anew, so that two images share no prefix. Mutates items and `req.origin_input_ids`.
    """
    ids = req.origin_input_ids[:]
    for item in req.multimodal_inputs.mm_items:
        if _NAMED not in item.model_specific_data:
            _adopt(item, _identity(item))
            item.model_specific_data[_NAMED] = True
        for start, end in item.offsets or ():
            stop = min(end + 1, len(ids))  # the prompt may have been cut
            if start < stop:
                ids[start:stop] = array("q", padding(item, stop - start))
    req.origin_input_ids = ids


def not_alone(req: Any) -> str:
    """The first of a request's media that no forward of the tower can have to itself, in words.

    Empty where all of them are images that SGLang encodes and caches one by one.
    """
    inputs = req.multimodal_inputs
    if not all(item.is_image() for item in inputs.mm_items):
        return "video or sound"
    for item in inputs.mm_items:
        if item.format != MultimodalInputFormat.NORMAL or item.precomputed_embeddings is not None:
            return "images that are processed or encoded already"
        if len(item.offsets or ()) != 1:
            return "an image whose tokens are in several places"
    positions = inputs.mrope_positions
    if positions is not None and positions.shape[-1] != len(req.origin_input_ids):
        return "images in a prompt that was cut"
    return ""


def shift(req: Any) -> int:
    """Of the rotary positions behind the prompt from the numbers of their rows; 0 for text.

    An image takes fewer positions than it has tokens.
    """
    inputs = req.multimodal_inputs
    delta = None if inputs is None else inputs.mrope_position_delta
    return 0 if delta is None else int(delta.flatten()[0])


def release_features(req: Any) -> None:
    """The request has ended, outside of SGLang's sight: its patches are needed no more."""
    if req.multimodal_inputs is not None:
        req.multimodal_inputs.release_features()


def encode_alone(
    original: Any, embed: Callable[[list[Any]], Any], requests: Any, device: Any
) -> Any:
    """AROUND mm_schedule._batch_encode_per_image_misses: a forward of the tower for each image.

    Its shape depends on that image alone then, and so does its embedding, whoever needs it too.
    """
    return original(one_by_one(embed), requests, device)


def one_by_one(embed: Callable[[list[Any]], Any]) -> Callable[[list[Any]], list[torch.Tensor]]:
    """`embed` of SGLang's model, as a function that is given one image at a time."""

    def each(items: list[Any]) -> list[torch.Tensor]:
        return [part for item in items for part in _parts(embed([item]))]

    # SGLang looks at both, whether the tower moves the patches to the device itself.
    each.__name__ = getattr(embed, "__name__", each.__name__)
    each.__self__ = getattr(embed, "__self__", None)  # type: ignore[attr-defined]
    return each


def _parts(embedding: Any) -> Iterator[torch.Tensor]:
    if isinstance(embedding, list):
        yield from embedding
    else:
        yield embedding.reshape(-1, embedding.shape[-1])


def rotate(original: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """AROUND apply_rotary_pos_emb of the towers' attention: not as torch.compile makes it.

    What that makes depends on the shapes that it has seen, and after some of them is not compiled.
    """
    rotated = apply_rotary_pos_emb_native_eager if q.is_cuda else original
    return rotated(q, *args, **kwargs)


def forget_embeddings() -> None:
    """The tower's weights are others: no embedding that SGLang keeps is theirs."""
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()


def made_up(grid: tuple[int, int, int], width: int, generator: torch.Generator) -> Any:
    """An image of random patches that no client sent.

    Args:
        grid: frames, rows and columns of patches.
        width: numbers of a patch.
    """
    frames, height, breadth = grid
    feature = torch.randn(frames * height * breadth, width, generator=generator)
    data = {"image_grid_thw": torch.tensor([grid]), _NAMED: True}
    item = MultimodalDataItem(
        modality=Modality.IMAGE, feature=feature, offsets=[(0, 0)], model_specific_data=data
    )
    item.set_pad_value()
    return item


def inputs_of(items: Sequence[Any], positions: torch.Tensor) -> Any:
    """What a request carries that has these images, with positions [3, tokens] of its prompt."""
    made = MultimodalInputs(mm_items=list(items))
    made.mrope_positions = positions
    made.mrope_position_delta = (positions.max() + 1 - positions.shape[1]).reshape(1, 1)
    return made


def _identity(item: Any) -> bytes:
    """32 bytes, of all that SGLang has of an item beside the numbers of its patches, hashed."""
    feature = item.feature
    data = item.model_specific_data
    parts = (
        *(item.modality.name, item.format.name, item.hash),
        tuple(getattr(feature, "shape", ())),
        *(_listed(data.get(name)) for name in _GRIDS),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).digest()


def _listed(grid: Any) -> Any:
    return grid.tolist() if hasattr(grid, "tolist") else grid


def _adopt_identity(item: Any, identity: bytes) -> None:
    item.set_identity(identity)


def _padding_sequence(item: Any, length: int) -> Sequence[int]:
    padding: Sequence[int] = item.padding_sequence(length)
    return padding


_adopt = release.of_release("adopt_identity", _adopt_identity)
padding = release.of_release("padding_sequence", _padding_sequence)
