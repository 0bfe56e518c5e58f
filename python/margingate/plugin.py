"""SGLang's entry points. Importing this costs nothing; SGLang calls `load` in every process."""

from __future__ import annotations


def load() -> None:
    """General plugin: add the gate's options; the rest is patched only in a gated scheduler.

    SGLang logs an exception raised here and serves on, so nothing here may decide: without the
    options, `--deterministic-gate` is an unknown argument and the server does not start.
    """
    from margingate.runtime.hooks import registry
    from margingate.runtime.start import engine, startup_hooks

    registry.register(startup_hooks.STARTUP_HOOKS)
    engine.take_keywords()


def host_platform() -> str | None:
    """Platform plugin: a host platform where no accelerator is found, None anywhere else."""
    import os

    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "margingate.runtime.compat.host.platform.HostPlatform"
