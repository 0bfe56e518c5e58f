"""Every setting of SGLang was looked at: it is in the fingerprint, refused, or has no effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from margingate.config import GateError
from margingate.runtime.client.parameter_types import validate_one_request
from margingate.runtime.compat.arguments import request_table, settings_table
from margingate.runtime.compat.arguments.settings_table import (
    ARITHMETIC,
    COUNTED,
    NO_EFFECT,
    REFUSED,
)
from margingate.runtime.observe import fingerprint
from margingate.runtime.probe.measuring import cache
from margingate.runtime.start.refusals import refuse_server

MakeArgs = Callable[..., Any]
MANAGER = SimpleNamespace(  # SGLang's, in front of a model
    sampling_params_class=SamplingParams,
    model_config=SimpleNamespace(vocab_size=1000, hidden_size=4),
)


def sglang_classes() -> dict[str, type]:
    from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput

    found = (SamplingParams, GenerateReqInput, TokenizedGenerateReqInput)
    return {kind.__name__: kind for kind in found}


@pytest.fixture(scope="module")
def make_args() -> MakeArgs:
    """SGLang's defaults and these changes, in place of ServerArgs; nothing resolved, no server."""
    from sglang.srt.server_args import ServerArgs

    defaults = {"model_path": None} | settings_table.defaults(ServerArgs)

    def made(**changes: Any) -> Any:
        assert changes.keys() <= defaults.keys()
        return SimpleNamespace(**(defaults | changes))

    return made


# The tables are whole


def test_every_field_of_the_server_is_in_one_place_with_a_reason():
    from sglang.srt.server_args import ServerArgs

    rows = list(settings_table.rows(settings_table.GROUPS))
    named = Counter(name for name, _, _ in rows)
    assert set(named) == set(ServerArgs.__struct_fields__) - settings_table.GONE.keys()
    assert max(named.values()) == 1
    assert all(kind and len(reason) > 5 for _, kind, reason in rows)


@pytest.mark.parametrize("kind", request_table.TABLES)
def test_every_field_of_a_request_is_in_one_place_with_a_reason(kind):
    named = Counter(name for name, _ in request_table.rows(kind))
    assert set(named) == set(request_table.fields_of(sglang_classes()[kind]))
    assert max(named.values()) == 1
    assert all(len(reason) > 5 for _, reason in request_table.rows(kind))


# What nobody has looked at


def test_a_field_that_nobody_has_looked_at_is_refused_unless_it_is_at_its_default(monkeypatch):
    from sglang.srt import server_args
    from sglang.srt.server_args import ServerArgs

    def make_args(**changes: Any) -> Any:
        return SimpleNamespace(**({"model_path": None} | settings_table.defaults(newer) | changes))

    new = {"enable_wonder": False, "wonders": []}
    fields = [*settings_table.defaults(ServerArgs).items(), *new.items()]
    newer = msgspec.defstruct("Newer", [(name, Any, value) for name, value in fields])
    monkeypatch.setattr(server_args, "ServerArgs", newer)
    refuse_server(make_args(**new))
    for name, value in (("enable_wonder", True), ("wonders", [1])):
        with pytest.raises(GateError) as caught:
            refuse_server(make_args(**(new | {name: value})))
        option = "--" + name.replace("_", "-")
        assert str(caught.value).startswith(
            f"--deterministic-gate does not work with {option}, which nobody has looked at in "
        )


def test_a_field_of_a_request_that_nobody_has_looked_at_is_refused_where_it_is_set():
    known = sglang_classes()["GenerateReqInput"]

    @dataclass
    class GenerateReqInput(known):  # type: ignore[misc, valid-type]
        wonder: int | None = None

    assert request_table.unseen(GenerateReqInput(text="a")) == ""
    text = request_table.unseen(GenerateReqInput(text="a", wonder=1))
    assert text == "the deterministic gate does not know what wonder does: drop it."
    assert request_table.unseen(SimpleNamespace(wonder=1)) == "", "no request for an answer"
    with pytest.raises(ValueError, match="does not know what wonder does"):
        validate_one_request(MANAGER, GenerateReqInput(text="a", wonder=1), [1])
    validate_one_request(MANAGER, GenerateReqInput(text="a"), [1])


