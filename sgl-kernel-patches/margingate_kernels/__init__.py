"""Small GPU kernels for MarginGate: each is a jit body, a checked wrapper and a torch oracle."""

from margingate_kernels.attention import (
    DecodeWorkspace,
    Paged,
    decode_attention,
    decode_workspace,
    listed_keys,
    plan_decode,
    segments_of,
    with_window,
)
from margingate_kernels.attention_checks import (
    PLAIN,
    Chunks,
    Columns,
    Rules,
    attention_reference,
)
from margingate_kernels.attention_prefill import extend_attention
from margingate_kernels.router import Routing, router_margin, router_margin_reference
from margingate_kernels.seeded import Draws, SeededTop2, gumbel, seeded_top2
from margingate_kernels.top2 import (
    Top2,
    Top2Workspace,
    empty_top2,
    softmax_top2,
    softmax_top2_reference,
    top2_workspace,
)

__all__ = [
    "PLAIN",
    "Chunks",
    "Columns",
    "DecodeWorkspace",
    "Draws",
    "Paged",
    "Routing",
    "Rules",
    "SeededTop2",
    "Top2",
    "Top2Workspace",
    "attention_reference",
    "decode_attention",
    "decode_workspace",
    "empty_top2",
    "extend_attention",
    "gumbel",
    "listed_keys",
    "plan_decode",
    "router_margin",
    "router_margin_reference",
    "seeded_top2",
    "segments_of",
    "softmax_top2",
    "softmax_top2_reference",
    "top2_workspace",
    "with_window",
]
