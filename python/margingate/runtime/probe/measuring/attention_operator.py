"""The probe's attention: one made-up request, its rows decoded or prefilled in other groupings.

Row i is position i of the request, so it attends to i + 1 columns however the rows are grouped.
Keys and values are copied into the pool, not computed, so every grouping reads the same columns.
Only SGLang's torch-native backend is probed by itself. Others keep state per batch that a bare
call does not set up as a decode graph would; the whole-model check is what measures them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from margingate.runtime.compat.compute.forward import as_extend, context, plan_slots
from margingate.runtime.compat.host.attention import attends_row_by_row
from margingate.runtime.probe.measuring.classes import SEED, Finding, Rows, classify, refusing
from margingate.runtime.probe.measuring.sample_sizes import SampleSize
from margingate.runtime.verify.verifier import RowInput, Verifier, scratch_rows


def probe_attention(runner: Any, counts: Sequence[int]) -> list[Finding]:
    """Decode and extend attention of the model's first attention layer; [] where not known.

    Writes the slots 1 to SampleSize().whole(counts) of that layer, which must be free.
    """
    layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
    if not attends_row_by_row(runner.attn_backend) or not layers:
        return []
    shape = (layers[0].tp_q_head_num, layers[0].tp_k_head_num, layers[0].qk_head_dim)
    findings = []
    for mode in (ForwardMode.DECODE, ForwardMode.EXTEND):
        start, name = time.monotonic(), f"attention {mode.name.lower()}"
        decodes = mode == ForwardMode.DECODE
        total = SampleSize().whole(counts)
        with torch.inference_mode(), refusing(name), scratch_rows(runner, total):
            rows = _attention(runner, layers[0], mode, total)
            classes = classify(rows, counts, torch.device(runner.device), in_any_order=decodes)
        seconds = time.monotonic() - start
        findings.append(Finding("attention", name, shape, len(layers), classes, None, seconds))
    return findings


def _attention(runner: Any, layer: Any, mode: ForwardMode, total: int) -> Rows:
    generator = torch.Generator().manual_seed(SEED)
    heads = (layer.tp_q_head_num, layer.tp_k_head_num, layer.tp_v_head_num)
    sizes = (layer.qk_head_dim, layer.qk_head_dim, layer.v_head_dim)
    q, k, v = (
        torch.randn(total, n * size, generator=generator).to(runner.device, runner.dtype)
        for n, size in zip(heads, sizes, strict=True)
    )
    batches = Verifier(runner, 1)

    def rows(indices: torch.Tensor) -> torch.Tensor:
        positions = indices.tolist()
        batch = batches.batch([RowInput(1, position, 3) for position in positions], len(positions))
        if mode == ForwardMode.EXTEND:
            batch = as_extend(batch, positions[0], len(positions))
            plan_slots(runner, batch)
        with context(runner, runner.attn_backend, batch):
            runner.attn_backend.init_forward_metadata(batch)
            return layer(q[indices], k[indices], v[indices], batch)

    return rows