# Refused


OTHER = {
    **dict.fromkeys(
        [
            "pp_size",
            "dcp_size",
            "attn_cp_size",
            "moe_dp_size",
            "dwdp_size",
            "moe_dense_tp_size",
            "page_size",
            "tokenizer_worker_num",
            "cpu_offload_gb",
            "offload_group_size",
        ],
        2,
    ),
    "kv_cache_dtype": "fp8_e5m2",
    "disaggregation_mode": "decode",
    "decoupled_spec_role": "drafter",
    "kv_canary": "log",
    "attn_dp_size": 2,
    "forward_hooks": [{"name": "one"}],
}


def other(name: str, args: Any) -> Any:
    """Another value than the default."""
    value = getattr(args, name)
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else "another"


@pytest.mark.parametrize("name", settings_table.names(REFUSED))
def test_each_field_that_is_called_refused_is_refused(make_args, name):
    args = make_args()
    refuse_server(args)
    setattr(args, name, other(name, args))
    with pytest.raises(GateError, match=r"^--deterministic-gate does not work with --"):
        refuse_server(args)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "mxfp8", "nvfp4", "fp4_mx_block16"])
def test_columns_of_fewer_bits_are_refused(make_args, name):
    with pytest.raises(GateError, match="--kv-cache-dtype, because K/V columns of another type"):
        refuse_server(make_args(kv_cache_dtype=name))


# In the fingerprint


@pytest.mark.parametrize("name", settings_table.names(ARITHMETIC, COUNTED))
def test_servers_that_differ_in_a_setting_that_counts_have_other_fingerprints(make_args, name):
    def value(args: Any) -> Any:
        parts = {"arguments": fingerprint.arguments(args)}
        return fingerprint.Fingerprint(parts, lambda: "w", lambda: True).of()["fingerprint"]

    args = make_args()
    assert value(args) == value(make_args())
    assert value(args) != value(make_args(**{name: other(name, args)}))


@pytest.mark.parametrize("name", settings_table.names(ARITHMETIC))
def test_the_probe_is_redone_where_a_setting_reaches_the_arithmetic(monkeypatch, make_args, name):
    def key(args: Any) -> Any:
        runner = SimpleNamespace(
            model_config=SimpleNamespace(model_path="/m"),
            attn_backend=None,
            device="cpu",
            server_args=args,
        )
        return cache.identity(runner, ["a"], 64)

    monkeypatch.setattr(cache.ranks, "tp_rank", lambda: 0)
    args = make_args()
    assert key(args) == key(make_args())
    assert key(args) != key(make_args(**{name: other(name, args)}))


def test_settings_without_effect_are_not_in_it(make_args):
    assert not set(fingerprint.ARGUMENTS) & set(settings_table.names(NO_EFFECT))
    assert fingerprint.arguments(make_args()) == fingerprint.arguments(
        make_args(port=1, random_seed=2, log_level="debug", max_running_requests=3)
    )


def test_the_text_of_a_file_counts_and_not_its_name(make_args, tmp_path):
    for name in fingerprint.READ:
        for number in (1, 2):
            (tmp_path / f"{name}{number}").write_text("the same")
        one, two = (
            fingerprint.arguments(make_args(**{name: str(tmp_path / f"{name}{number}")}))
            for number in (1, 2)
        )
        assert one == two
        assert one[name] == "the same"


def test_what_the_prefill_graphs_became_counts(make_args):
    def arguments(backend: str) -> Any:
        graphs = SimpleNamespace(prefill=SimpleNamespace(backend=backend))
        return fingerprint.arguments(make_args(cuda_graph_config=graphs))

    assert arguments("breakable") != arguments("disabled")
