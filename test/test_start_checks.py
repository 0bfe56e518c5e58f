"""What a gated start measures and refuses by a model's layers is asked for, in the order it needs.

What each of them finds is held elsewhere.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from margingate.config import GateConfig, GateError
from margingate.runtime.probe import startup, startup_checks
from margingate.runtime.probe.checks.check_prefill import Prefill


class Asked:
    """Functions of a module that only note, in order, that they were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.names: list[str] = []
        self._patch, self._module = monkeypatch, module

    def instead(self, *names: str, **results: Any) -> None:
        """By dotted name; `results` by the last part, else the call has a result of its own."""
        for name in names:
            result = results.get(name.rpartition(".")[2], MagicMock())
            self._patch.setattr(f"{self._module.__name__}.{name}", self.note(name, result))

    def note(self, name: str, result: Any = None) -> Any:
        def ask(*_: Any, **__: Any) -> Any:
            self.names.append(name)
            return result

        return ask


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (GateConfig(fast_path="invariant"), "check_decode.measure"),
        (GateConfig(fast_path="stock"), "check_decode.check_padding"),
        (GateConfig(fast_path="stock", policy="observe"), ""),
    ],
    ids=["invariant", "stock", "observe"],
)
def test_the_whole_model_is_asked_what_its_path_rests_on(monkeypatch, config, steps, decoded):
    asked = Asked(monkeypatch, startup_checks)
    steps_found = SimpleNamespace(extend=asked.note("extend"))
    own = SimpleNamespace(confirm=asked.note("confirm"))
    asked.instead("logprobs.as_log_softmax", "seeds.compile_draws")
    asked.instead("verifier.build", "check_attention.check")
    asked.instead("check_decode.measure", measure=steps_found)
    asked.instead("check_decode.check_padding")
    asked.instead("check_prefill.measure", measure=Prefill(decoded, decoded))
    asked.instead("invariant_attention.of", of=own)
    asked.instead("check_images.measure", measure="why not")
    checks = startup_checks.run_checks(MagicMock(), config)
    observes, extends = config.policy == "observe", decoded and config.invariant
    wanted = ["logprobs.as_log_softmax", "seeds.compile_draws", "verifier.build", steps]
    wanted += [
        "check_prefill.measure",
        "invariant_attention.of",
        "confirm",
        "check_attention.check",
        "extend" * extends,
    ]
    assert asked.names == [
        name for name in (*wanted, "check_images.measure" * (not observes)) if name
    ]
    assert checks.decode is (steps_found if config.invariant else None)
    assert checks.images == (startup_checks.check_images.UNGATED if observes else "why not")


def test_before_the_graphs_a_model_is_refused_or_measured_and_planned(monkeypatch):
    asked = Asked(monkeypatch, startup)
    asked.instead("loaded_model.refuse", "fixed_split.fix_split")
    asked.instead("_operators", "_prefill_counts", "_find", "_plan", _find=[])
    startup.before_graphs(MagicMock(is_draft_worker=False, device="cpu"))
    assert asked.names == [
        *("loaded_model.refuse", "fixed_split.fix_split"),
        *("_operators", "_prefill_counts", "_find", "_plan"),
    ]


@pytest.mark.parametrize("settled", ["tile_heights", "marlin_tiles", ""])
def test_a_first_step_is_observed_and_what_nobody_knows_in_it_refused(monkeypatch, settled):
    """What then runs by other tiles is another operator, so they are listed once more."""
    asked = Asked(monkeypatch, startup)
    asked.instead("use_linear_kernels", "observe", "classes.groups", "refuse_unknown")
    for name in ("tile_heights", "marlin_tiles"):
        asked.instead(f"{name}.settle", settle=name == settled)
    asked.instead("unpacked.settle")
    startup._operators(MagicMock())
    assert asked.names == [
        *("use_linear_kernels", "observe", "classes.groups", "refuse_unknown"),
        *("tile_heights.settle", "marlin_tiles.settle", *["classes.groups"] * bool(settled)),
        "unpacked.settle",
    ]


def test_an_operator_that_nobody_knows_ends_the_start_with_its_name():
    model = torch.nn.Module()
    model.mystery = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(GateError, match="cannot measure mystery, a Bilinear with weight, bias: "):
        startup.refuse_unknown(model, {}, {})


def test_kernels_that_settle_in_no_class_keep_prompts_alone(monkeypatch, caplog):
    """Where prefills were planned; up to the largest step nothing changes."""
    asked = Asked(monkeypatch, startup)
    asked.instead("all_reduce.settle", "dual_gemm.settle", settle=[])
    asked.instead("plans.plans", "plans.prefill_plans", "execute.keep_prefills_to")
    asked.instead("execute.redirect", "unpacked.release")
    finding = SimpleNamespace(name=startup.HEAD, prefill=True)
    monkeypatch.setattr(startup, "_findings", [finding])
    limits: list[float] = []
    monkeypatch.setattr(startup.execute, "keep_to", lambda _plans, limit: limits.append(limit))
    for settles, limit in ((True, float("inf")), (False, 64)):
        asked.instead("invariant_kernel.settle_kernels", settle_kernels=settles)
        startup._plan(MagicMock(), {}, 64, [128])
        assert limits == [64, limit]
        assert ("gated prompts are prefilled one at a time" in caplog.text) is not settles
        limits.clear()
