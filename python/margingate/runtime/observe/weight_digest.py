"""What weights a model holds, told by their bits as they lie in memory.

Files would not do: weights come from hubs, are made up (`--load-format dummy`), are repacked for
the device while they load, and are replaced in a running server. Bits cover all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from margingate.runtime.compat.compute import mxfp4

WORDS = 1 << 22  # of 4 bytes; a checksum's temporaries take some 100 MB of the device
# Odd constants of 64 bits (Weyl's and Steele's, of SplitMix64).
STEP, MIX = -7046029254386353131, -4658895280553007687


def digest(model: Any) -> str:
    """64 hex digits: SHA-256 over name, dtype, shape and content of each tensor of `model`.

    A tensor on the CPU goes in by its own SHA-256 (1 to 2 GB/s a core), any other by a checksum
    of 64 bits made where it lies. That tells weights apart by accident, not by malice.
    """
    tensors = dict(_distinct(model))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        on_cpu = {name: pool.submit(_sha256, t) for name, t in tensors.items() if t.is_cpu}
        sums = {name: checksum(t) for name, t in tensors.items() if not t.is_cpu}
        found = {name: future.result() for name, future in on_cpu.items()}
    found |= {name: str(total.item()) for name, total in sums.items()}
    lines = (f"{name} {t.dtype} {list(t.shape)} {found[name]}" for name, t in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _distinct(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, persistent buffers and what SGLang keeps of experts elsewhere, in order.

    A tied one is under its first name only.
    """
    seen = set()
    for name, tensor in (*model.state_dict().items(), *mxfp4.hidden_tensors(model)):
        if isinstance(tensor, torch.Tensor):
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() == 0 or place not in seen:
                seen.add(place)
                yield name, tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sha256(tensor: torch.Tensor) -> str:
    content: Any = _bytes(tensor).numpy()
    return hashlib.sha256(content).hexdigest()


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar on the tensor's device: a sum over words, each mixed with its position.

    Integers wrap and their sum has no order, so the same bits give the same number.
    """
    data = _bytes(tensor)
    missing = -len(data) % 4
    if missing or data.storage_offset() % 4:
        data = torch.nn.functional.pad(data, (0, missing))  # a copy
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), WORDS):
        piece = words[start : start + WORDS]
        places = torch.arange(start + 1, start + 1 + len(piece), device=tensor.device)
        mixed = places * STEP + piece
        mixed = (mixed ^ (mixed >> 29)) * MIX
        total += (mixed ^ (mixed >> 32)).sum()
    return total
