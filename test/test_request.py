"""One request: gated, left alone or refused, and for which reason."""

from array import array
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sglang.srt.sampling.penaltylib import (
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
)

from margingate.config import GateConfig, GateError
from margingate.runtime.request.admission import attach, digest, queue
from margingate.runtime.request.record import (
    CACHE_NAMESPACE,
    LOGPROB_LISTS,
    ColumnsWanted,
    Counts,
    GateRequest,
    logprob_lists,
)
from margingate.runtime.request.sampling_params import Draw

CONFIG = GateConfig()
FAULTY = GateConfig(inject_faults=True)
OPT_OUT = {"deterministic": False}
VOCABULARY = 100


def request(custom: Any = None, *, top_k: int = 1, **changes: Any) -> SimpleNamespace:
    """A stand-in for SGLang's Req that the gate serves; `changes` go to whoever has the name."""
    params = {
        "custom_params": custom,
        "top_k": top_k,
        "max_new_tokens": 8,
        "n": 1,
        "sampling_seed": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "stop_token_ids": None,
        **dict.fromkeys(("logit_bias", "json_schema", "regex", "ebnf", "structural_tag")),
    }
    req = {
        "rid": "r",
        "origin_input_ids": array("q", [0, 5, VOCABULARY - 1]),
        "vocab_size": VOCABULARY,
        "extra_key": None,
        "return_hidden_states": False,
        "return_sampling_mask": False,
        "return_routed_experts": False,
        "token_indices_to_pool": None,
        **dict.fromkeys(("custom_logit_processor", "input_embeds", "positional_embed_overrides")),
        **dict.fromkeys(("lora_id", "session", "multi_item_delimiter_indices")),
        "multimodal_inputs": None,
    }
    assert changes.keys() <= params.keys() | req.keys()
    params.update({key: value for key, value in changes.items() if key in params})
    req.update({key: value for key, value in changes.items() if key in req})
    return SimpleNamespace(**req, sampling_params=SimpleNamespace(**params))


def classify(req: Any, config: GateConfig = CONFIG) -> GateRequest:
    attach(req, config)
    gate: GateRequest = req.gate
    return gate


def refused(req: SimpleNamespace, config: GateConfig = CONFIG) -> str:
    """The sentence for HTTP 400."""
    gate = classify(req, config)
    assert (gate.gated, gate.ungated_because) == (False, "refused")
    assert gate.refusal.endswith(".")
    assert "\n" not in gate.refusal
    return gate.refusal


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


def test_the_record_names_the_prompt():
    one, same, other = request(), request(), request()
    other.origin_input_ids = [*one.origin_input_ids, 1]
    records = [classify(req).summary(CONFIG)["prompt"] for req in (one, same, other)]
    assert records[0] == records[1] != records[2]
    assert len(records[0]) == 16
    assert digest([1 << 70]) == ""


def test_sampling_with_a_seed_is_gated():
    gate = classify(request(top_k=1 << 30, temperature=0.5, top_p=0.9, sampling_seed=7))
    assert gate.gated and gate.draw == Draw(7, 0.5, 1 << 30, 0.9, 0.0)
    assert gate.draw.filters and not Draw(7, 0.5, 1 << 30, 1.0, 0.0).filters
    assert classify(request(sampling_seed=7)).draw is None, "greedy: the seed decides nothing"
    assert classify(request(sampling_seed=-7)).gated


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_no_tensor_holds_is_refused(seed):
    text = refused(request(top_k=5, sampling_seed=seed))
    assert text == f"sampling_seed is {seed}: give a whole number from 0 to {(1 << 63) - 1}."


@pytest.mark.parametrize("seed", [None, 7, -1])
def test_a_score_is_gated_and_draws_nothing(seed):
    req = request(max_new_tokens=0, top_k=1 << 30, temperature=0.5, top_p=0.5, sampling_seed=seed)
    gate = classify(req)
    assert gate.gated and gate.draw is None
    params = req.sampling_params
    assert (params.top_k, params.temperature, params.top_p, params.min_p) == (1, 1.0, 1.0, 0.0)
    opted_out = request(OPT_OUT, max_new_tokens=0, top_k=9, temperature=0.5)
    assert not classify(opted_out).gated and opted_out.sampling_params.temperature == 0.5


@pytest.mark.parametrize("custom", [None, OPT_OUT])
def test_the_greedy_choice_at_a_temperature_has_log_probs_of_none(custom):
    """SGLang divides by it in a batch that also samples, and in no other."""
    req = request(custom, top_k=1, temperature=0.7, top_p=0.9)
    assert classify(req).gated is (custom is None)
    assert req.sampling_params.temperature == (0.7 if custom else 1.0)


