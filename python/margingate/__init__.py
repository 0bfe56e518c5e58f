"""Answers of SGLang, greedy or drawn with a seed, that do not depend on the batch."""

__version__ = "0.2.0"
