"""What the gate takes from a request's sampling parameters: how it draws, and its penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.sampling.sampling_params import TOP_K_ALL

LARGEST_SEED = (1 << 63) - 1
NONE = (0.0, 0.0, 1.0)  # frequency, presence, repetition that change nothing


@dataclass(frozen=True, slots=True)
class Draw:
    """How a request's tokens are drawn; the position comes from the row."""

    seed: int  # 0 to LARGEST_SEED
    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @property
    def filters(self) -> bool:
        """Whether a token may be left out."""
        return self.top_k != TOP_K_ALL or self.top_p < 1 or self.min_p > 0


def draw_of(params: Any) -> Draw | None:
    """From SGLang's SamplingParams; None for a greedy request and for one without a seed."""
    if params.top_k <= 1 or params.sampling_seed is None:
        return None
    return Draw(params.sampling_seed, params.temperature, params.top_k, params.top_p, params.min_p)


def is_score(params: Any) -> bool:
    """Whether SGLang's SamplingParams ask for nothing but what a prefill says of a prompt."""
    return bool(params.max_new_tokens == 0)


def draw_nothing(params: Any) -> None:
    """Make SGLang's SamplingParams those of a greedy request: log-probs are scaled by no
    temperature, and the token that nobody gets is no draw.
    """
    params.temperature, params.top_k, params.top_p, params.min_p = 1.0, 1, 1.0, 0.0


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of one request. They count output tokens; of the prompt's none, as in SGLang."""

    frequency: float  # logits off for each time that the token came
    presence: float  # logits off if it came at all
    repetition: float  # divides the logit of one that came, or multiplies it below 0
    min_new_tokens: int  # before these no token may come that ends the answer

    @property
    def narrowing(self) -> float:
        """Logits with penalties change by at most one over this of what the model's change by."""
        return min(self.repetition, 1 / self.repetition)

    @property
    def values(self) -> tuple[float, float, float]:
        """The three that count, in the order of NONE."""
        return self.frequency, self.presence, self.repetition


def take(params: Any) -> Penalties | None:
    """Take them off SGLang's SamplingParams, which has none afterwards; None if it had none."""
    found = Penalties(
        params.frequency_penalty,
        params.presence_penalty,
        params.repetition_penalty,
        params.min_new_tokens,
    )
    if found.values == NONE and not found.min_new_tokens:
        return None
    params.frequency_penalty, params.presence_penalty, params.repetition_penalty = NONE
    params.min_new_tokens = 0
    return found
