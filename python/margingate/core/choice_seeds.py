"""The seed of each choice of a request with `n` above 1 and a seed.

The numbers are part of the interface: who knows the seed and the number of a choice can ask for it
alone, with any version. They are those of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

_GAMMA = 0x9E3779B97F4A7C15  # odd: 2^64 divided by the golden ratio
_MASK = (1 << 64) - 1


def choice_seed(seed: int, choice: int) -> int:
    """The seed that choice number `choice` of a request with `seed` is drawn with.

    Choice 0 has the seed itself, so it is what the request gives with `n` 1. Choice i has the i-th
    output of SplitMix64 that begins with `seed`, without its lowest bit. Two of 128 choices have
    one seed for one seed in 10^15.

    Args:
        seed: 0 to 2^63 - 1.
        choice: 0 or more.

    Returns:
        0 to 2^63 - 1.
    """
    return seed if choice == 0 else _mixed(seed + choice * _GAMMA) >> 1


def _mixed(state: int) -> int:
    """SplitMix64's output for this state; one to one on 64 bits."""
    z = state & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