def test_the_record_names_the_prompt_that_sglang_cut():
    req = request(origin_input_ids=array("q", [1, 2, 3, 4]))
    req.to_finish = None
    before = classify(req).prompt
    queue(req, "")
    assert req.gate.prompt == before
    req.origin_input_ids = req.origin_input_ids[:3]  # --allow-auto-truncate, behind its making
    queue(req, "")
    assert req.gate.prompt == digest([1, 2, 3]) != before


class Batch:
    """As much of SGLang's as its penalties look at: a request, and one with a least length."""

    device = "cpu"

    def __init__(self, req: Any) -> None:
        other = request(min_new_tokens=2)
        self.reqs = [req, other]
        for each in self.reqs:
            each.eos_token_ids = {2}
            each.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=2)

    def prepare(self) -> None:
        kinds: Any = {BatchedMinNewTokensPenalizer}
        BatchedPenalizerOrchestrator(VOCABULARY, cast(Any, self), kinds)


@pytest.mark.parametrize("custom", [None, OPT_OUT])
@pytest.mark.parametrize("stop", [-7, VOCABULARY + 1, 1 << 40, 1 << 70])
def test_stop_tokens_that_the_model_has_not_are_dropped(custom, stop):
    """SGLang's penalty ends its scheduler over them, whoever in the batch has a least length."""
    req = request(custom, stop_token_ids={5, stop, None})
    with pytest.raises((RuntimeError, ValueError)):
        Batch(req).prepare()
    classify(req)
    assert req.sampling_params.stop_token_ids == {5}
    Batch(req).prepare()


def test_a_choice_without_a_seed_of_its_own_is_refused():
    text = refused(request(top_k=5, sampling_seed=3, n=2))
    assert text.startswith("n is 2 with sampling_seed 3, and this choice has no seed of its own")
    assert classify(request(n=2)).gated
    assert not classify(request(top_k=5, sampling_seed=3, n=2, max_new_tokens=0)).refusal


def test_the_record_has_the_seed_of_what_was_drawn():
    drawn = classify(request(top_k=1 << 30, temperature=0.5, sampling_seed=7)).summary(CONFIG)
    assert drawn["seed"] == 7
    assert "seed" not in classify(request(sampling_seed=7)).summary(CONFIG)


OPT_IN = GateConfig(default="off")
STUDY = GateConfig(policy="observe", study=True)


@pytest.mark.parametrize("custom", [None, {}, OPT_OUT, {"thinking_budget": 3}])
def test_where_the_gate_is_asked_for_nobody_else_has_it(custom):
    gate = classify(request(custom), OPT_IN)
    word = "false" if custom is OPT_OUT else "not set"
    assert (gate.gated, gate.ungated_because) == (False, f"deterministic is {word}")
    assert classify(request({"deterministic": True}), OPT_IN).gated


def test_forced_ids_are_for_studies():
    forced = {"gate_forced_ids": [3, VOCABULARY - 1]}
    assert classify(request(forced), STUDY).forced == (3, VOCABULARY - 1)
    assert "needs a server started with --gate-study" in refused(request(forced))
    for bad in (5, ["a"], [True], "12"):
        assert "give a list of token ids" in refused(request({"gate_forced_ids": bad}), STUDY)
    text = refused(request({"gate_forced_ids": [3, VOCABULARY]}), STUDY)
    assert text.startswith(f"custom_params.gate_forced_ids holds {VOCABULARY}, but the model's")


def test_forced_ids_need_a_gate_that_only_observes():
    other = GateConfig(study=True)
    assert "--gate-policy observe" in refused(request({"gate_forced_ids": [3]}), other)


def test_studies_report_choices_and_run_without_overlap():
    gate = classify(request(), STUDY)
    gate.choices.append((3, 0.5))
    assert gate.summary(STUDY)["choices"] == [(3, 0.5)]
    with pytest.raises(GateError, match="--gate-study forces tokens"):
        GateConfig(policy="observe", study=True, overlap="on")


def test_columns_are_kept_and_compared_in_studies_only():
    keep, against = {"gate_columns": {"keep": "k"}}, {"gate_columns": {"against": "k"}}
    assert classify(request(keep)).columns_wanted is None
    assert classify(request(keep), STUDY).columns_wanted == ColumnsWanted("k", True)
    assert classify(request(against), STUDY).columns_wanted == ColumnsWanted("k", False)
    for bad in ("k", {}, {"drop": "k"}, {"keep": "k", "against": "k"}):
        assert classify(request({"gate_columns": bad}), STUDY).columns_wanted is None
    gate = classify(request(against), GateConfig(study=True))
    gate.drift = {"rows": []}
    assert gate.summary(GateConfig(study=True))["columns"] == {"rows": []}


