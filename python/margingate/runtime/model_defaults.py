"""A penalty among the model's own sampling defaults, which SGLang gives to chat requests.

The gate refuses penalties, so that greedy chat requests get HTTP 400 although no client sends one.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from margingate.config import GateConfig

logger = logging.getLogger(__name__)

PENALTY = "repetition_penalty"
DEFAULTS_FILE = "generation_config.json"
NO_DEFAULTS = "--sampling-defaults openai"


@functools.cache
def penalty(model: Any) -> float:
    """What a chat request gets that sends none, by SGLang's ModelConfig; 1.0 is no penalty."""
    value = model.get_default_sampling_params().get(PENALTY)
    return 1.0 if value is None else float(value)


def warn(model: Any, config: GateConfig) -> None:
    """Log a warning where the model's default is a penalty and requests are gated."""
    if config.policy == "observe" or penalty(model) == 1:
        return
    logger.warning(
        "margingate: the model's %s gives chat requests %s %g, which the gate does not serve: "
        "gated ones will get HTTP 400 unless they send %s: 1. With %s the file's defaults do not "
        "apply, its temperature, top_p and top_k included.",
        *(DEFAULTS_FILE, PENALTY, penalty(model), PENALTY, NO_DEFAULTS),
    )
