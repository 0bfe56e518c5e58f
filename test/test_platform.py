"""What the host platform sets, and what it leaves as it was asked for."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import sglang.srt.platforms  # noqa: F401  loads the plugin, which is not to be loaded first

from margingate.runtime.compat.host_platform import HostPlatform


def defaults(**asked: object) -> SimpleNamespace:
    args = {"attention_backend": None, "grammar_backend": None, "enable_torch_compile": False}
    found = SimpleNamespace(**(args | asked))
    HostPlatform().apply_server_args_defaults(found)
    return found


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """TORCH_COMPILE_DISABLE as it was, whatever a test sets."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "")
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")


def test_torch_native_attention_llguidance_and_no_compiling():
    found = defaults()
    assert (found.attention_backend, found.grammar_backend) == ("torch_native", "llguidance")
    assert os.environ["TORCH_COMPILE_DISABLE"] == "1"


def test_slots_and_columns_are_sglangs_own():
    platform = HostPlatform()
    assert platform.get_kv_pool_cls(kind="mha") is None
    assert platform.get_paged_allocator_cls() is None
    assert not platform.capabilities.supports_triton


def test_what_was_asked_for_stays(monkeypatch):
    found = defaults(attention_backend="triton", grammar_backend="none", enable_torch_compile=True)
    assert (found.attention_backend, found.grammar_backend) == ("triton", "none")
    assert "TORCH_COMPILE_DISABLE" not in os.environ
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    defaults()
    assert os.environ["TORCH_COMPILE_DISABLE"] == "0"