def test_observing_gates_nothing():
    gate = classify(request(), GateConfig(policy="observe"))
    assert (gate.gated, gate.ungated_because) == (False, "policy observe")


def test_a_request_without_an_end_is_gated():
    assert classify(request(max_new_tokens=None)).gated


@pytest.mark.parametrize("value", [[1], "x", 5])
def test_parameters_of_the_clients_own_that_are_no_object_are_answered(value):
    req = request()
    req.sampling_params.custom_params = value
    attach(req, GateConfig(study=True, policy="observe"))
    assert req.gate.refusal == f"custom_params is {value!r}: give an object."


@pytest.mark.parametrize("seed", ["a", [1], 1.5, True])
def test_a_seed_that_is_no_whole_number_is_answered(seed):
    text = refused(request(temperature=0.9, top_k=50, sampling_seed=seed))
    assert text.startswith(f"sampling_seed is {seed!r}: give a whole number")


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
    ("name", "value"),
    [
        ("frequency_penalty", 0.1),
        ("presence_penalty", -0.1),
        ("repetition_penalty", 1.1),
        ("min_new_tokens", 1),
    ],
)
def test_penalties_are_the_gates_from_here_on(name, value):
    req = request(**{name: value})
    attach(req, CONFIG)
    neutral = request().sampling_params
    assert req.gate.gated and not req.gate.refusal
    assert getattr(req.gate.penalties, name.removesuffix("_penalty")) == value
    assert getattr(req.sampling_params, name) == getattr(neutral, name), "SGLang has none"
    ungated = request(OPT_OUT, **{name: value})
    attach(ungated, CONFIG)
    assert ungated.gate.penalties is None and getattr(ungated.sampling_params, name) == value
    attach(plain := request(), CONFIG)
    assert plain.gate.penalties is None


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
    ("ids", "bad"),
    [([-1], -1), ([VOCABULARY], VOCABULARY), ([1, -7, 200], -7), ([1, 200, -7], 200)],
)
@pytest.mark.parametrize("custom", [None, OPT_OUT])
def test_an_id_outside_the_vocabulary_is_answered_opted_out_or_not(ids, bad, custom):
    text = refused(request(custom, origin_input_ids=array("q", ids)))
    assert text == f"input_ids holds {bad}, but the model's vocabulary is 0 to {VOCABULARY - 1}."


@pytest.mark.parametrize(
    "changes",
    [
        {"origin_input_ids": array("q", [0, VOCABULARY - 1])},
        {"origin_input_ids": array("q")},
        {"origin_input_ids": None},
        {"origin_input_ids": array("q", [5000]), "vocab_size": None},
    ],
)
def test_ids_that_fit_or_cannot_be_judged_pass(changes):
    assert classify(request(**changes)).gated


def test_faults_need_a_server_started_for_them():
    text = refused(request({"gate_fault_rows": [1]}))
    assert text.startswith("custom_params.gate_fault_rows needs a server started with ")
    assert "--gate-inject-faults" in text


def test_faults_are_kept_where_they_are_honoured():
    gate = classify(request({"gate_fault_rows": [3, 1, 3]}), FAULTY)
    assert (gate.gated, gate.faults) == (True, frozenset({1, 3}))


@pytest.mark.parametrize("copies", [1, 2])
def test_a_score_has_no_row_for_faults(copies):
    """SGLang sends one first for a request with `n` above 1, with the same parameters."""
    gate = classify(request({"gate_fault_rows": [1]}, max_new_tokens=0, n=copies), FAULTY)
    assert (gate.gated, gate.faults) == (True, frozenset())


@pytest.mark.parametrize("config", [CONFIG, FAULTY])
def test_no_faults_are_no_faults(config):
    assert classify(request({"gate_fault_rows": []}), config).gated


@pytest.mark.parametrize("rows", [3, "12", {"1": 2}, [1.0], [True], ["1"], [[1]], None])
def test_malformed_faults_are_answered(rows):
    text = refused(request({"gate_fault_rows": rows}), FAULTY)
    assert text == f"custom_params.gate_fault_rows is {rows!r}: give a list of row numbers."


def test_gated_requests_have_radix_namespaces_of_their_own():
    keys = []
    for custom in (None, OPT_OUT):
        for extra in (None, "salt"):
            req = request(custom, extra_key=extra)
            attach(req, CONFIG)
            keys.append(req.extra_key)
    assert keys == [CACHE_NAMESPACE, CACHE_NAMESPACE + "salt", None, "salt"]


