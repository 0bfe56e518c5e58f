"""One request: gated, left alone or refused, and for which reason."""

from array import array

import pytest
from request_stand_in import CONFIG, OPT_OUT, VOCABULARY, classify, refused, request

from margingate.config import GateConfig
from margingate.runtime.request.admission import attach, digest
from margingate.runtime.request.record import CACHE_NAMESPACE

OPT_IN = GateConfig(default="off")


@pytest.mark.parametrize("custom", [None, {}, {"deterministic": True}, {"thinking_budget": 3}])
def test_a_greedy_request_is_gated_unless_it_says_otherwise(custom):
    gate = classify(request(custom))
    assert (gate.gated, gate.ungated_because, gate.refusal) == (True, "", "")
    assert gate.faults == frozenset()


def test_the_object_that_sglang_puts_into_custom_params_does_no_harm():
    req = request({"deterministic": True})
    req.sampling_params.custom_params["__req__"] = req
    assert classify(req).gated


@pytest.mark.parametrize(
    ("req", "because"),
    [
        (request(OPT_OUT), "deterministic is false"),
        (request(top_k=2), "sampling has no seed"),
        (request(top_k=1 << 30, temperature=0.5), "sampling has no seed"),
        (request(max_new_tokens=0, token_indices_to_pool=[1]), "no token is generated"),
        (request(max_new_tokens=0, multi_item_delimiter_indices=[1]), "no token is generated"),
        (request(max_new_tokens=0, return_hidden_states=True), "no token is generated"),
        (request(max_new_tokens=0, top_k=9, n=2), "sampling has no seed"),
    ],
)
def test_a_request_that_is_not_gated_says_why(req, because):
    gate = classify(req)
    assert (gate.gated, gate.ungated_because, gate.refusal) == (False, because, "")
    said = {"gated": False, "because": because, "prompt": digest(req.origin_input_ids)}
    assert gate.summary(CONFIG) == said


@pytest.mark.parametrize("custom", [None, {}, OPT_OUT, {"thinking_budget": 3}])
def test_where_the_gate_is_asked_for_nobody_else_has_it(custom):
    gate = classify(request(custom), OPT_IN)
    word = "false" if custom is OPT_OUT else "not set"
    assert (gate.gated, gate.ungated_because) == (False, f"deterministic is {word}")
    assert classify(request({"deterministic": True}), OPT_IN).gated


def test_observing_gates_nothing():
    gate = classify(request(), GateConfig(policy="observe"))
    assert (gate.gated, gate.ungated_because) == (False, "policy observe")


def test_a_request_without_an_end_is_gated():
    assert classify(request(max_new_tokens=None)).gated


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {}),
        ("logit_bias", {"5": 1.0}),
        ("json_schema", "{}"),
        ("regex", "a+"),
        ("ebnf", "root ::= 'a'"),
        ("structural_tag", "{}"),
    ],
)
def test_grammars_and_biases_are_gated(name, value):
    assert classify(request(**{name: value})).gated


@pytest.mark.parametrize(
    ("params", "gated", "refusal"),
    [
        ({"temperature": 0}, True, ""),
        ({"top_k": 1}, True, ""),
        ({"temperature": 0, "custom_params": {"deterministic": True}}, True, ""),
        ({"temperature": 0, "custom_params": OPT_OUT}, False, ""),
        ({"temperature": 0.7}, False, ""),
        ({"temperature": 0, "regex": "a+"}, True, ""),
        ({"temperature": 0, "min_new_tokens": 2, "repetition_penalty": 1.1}, True, ""),
    ],
)
def test_a_request_of_sglang_has_what_the_stand_in_has(params, gated, refusal):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    ids = array("q", [0, VOCABULARY - 1])
    req = Req("r", "", ids, SamplingParams(**params), vocab_size=VOCABULARY)
    gate = classify(req)
    assert (gate.gated, gate.refusal[:24]) == (gated, refusal[:24])
    assert req.extra_key == (CACHE_NAMESPACE if gated else None)


@pytest.mark.parametrize("value", [[1], "x", 5])
def test_parameters_of_the_clients_own_that_are_no_object_are_answered(value):
    req = request()
    req.sampling_params.custom_params = value
    attach(req, GateConfig(study=True, policy="observe"))
    assert req.gate.refusal == f"custom_params is {value!r}: give an object."


@pytest.mark.parametrize("value", [0, 1, "false", "", None, [False], {}])
def test_a_malformed_switch_is_answered(value):
    text = refused(request({"deterministic": value}))
    assert text == f"custom_params.deterministic is {value!r}: give true or false."


UNSERVED = [
    ("custom_logit_processor", "code"),
    ("input_embeds", [[0.0]]),
    ("return_hidden_states", True),
    ("return_hidden_states", "last"),
    ("return_sampling_mask", True),
    ("token_indices_to_pool", [0]),
]


@pytest.mark.parametrize(("name", "value"), UNSERVED)
def test_what_cannot_be_rolled_back_is_answered_with_both_ways_out(name, value):
    text = refused(request(**{name: value}))
    assert text.startswith(f"this request uses {name}, which the deterministic gate cannot roll")
    assert "drop it" in text
    assert '"deterministic": false, in sampling_params or beside OpenAI\'s parameters' in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("positional_embed_overrides", [0], "embedding overrides"),
        ("lora_id", "adapter", "a LoRA adapter"),
        ("session", object(), "a session"),
    ],
)
def test_the_rest_is_answered_in_words(name, value, words):
    assert refused(request(**{name: value})).startswith(f"this request uses {words}, ")


@pytest.mark.parametrize(("name", "value"), UNSERVED)
def test_opting_out_serves_them(name, value):
    gate = classify(request(OPT_OUT, **{name: value}))
    assert (gate.ungated_because, gate.refusal) == ("deterministic is false", "")
