"""What the probe keeps between starts, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from margingate.cli import main as cli
from margingate.cli import probe as command
from margingate.config import GateError
from margingate.core.rowclass import Route, RowPlan
from margingate.runtime.compat.arguments import settings_table
from margingate.runtime.compat.process import ranks
from margingate.runtime.probe import startup
from margingate.runtime.probe.measuring import cache, classes, sample_sizes
from margingate.runtime.probe.operators.operator import Linear, MadeUp, Norm, Operator, Packed
from margingate.runtime.probe.operators.routed import Experts
from margingate.runtime.probe.planning import plans
from margingate.runtime.probe.planning.capped import refuse_small_pieces
from margingate.study.plots import plot_classes

FINDINGS = [
    classes.Finding("linear", "layers.0.qkv_proj", (96, 64), 30, {1: 0, 2: 0, 8: 0}, None, 0.1),
    classes.Finding(
        "linear", "0.down_proj", (64, 96), 30, {1: 0, 2: 1, 8: 1}, RowPlan(((2, 8),)), 2
    ),
    classes.Finding("attention", "attention decode", (9, 3, 64), 30, {1: 0, 2: 0, 8: 0}, None, 0.5),
]


class TorchNativeAttnBackend:
    pass


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ranks, "tp_rank", lambda: 0)
    return SimpleNamespace(
        model_config=SimpleNamespace(model_path="/m"),
        attn_backend=TorchNativeAttnBackend(),
        device="cpu",
        server_args=SimpleNamespace(enable_fp32_lm_head=False, tp_size=1),
    )


def test_findings_are_kept_for_the_same_identity(runner):
    key = cache.identity(runner, ["b", "a"], 64)
    assert cache.load(key) is None
    cache.save(key, FINDINGS)
    assert cache.load(cache.identity(runner, ["a", "b"], 64)) == FINDINGS


def test_findings_are_of_the_decode_graphs_that_they_were_measured_with(runner, monkeypatch):
    keys: list[Any] = []

    def first(_args: Any, key: Any, _find: Any) -> Any:
        keys.append(key)
        raise ZeroDivisionError

    monkeypatch.setattr(startup.shared_plans, "of_first_replica", first)
    monkeypatch.setattr(startup, "_busiest", lambda *_: 64)
    for graphs in ([1, 2], [1, 2, 4]):
        monkeypatch.setattr(startup, "_decode_graphs", lambda _runner, of=graphs: of)
        with pytest.raises(ZeroDivisionError):
            startup._find(runner, {}, 64, (), fresh=False)
    assert keys[0] != keys[1] and cache.path(keys[0]) == cache.path(keys[1])


def test_which_fp8_matmul_runs_reaches_the_arithmetic():
    assert "fp8_gemm_runner_backend" in settings_table.names(settings_table.ARITHMETIC)


PARTS = [
    *("rows", "graphs", "device", "units", "threads", "versions", "arithmetic", "settings"),
    "schema",
]


@pytest.mark.parametrize("name", [*PARTS, "environment"])
def test_findings_of_another_machine_or_version_are_redone(runner, name, caplog):
    key = cache.identity(runner, ["a"], 64)
    cache.save({**key, name: "another"}, FINDINGS)
    assert cache.path({**key, name: "another"}) == cache.path(key)
    with caplog.at_level("INFO"):
        assert cache.load(key) is None
    assert f"redone: {name} differ" in caplog.text


@pytest.mark.parametrize("name", ["model", "operators", "attention", "tensor_parallel"])
def test_other_models_have_other_files(runner, name):
    key = cache.identity(runner, ["a"], 64)
    assert cache.path({**key, name: "another"}) != cache.path(key)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"findings": [{}], "identity": {}}'])
def test_a_damaged_file_is_redone(runner, text, caplog):
    key = cache.identity(runner, ["a"], 64)
    cache.save(key, FINDINGS)
    cache.path(key).write_text(text)
    assert cache.load(key) is None
    assert "is not readable" in caplog.text
    cache.save(key, FINDINGS)
    assert cache.load(key) == FINDINGS


def test_findings_of_another_schema_are_told_apart_by_it_and_not_by_what_they_lack(runner, caplog):
    key = cache.identity(runner, ["a"], 64)
    cache.save(key, FINDINGS)
    file = cache.path(key)
    record = json.loads(file.read_text())
    record["identity"]["schema"] -= 1
    for found in record["findings"]:
        del found["prefill_plan"]
    file.write_text(json.dumps(record))
    with caplog.at_level("INFO"):
        assert cache.load(key) is None
    assert "the probe is redone: schema differ from" in caplog.text
    assert "is not readable" not in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_line(runner, tmp_path, caplog):
    (tmp_path / "margingate").write_text("in the way")
    cache.save(cache.identity(runner, ["a"], 64), FINDINGS)
    assert "cannot be written" in caplog.text


def test_norms_are_probed_beside_linear_layers():
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    model = torch.nn.Module()
    model.norm = torch.nn.RMSNorm(48, dtype=torch.bfloat16)
    for name in ("o_proj", "extra_proj"):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.ones(48, 48).bfloat16(), requires_grad=False)
        layer.quant_method = UnquantizedLinearMethod()
        setattr(model, name, layer)
    found = classes.groups(model)
    kinds = {same[0].name: same[0].kind for same in found.values()}
    assert kinds == {"norm": "norm", "o_proj": "linear", "extra_proj": "linear"}
    findings = plans.probe_groups({"n": found["norm norm [48] torch.bfloat16"]}, 8)
    assert findings[0].classes == dict.fromkeys(range(1, 9), 0) and findings[0].plan is None


def test_plans_reach_every_module_of_their_group():
    model = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
    same = [Linear(f"{i}.down_proj", m) for i, m in enumerate(model)]
    finding = classes.Finding(
        "linear", "0.down_proj", (4, 4), 3, {1: 0, 2: 1}, RowPlan(((2, 2),)), 0.0
    )
    assert plans.plans({"g": same}, [finding]) == {id(m): RowPlan(((2, 2),)) for m in model}


REPORT = {
    "model": "/models/tiny",
    "operators": [finding.record() for finding in FINDINGS],
    "steps": {"measured": [[1, True], [2, True], [8, False]], "graphs": False},
}


ODD = [[count, count % 2] for count in range(1, 10)]
said_of = command.meaning


def test_the_table_and_its_meaning(capsys):
    from rich.console import Console

    Console(width=140).print(command.make_table(REPORT))
    said = capsys.readouterr().out
    assert (
        "1 | 2 to 8" in said and "kept to 7 row counts from 2 to 8" in said and "1 to 2 | 8" in said
    )
    assert "number of rows, down_proj gives a row other bits: this is why" in said_of(REPORT)
    assert "canonical at 2 of 3 measured row counts; rows of the others" in said_of(REPORT)
    assert "No operator of a decode step depends" in said_of({**REPORT, "operators": []})
    extend = {**FINDINGS[2].record(), "name": "attention extend", "classes": ODD}
    report = {**REPORT, "operators": [extend]}
    assert "No operator of a decode step depends" in said_of(report)
    assert "Prefill depends on where a prompt is cut" in said_of(report)
    Console(width=140).print(command.make_table(report))
    assert "2 classes" in capsys.readouterr().out


def test_the_table_tells_decode_and_prefill_apart(capsys):
    """A layer by Marlin: as SGLang multiplies in decode, and unpacked, by the gate, in prefills."""
    from rich.console import Console

    one = {count: 0 for count in range(1, 65)}
    apart = {**one, 512: 1, 1024: 1}
    decoded = replace(FINDINGS[0], name="0.qkv_proj", classes=one, plan=RowPlan(((1, 64),)))
    decoded = replace(decoded, kind="packed linear")
    own = RowPlan(((512, 512), (1024, 1024)))
    changes = {"classes": apart, "plan": RowPlan(((1, 64),)), "prefill_plan": own}
    unpacked = replace(FINDINGS[0], name="0.qkv_proj, unpacked", kind="unpacked linear", **changes)
    report = {**REPORT, "operators": [decoded.record(), unpacked.record()]}
    Console(width=240).print(command.make_table(report))
    assert f"{unpacked.plan}, in prefills {own}" in capsys.readouterr().out
    assert "No operator of a decode step depends" in said_of(report), "no server has it unpacked"
    head = replace(FINDINGS[0], name="lm_head", classes={**one, 65: 0, 256: 0}).record()
    report["operators"].append(head)
    assert "rows, qkv_proj gives a row other bits" in said_of(report), "in calls of 65 and more"
    older = {name: value for name, value in decoded.record().items() if name != "prefill_plan"}
    Console(width=240).print(command.make_table({**report, "operators": [older]}))
    assert f"{decoded.plan}" in capsys.readouterr().out


def test_the_picture(tmp_path):
    plot_classes({f.name: f.classes for f in FINDINGS}, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_records_survive_json():
    routes = (Route(8, kernel=True, padded=16), Route(64, kernel=False))
    routed = replace(FINDINGS[0], plan=RowPlan(((9, 64),), routes=routes))
    for finding in (*FINDINGS, routed):
        assert classes.Finding.from_record(json.loads(json.dumps(finding.record()))) == finding


@pytest.mark.parametrize(
    "url, said",
    [
        ("http://127.0.0.1:9/v1", "no server answers at http://127.0.0.1:9: start it, or"),
        ("127.0.0.1:9", "--base-url is '127.0.0.1:9': give http://HOST:PORT."),
    ],
)
def test_a_url_that_does_not_answer_is_one_sentence(url, said, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["probe", "--base-url", url, "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"margingate: {said}")
    assert not out.exists() and tmp_path.exists()
    assert cli.main(["probe", "--base-url", url, "--out", str(tmp_path)]) == 2
    assert tmp_path.exists(), "it was there before"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "tells of no probe: use a server of this version of margingate."),
        ({"probe": None}, "tells of no probe"),
        ({"probe": {"operators": []}}, "did not probe: start it with --gate-fast-path invariant."),
    ],
)
def test_a_gate_without_a_probe_is_one_sentence(state, said, tmp_path, capsys, monkeypatch):
    answer(monkeypatch, {"internal_states": [{"margingate": state}]})
    assert cli.main(["probe", "--base-url", "http://h:1", "--out", str(tmp_path / "r")]) == 2
    assert said in capsys.readouterr().err


def answer(monkeypatch: pytest.MonkeyPatch, info: dict[str, Any]) -> None:
    """Every GET of the command is answered with this."""
    info = {"model_path": "/models/tiny", "version": "0", **info}
    reply = SimpleNamespace(status_code=200, json=lambda: info)
    monkeypatch.setattr("requests.get", lambda *_, **__: reply)


def test_a_gate_that_measured_no_whole_steps_has_a_report_too(tmp_path, capsys, monkeypatch):
    probe_of = {"operators": REPORT["operators"], "steps": None}
    answer(monkeypatch, {"internal_states": [{"margingate": {"probe": probe_of}}]})
    assert cli.main(["probe", "--base-url", "http://h:1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Whole decode steps were not measured on this server." in " ".join(said.split())
    assert "decode step, as served" not in said
    assert json.loads((tmp_path / "probe.json").read_text())["steps"] is None


def test_a_server_that_runs_takes_no_arguments(tmp_path, capsys):
    arguments = ["--base-url", "http://h:1", "--out", str(tmp_path / "r"), "--", "--dtype", "half"]
    assert cli.main(["probe", *arguments]) == 2
    assert "--dtype is for a server that probe starts" in capsys.readouterr().err


def test_the_log_of_a_server_that_did_not_probe_is_kept_and_named(tmp_path, capsys, monkeypatch):
    class Launched:
        base_url = "127.0.0.1:9"

        def __init__(self, _model: str, log: Path, *_args: str, **_options: Any) -> None:
            log.write_text("said")

        def __enter__(self) -> None: ...

        def __exit__(self, *_args: object) -> None: ...

    monkeypatch.setattr("margingate.harness.servers.launch", Launched)
    out = tmp_path / "report"
    assert cli.main(["probe", "--model-path", "m", "--out", str(out)]) == 2
    assert f"give http://HOST:PORT; its log is {out / 'server.log'}.\n" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["server.log"]


@given(st.integers(1, 300), st.integers(1, 20_000), st.lists(st.integers(1, 20_000)))
def test_prefill_is_measured_at_counts_that_no_forward_is_far_below(above, more, known):
    largest = above + more
    counts = classes.prefill_counts(above, largest, known)
    assert counts == sorted(set(counts)) and counts[-1] == largest
    assert all(above < count <= largest for count in counts)
    assert {n for n in known if above < n <= largest} <= set(counts)
    gaps = [(b - a, b) for a, b in zip([above, *counts], counts)]
    assert all(gap <= (32 if b <= 1024 else 64 if b <= 4096 else 128) for gap, b in gaps)
    assert len(counts) < 240 + len(known)


class Wide(torch.nn.Module):
    """Three linear layers: one order of reduction; another above some rows; one at every count."""

    def __init__(self, steady: bool, breaks: int = 600) -> None:
        super().__init__()
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        class Method(UnquantizedLinearMethod):
            def __init__(self, breaks: int) -> None:
                self.breaks = breaks

            def apply(self, layer, x, bias=None):
                return (x * 2).float() + (len(x) > self.breaks)

        for name, most in (("qkv_proj", 10**6), ("down_proj", 10**6 if steady else breaks)):
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(torch.ones(6, 6), requires_grad=False)
            layer.quant_method = Method(most)
            setattr(self, name, layer)
        self.lm_head = torch.nn.Module()
        self.lm_head.weight = torch.nn.Parameter(torch.eye(6), requires_grad=False)
        self.norm = torch.nn.RMSNorm(6)


@pytest.mark.parametrize("steady", [True, False])
def test_findings_say_whether_plans_hold_for_prefill(steady):
    found = classes.groups(Wide(steady))
    prefill = classes.prefill_counts(64, 700)
    findings = {f.name: f for f in plans.probe_groups(found, 64, prefill)}
    assert findings["qkv_proj"].prefill and max(findings["qkv_proj"].classes) == 700
    assert findings["norm"].prefill and max(findings["norm"].classes) == 700
    assert findings["lm_head"].prefill and max(findings["lm_head"].classes) == 64
    down = findings["down_proj"]
    assert down.prefill == steady and down.plan.high == (700 if steady else 64)
    assert (len(set(down.classes.values())) == 1) == steady
    without = plans.probe_groups(found, 64)
    assert not any(f.prefill for f in without) and max(without[0].classes) == 64


def test_a_layer_without_a_class_for_prefill_is_named(caplog):
    found = classes.groups(Wide(steady=False))
    findings = plans.probe_groups(found, 64, classes.prefill_counts(64, 700))
    assert not startup.hold_for_prefill(findings, 700)
    (said,) = caplog.messages
    assert "keeps down_proj to one class in prefills of up to 700 rows" in said
    steady = classes.groups(Wide(steady=True))
    caplog.clear()
    held = plans.probe_groups(steady, 64, classes.prefill_counts(64, 700))
    assert startup.hold_for_prefill(held, 700) and not caplog.messages


def test_a_layer_may_have_a_class_of_its_own_in_prefills(caplog):
    found = classes.groups(Wide(steady=False, breaks=300))
    findings = plans.probe_groups(found, 64, classes.prefill_counts(64, 700))
    assert startup.hold_for_prefill(findings, 700) and not caplog.messages
    (down,) = (each for each in findings if each.name == "down_proj")
    assert (down.plan.low, down.plan.high, down.prefill) == (1, 64, True)
    assert (down.prefill_plan.low, down.prefill_plan.high) == (320, 700)
    assert f"{down.plan}, in prefills {down.prefill_plan} (" in str(down)
    assert classes.Finding.from_record(json.loads(json.dumps(down.record()))) == down
    assert len(plans.plans(found, findings)) == 3
    layer = next(same[0].module for same in found.values() if same[0].name == "down_proj")
    assert plans.prefill_plans(found, findings) == {id(layer): down.prefill_plan}


def test_experts_that_take_few_rows_at_a_time_are_refused_on_a_gpu():
    def capped(device: str, kind: type[Operator] = Experts, **more: object) -> Operator:
        made = {"name": "e", "device": torch.device(device), "instead": kind.instead}
        made |= {"sees_prefill": True, **more}
        return cast(Operator, SimpleNamespace(**made))

    few, enough = RowPlan(((1, 31),)), RowPlan(((1, 32),))
    with pytest.raises(GateError, match=r"call e with 31 rows at a time.*moe_wna16 for GPTQ"):
        refuse_small_pieces(capped("cuda", is_capped=True), few)
    with pytest.raises(GateError, match=r"call e with 31 rows at a time.*in BF16 or FP8, or this"):
        refuse_small_pieces(capped("cuda", Packed, is_capped=True), few)
    refuse_small_pieces(capped("cuda", is_capped=True), enough)
    refuse_small_pieces(capped("cuda", is_capped=False), few)
    refuse_small_pieces(capped("cpu", is_capped=True), few)
    refuse_small_pieces(capped("cuda", Packed, is_capped=True, sees_prefill=False), few)


def test_a_norm_that_changes_above_some_count_keeps_prompts_alone():
    """Norms have no plans: nothing can be put in their place."""
    module = torch.nn.RMSNorm(6)

    class Breaks(Norm):
        def run(self, inputs):
            return inputs + (len(inputs) > 300)

    (finding,) = plans.probe_groups(
        {"n": [Breaks("norm", module)]}, 64, classes.prefill_counts(64, 700)
    )
    assert not finding.prefill and finding.plan is None and len(set(finding.classes.values())) > 1


def seldom_apart(border: int, among: int = 9973) -> MadeUp:
    """Results in bfloat16 of which about one of so many is another at `border` rows and more."""

    def function(x: torch.Tensor) -> torch.Tensor:
        if len(x) < border:
            return x
        bits = x.view(torch.int16).long()
        apart = (bits * 31 + bits.roll(1, -1) * 17) % among == 0
        return torch.where(apart, x * 1.0078125, x)  # by the last bit

    like = torch.empty(0, dtype=torch.bfloat16)
    return MadeUp("made up", None, function=function, width=64, like=like)


def test_sums_in_another_order_show_where_rounding_hides_most_of_them(monkeypatch):
    """A layer of few outputs: 64 rows of it have 4,096 results."""
    counts = range(1, 21)
    border = {count: int(count >= 11) for count in counts}
    assert classes.probe_operator(seldom_apart(11), counts) == border
    monkeypatch.setattr(sample_sizes, "ROUNDED", 1)
    assert set(classes.probe_operator(seldom_apart(11), counts).values()) == {0}, "the control"


def test_sums_show_where_few_inputs_and_small_weights_leave_little_to_round(monkeypatch):
    """Of a layer with 256 inputs in 4 bits 2 of 100,000 results were others on a CPU."""
    counts = range(1, 21)
    border = {count: int(count >= 11) for count in counts}
    assert classes.probe_operator(seldom_apart(11, 69_997), counts) == border
    monkeypatch.setattr(sample_sizes, "ROUNDED", 1 << 16)
    assert set(classes.probe_operator(seldom_apart(11, 69_997), counts).values()) == {0}


class SeldomByPlace(MadeUp):
    """Rows behind the first 64 of a call have now and then another last bit."""

    is_capped, differs_by_place = True, True

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([inputs[:64], seldom_apart(0).run(inputs[64:])])


def test_few_rows_of_a_call_that_seldom_differ_are_found(monkeypatch):
    """As Marlin's: at 65 rows one of them would have 1,280 results to show it."""
    like = torch.empty(0, dtype=torch.bfloat16)
    operator = SeldomByPlace("by place", None, function=None, width=1280, like=like)
    counts = range(60, 73)
    assert classes.probe_operator(operator, counts) == dict.fromkeys(range(60, 65), 0)
    monkeypatch.setattr(SeldomByPlace, "differs_by_place", False)
    monkeypatch.setattr(sample_sizes, "ROUNDED", 1 << 16)
    assert 72 in classes.probe_operator(operator, counts), "the control"


def test_they_show_at_row_counts_of_prefill_too(monkeypatch):
    """There 64 rows of it would be the block that all results are compared with."""
    decode, prefill = dict.fromkeys(range(1, 65), 0), [96, 128, 160, 992]
    found = classes.extended(seldom_apart(128), decode, prefill)
    assert found == {**decode, 96: 0, 128: 1, 160: 1, 992: 1}
    monkeypatch.setattr(sample_sizes, "ROUNDED", 1)
    found = classes.extended(seldom_apart(128), decode, [96, 128])
    assert set(found.values()) == {0}, "the control"


@pytest.mark.parametrize(
    ("width", "dtype", "rows"),
    [
        (4096, torch.bfloat16, 64),
        (576, torch.bfloat16, 456),
        (1, torch.float16, 1 << 14),
        (1, torch.float32, 64),
    ],
)
def test_rows_are_as_many_as_their_results_are_few(width, dtype, rows):
    like = torch.empty(0, dtype=dtype)
    operator = MadeUp("made up", None, function=lambda x: x, width=width, like=like)
    assert sample_sizes.size_for(operator, 3) == sample_sizes.SampleSize(rows)
