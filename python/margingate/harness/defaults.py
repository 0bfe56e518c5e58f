"""What commands, benchmarks and tests take where they are told nothing else."""

from __future__ import annotations

from pathlib import Path

import margingate

MODEL = "smollm2"  # of embedded_model.SOURCES
PROMPTS = Path(margingate.__file__).parent / "data" / "demo_prompts.jsonl"
SEED = 20260530  # of shuffled orders and arrival times; arbitrary, and the same everywhere
