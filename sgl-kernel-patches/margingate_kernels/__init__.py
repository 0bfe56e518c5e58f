"""Small GPU kernels for MarginGate: each is a jit body, a checked wrapper and a torch oracle."""

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
    "Draws",
    "SeededTop2",
    "Top2",
    "Top2Workspace",
    "empty_top2",
    "gumbel",
    "seeded_top2",
    "softmax_top2",
    "softmax_top2_reference",
    "top2_workspace",
]
