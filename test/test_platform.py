"""What the host platform sets, and what it leaves as it was asked for."""

from __future__ import annotations

import inspect
import json
import os
from types import SimpleNamespace

import pytest
import sglang.srt.platforms  # noqa: F401  loads the plugin, which is not to be loaded first
import torch
from jit_bodies import checks_in, run_checks, run_in_interpreter
from sglang.kernels.ops.elementwise import elementwise

from margingate.runtime.compat.host.platform import HostPlatform, gate_shared_expert


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


def test_buffers_of_the_host_need_no_driver(monkeypatch):
    """SGLang registers what it keeps the experts of columns in with CUDA."""
    from sglang.srt.mem_cache.pool_host import common
    from sglang.srt.state_capturer.base import BaseHostCache

    monkeypatch.setattr(common, "_cuda_host_register", pytest.fail)
    HostPlatform().init_backend()
    cache = BaseHostCache(5, 2, 3, "experts", "cpu")
    assert cache.buffer.shape == (5, 2, 3) and not cache.buffer.any()


def check_the_torch_operator_does_what_the_kernel_does(device: str) -> None:
    """Inputs of 1 / 64 keep every product and sum exact, so float32's order of sums plays no part.

    Only the sigmoid is then rounded, by numpy in the interpreter, and the result.
    """
    launch, generator = elementwise._launch_fused_gate_sigmoid_mul, torch.Generator().manual_seed(0)
    assert launch is not gate_shared_expert
    names = [inspect.signature(each).parameters for each in (launch, gate_shared_expert)]
    assert [*names[0]] == [*names[1]]
    for dtype, off in ((torch.float32, 3e-7), (torch.float16, 2e-3)):
        for rows, hidden, do_add in ((5, 100, True), (1, 64, True), (3, 65, False)):
            draw = torch.randint(-64, 65, (3, rows, hidden), generator=generator)
            states, shared, output = (draw / 64).to(device, dtype).unbind()
            weight = (torch.randint(-64, 65, (hidden,), generator=generator) / 64).to(device, dtype)
            kernel, own = output.clone(), output.clone()
            launch(states, weight, shared, kernel, do_add=do_add)
            gate_shared_expert(states, weight, shared, own, do_add=do_add)
            assert not torch.equal(own, output)
            torch.testing.assert_close(own, kernel, rtol=off, atol=off)


def test_the_torch_operator_against_the_interpreted_kernel():
    name = "the_torch_operator_does_what_the_kernel_does"
    assert run_in_interpreter(__file__) == {name: "ok"}


def test_the_platform_puts_it_where_sglang_launches_the_kernel(monkeypatch):
    """Called by the public name, as models import it; and a row's gate depends on no other row."""
    name = "_launch_fused_gate_sigmoid_mul"
    monkeypatch.setattr(elementwise, name, None)  # whatever ran before; put back at the end
    HostPlatform().init_backend()
    states, shared, output = torch.randn(3, 40, 576).unbind()
    weight, found = torch.randn(576) / 24, output.clone()
    elementwise.fused_gate_sigmoid_mul_add(states, weight, shared, found)
    gates = torch.sigmoid(states.double() @ weight.double())[:, None]
    wanted = gates * shared.double() + output.double()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    for row in range(40):
        alone = output[row : row + 1].clone()
        own = (states[row : row + 1], weight, shared[row : row + 1])
        elementwise.fused_gate_sigmoid_mul_add(*own, alone)
        assert torch.equal(alone[0], found[row])


if __name__ == "__main__":
    print(
        json.dumps(run_checks(checks_in(globals()), elementwise._fused_gate_sigmoid_mul_add_kernel))
    )
