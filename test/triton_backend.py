"""SGLang's Triton backend as far as the gate's attention touches it, its layers and its runner."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from margingate.runtime.attention import invariant_attention
from margingate.runtime.attention.invariant_attention import OwnAttention

HEADS, KV_HEADS, SIZE = 4, 2, 64
CONTEXT, POOL = 1000, 2000  # tokens
SEGMENT = 256  # keys
LAYERS = (3, 4)  # a rank of a pipeline need not begin with layer 0


class TritonAttnBackend:
    """As far as the gate touches it; its own forward calls the kernels as SGLang's does."""

    use_mla = False
    dcp_size = 1

    def __init__(self) -> None:
        self.max_kv_splits = 8
        self.calls: list[Any] = []
        self.decode_attention_fwd = self.extend_attention_fwd = None

    def get_num_kv_splits(self, num_kv_splits, seq_lens, uneven_batch=None):
        raise AssertionError("its own rule was asked")

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None):
        self.calls.append(("decode", save_kv_cache))
        out = torch.empty_like(q)
        keys = torch.zeros(POOL, KV_HEADS, SIZE)
        scratch = (None, None, None, self.max_kv_splits)
        indptr, slots = forward_batch.indptr, forward_batch.slots
        self.forward_metadata = SimpleNamespace(kv_indptr=indptr, kv_indices=slots)
        if layer.sliding_window_size >= 0:  # SGLang's own lists for windows: not to be read
            indptr = slots = None
        self.decode_attention_fwd(
            *(q, keys, keys, out, indptr, slots, *scratch),
            *(layer.scaling, 1.0, 1.0),
            logit_cap=layer.logit_cap,
            sinks=sinks,
            xai_temperature_len=-1,
            page_size=1,
        )
        return out

    def forward_extend(self, q, k, v, layer, forward_batch, **extras):
        mask, causal = extras.pop("mask", None), extras.pop("causal", True)
        out, keys = torch.empty_like(q), torch.zeros(POOL, KV_HEADS, SIZE)
        self.extend_attention_fwd(
            *(q, k, v, out, keys, keys, forward_batch.starts, None, None, mask, causal, None),
            *(forward_batch.longest, 1.0, 1.0, layer.scaling),
            **{
                "logit_cap": layer.logit_cap,
                "sliding_window_size": layer.sliding_window_size,
                "sinks": None,
                **extras,
            },
        )
        return out


class FlashInferAttnBackend(TritonAttnBackend):
    pass


def make_layer(layer_id: int, **changes: Any) -> RadixAttention:
    given = {"num_heads": HEADS, "head_dim": SIZE, "scaling": 0.125, "num_kv_heads": KV_HEADS}
    return RadixAttention(**{**given, **changes}, layer_id=layer_id)


def make_runner(layers: list[Any] | None = None, **changes: Any) -> SimpleNamespace:
    model = torch.nn.ModuleList([make_layer(i) for i in LAYERS] if layers is None else layers)
    graphs = SimpleNamespace(decode=SimpleNamespace(max_bs=changes.pop("graphs", 32)))
    pool = SimpleNamespace(store_dtype=torch.bfloat16, size=changes.pop("pool", POOL))
    runner = SimpleNamespace(
        model=model,
        device="cpu",
        dtype=torch.bfloat16,
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(8, CONTEXT, dtype=torch.int32)),
        model_config=SimpleNamespace(context_len=changes.pop("context", CONTEXT)),
        server_args=SimpleNamespace(cuda_graph_config=graphs),
    )
    vars(runner).update(changes)
    return runner


GEMMA = tuple({"sliding_window_size": w} for w in (127, 127, -1, 127, 511, -1))


class TorchNativeAttnBackend:
    pass


class Kernels:
    """Records what would be launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[str] = []
        self.plans: list[Any] = []
        self.decodes: list[Any] = []
        self.extends: list[Any] = []
        kernels = {"plan_decode": self.plans, "decode_attention": self.decodes}
        kernels["extend_attention"] = self.extends
        for name, calls in kernels.items():
            monkeypatch.setattr(invariant_attention, name, partial(self._launch, name, calls))

    def _launch(self, name: str, calls: list[Any], *args: Any) -> None:
        self.launched.append(name)
        calls.append(args)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return Kernels(monkeypatch)


def make(runner: SimpleNamespace | None = None) -> tuple[TritonAttnBackend, OwnAttention, Any]:
    backend, runner = TritonAttnBackend(), runner or make_runner()
    return backend, OwnAttention(backend, runner), runner


def decode(backend: TritonAttnBackend, runner: Any, rows: int, **extras: Any) -> list[torch.Tensor]:
    """A forward of all layers. In a graph the index tensors are longer than the batch."""
    lengths = extras.pop("lengths", [1] * rows)
    batch = SimpleNamespace(
        batch_size=rows,
        seq_lens_sum=sum(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        indptr=torch.arange(0, rows + 4, dtype=torch.int32),
        slots=torch.arange(rows),
    )
    q = torch.zeros(rows, HEADS, SIZE)
    return [backend.forward_decode(q, q, q, each, batch, **extras) for each in runner.model]


def prefill_batch() -> SimpleNamespace:
    """Two prompts: 3 tokens behind 5, and 2 behind none."""
    return SimpleNamespace(
        req_pool_indices=torch.tensor([4, 2]),
        extend_prefix_lens=torch.tensor([5, 0]),
        seq_lens_cpu=torch.tensor([8, 2]),
        starts=torch.tensor([0, 3, 5, 5, 5], dtype=torch.int32),  # as long as the backend's buffer
        longest=3,
    )


def extend(backend: TritonAttnBackend, runner: Any, batch: Any, **extras: Any) -> torch.Tensor:
    q = torch.zeros(5, HEADS, SIZE)
    return backend.forward_extend(q, q, q, runner.model[0], batch, **extras)
