"""Batch-independent greedy decoding for SGLang."""

__version__ = "0.2.0"
