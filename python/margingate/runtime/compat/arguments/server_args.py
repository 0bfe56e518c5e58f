"""What SGLang's ServerArgs carries for the gate."""

from __future__ import annotations

from typing import Any

from margingate.config import GateConfig

ATTRIBUTE = "_margingate"  # where ServerArgs carries the GateConfig; absent: not gated
LAUNCHED = "_margingate_launched"  # by a launcher whose hooks are in place
RENDEZVOUS = "_margingate_rendezvous"  # path of the file in which replicas meet, where several
RADIX_BACKEND = "margingate"


def gate_config(server_args: Any) -> GateConfig | None:
    """The gate's settings of these server arguments, or None where the flag is absent."""
    return getattr(server_args, ATTRIBUTE, None)
