"""What a sentence that refuses something is, whoever says it."""

from __future__ import annotations


def sentence(error: object) -> str:
    """One line with an end."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def one_sentence(error: object) -> str:
    """And nothing behind it."""
    text = sentence(error)
    assert ". " not in text
    return text


def gate_sentence(error: object) -> str:
    """That of a server whose gate cannot be served."""
    text = sentence(error)
    assert text.startswith("--deterministic-gate ")
    return text