def test_two_keys_of_ungated_requests_never_share_a_namespace():
    given = ["x", "margingate:x", "not-margingate:x", "not-not-margingate:x", "not-x"]
    keys = []
    for extra in given:
        req = request(OPT_OUT, extra_key=extra)
        attach(req, CONFIG)
        keys.append(req.extra_key)
    assert len(set(keys)) == len(given)


@pytest.mark.parametrize(("faults", "room", "refused"), [([1], 0, True), ([1], 1, False)])
def test_a_fault_in_an_answer_without_room_is_answered(faults, room, refused):
    """SGLang cuts `max_new_tokens` behind `Req.__init__`, so this is asked at the queue."""
    from margingate.runtime.hooks import handlers

    req, aborts = request({"gate_fault_rows": faults}), []
    attach(req, FAULTY)
    req.sampling_params.max_new_tokens, req.to_finish = room, None
    req.set_finish_with_abort = aborts.append
    handlers.add_request(None, req)
    text = (
        "gate_fault_rows is [1], but a prompt of 3 tokens leaves no room for an answer: shorten "
        "the prompt, or raise --context-length."
    )
    assert aborts == [text] * refused


@pytest.mark.parametrize(("least", "room", "kept"), [(6, 3, 3), (6, 0, 0), (2, 3, 2)])
def test_a_least_length_is_cut_with_the_length(least, room, kept):
    """As SGLang cuts it, which the gate has taken it from by then."""
    from margingate.runtime.hooks import handlers

    req = request(min_new_tokens=least, repetition_penalty=1.5)
    attach(req, CONFIG)
    req.sampling_params.max_new_tokens, req.to_finish = room, None
    handlers.add_request(None, req)
    assert req.gate.penalties.values == (0.0, 0.0, 1.5)
    assert req.gate.penalties.min_new_tokens == kept


@pytest.mark.parametrize("extra", [CACHE_NAMESPACE, CACHE_NAMESPACE + "salt"])
def test_a_request_that_is_not_gated_cannot_ask_for_a_gated_namespace(extra):
    """Its columns come from batched prefills: a gated prompt that met them would drift."""
    req = request(OPT_OUT, extra_key=extra)
    attach(req, CONFIG)
    assert not (req.extra_key or "").startswith(CACHE_NAMESPACE)


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


def test_keys_differ_where_clients_reuse_an_id():
    one, two = classify(request(rid="same")), classify(request(rid="same"))
    assert one.key != two.key
    assert one.key.endswith(":same")


def test_the_summary_of_a_gated_request_has_the_settings_and_every_count():
    gate = classify(request())
    gate.counts.add(Counts(steps=7, flips=1, drain_s=0.5))
    summary = gate.summary(GateConfig(threshold=0.25, guarantee="exact"))
    assert summary["gated"] is True
    assert (summary["guarantee"], summary["policy"]) == ("exact", "margin")
    assert summary["threshold"] == 0.25
    assert (summary["steps"], summary["flips"], summary["drain_s"]) == (7, 1, 0.5)
    assert set(Counts.__slots__) <= summary.keys()


def test_counts_add_up_field_by_field():
    total = Counts()
    for number in (1, 2):
        total.add(Counts(**dict.fromkeys(Counts.__slots__, number)))
    assert all(getattr(total, name) == 3 for name in Counts.__slots__)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_known_as_they_were_noted(seed):
    """Of rows that are canonical and not flagged, with or without a call."""
    rng = Random(seed)
    gate, wanted = GateRequest("1:a", True), []
    for row in range(60):
        flagged, canonical = rng.choice(
            [(False, True), (False, True), (True, False), (False, False)]
        )
        if canonical and rng.random() < 0.7:
            gate.margins.append(row)
        else:
            gate.note_row(row, flagged=flagged, canonical=canonical)
        wanted.append((float(row), flagged, canonical))
        if rng.random() < 0.1:
            kept = rng.randrange(len(wanted) + 1)
            gate.forget_rows(kept)
            del wanted[kept:]
        rows = range(1, len(wanted) + 1)
        canonical_rows = gate.were_canonical(len(wanted) + 3)
        flags = [gate.was_flagged(row) for row in rows]
        assert list(zip(gate.margins, flags, canonical_rows, strict=True)) == wanted
        assert gate.were_canonical(5) == canonical_rows[:5]
        assert not gate.was_flagged(len(wanted) + 1)


def test_log_prob_lists_are_those_that_are_kept():
    kept = SimpleNamespace(**{name: [] for name in LOGPROB_LISTS})
    kept.output_token_logprobs_val = [0.0]
    req = SimpleNamespace(return_logprob=True, logprob=kept)
    assert logprob_lists(req) == {"output_token_logprobs_val": [0.0]}
    req.return_logprob = False
    assert logprob_lists(req) == {}
