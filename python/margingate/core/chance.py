"""Choices that look random and are a function of a name: the same in every run."""

import hashlib
import random


def chosen(name: str, share: float) -> bool:
    """Whether `name` is among the chosen; of many names, a `share` from 0 to 1 is."""
    # Clients name their requests as they like, halves of surrogate pairs included.
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * (1 << 64)


def generator(name: str) -> random.Random:
    """A generator whose numbers are a function of `name`."""
    return random.Random(hashlib.blake2b(name.encode(), digest_size=8).digest())
