"""What a client may write as a sampling parameter, and the sentence for anything else."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from margingate.runtime.client import openai_answers, switch
from margingate.runtime.client.parameter_types import (
    DEEPEST,
    list_error,
    refusal,
    validate_one_request,
)

MANAGER = SimpleNamespace(
    sampling_params_class=SamplingParams,
    model_config=SimpleNamespace(vocab_size=1000, hidden_size=4),
)

EXPRESSIONS = (
    "a regular expression or a list of them, with fewer than 1000000 steps at one place: repeats "
    "multiply where they may share characters, and one without a bound counts 1000, and without a "
    "group that captures in a possessive repeat"
)

SERVED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0, "top_p": 1, "min_p": 0.05, "top_k": -1, "max_new_tokens": 8},
    {"max_new_tokens": None, "logit_bias": None, "stop": None, "stop_token_ids": None},
    {"max_new_tokens": np.int64(8), "temperature": np.float32(0.5)},
    {"top_k": (1 << 31) - 1, "max_new_tokens": 10**12},
    {"stop": "a"},
    {"stop": ["a", "b"], "stop_regex": "[0-9]{2}", "stop_token_ids": [5, None]},
    {"stop": ("a",), "stop_token_ids": {5}, "stop_regex": ["a", "b+"]},
    {"logit_bias": {}},
    {"logit_bias": {"5": 1, 6: -2.5, " 7": np.float64(3)}},
    {"json_schema": "{}", "regex": "", "ebnf": "root ::= 'a'", "structural_tag": "{}"},
    {"beam_width": 1, "watermark": None, "ebnf_full_assistant": True},
    {"custom_params": {"anything": [1, {"at": "all"}]}, "ignore_eos": 1, "deterministic": True},
    {"repetition_penalty": 1, "frequency_penalty": True, "skip_special_tokens": np.bool_(True)},
)
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("max_new_tokens", 1.5, f"a whole number below {1 << 63}"),
    ("max_new_tokens", "many", f"a whole number below {1 << 63}"),
    ("min_new_tokens", "x", "a whole number below 2147483648"),
    ("top_k", 20.0, "a whole number below 2147483648"),
    ("top_k", 1 << 31, "a whole number below 2147483648"),
    ("stream_interval", "x", f"a whole number below {1 << 63}"),
    ("temperature", "x", "a number that is finite in float32"),
    ("top_p", [1], "a number that is finite in float32"),
    ("repetition_penalty", "x", "a number that is finite in float32"),
    ("skip_special_tokens", "x", "true or false"),
    ("spaces_between_special_tokens", 1, "true or false"),
    ("regex", 5, "a text"),
    ("json_schema", {"type": "object"}, "a text"),
    ("stop", 5, "a text or a list of texts"),
    ("stop", ["a", 5], "a text or a list of texts"),
    (
        "stop_regex",
        "((",
        EXPRESSIONS,
    ),
    (
        "stop_regex",
        ["a", "(("],
        EXPRESSIONS,
    ),
    ("stop_token_ids", 5, "a list of token ids"),
    ("stop_token_ids", ["x"], "a list of token ids"),
    ("logit_bias", [1], "an object with a finite number for each token id"),
    ("logit_bias", {"5": "x"}, "an object with a finite number for each token id"),
    ("logit_bias", {"5": None}, "an object with a finite number for each token id"),
    ("logit_bias", {"5": float("nan")}, "an object with a finite number for each token id"),
    ("logit_bias", {"5": 1e39}, "an object with a finite number for each token id"),
    ("logit_bias", {"5": 10**400}, "an object with a finite number for each token id"),
    ("temperature", float("nan"), "a number that is finite in float32"),
    ("temperature", 10**400, "a number that is finite in float32"),
    ("n", 129, "a whole number, at most 128"),
    ("beam_width", 2, "1, since a server with the deterministic gate searches no beams"),
    ("ebnf_full_assistant", "x", "true or false"),
    ("max_new_tokens", 1 << 63, f"a whole number below {1 << 63}"),
    ("sampling_seed", 1 << 63, f"a whole number below {1 << 63}"),
    (
        "stop_regex",
        "(a+)+$b",
        EXPRESSIONS,
    ),
    (
        "stop_regex",
        "(a|aa)+$b",
        EXPRESSIONS,
    ),
    ("logit_bias", {"x": 1}, "an object with a finite number for each token id"),
)
OF_ONE_PROMPT: tuple[tuple[str, Any, str], ...] = (
    ("return_logprob", [True], "true or false"),
    ("return_sampling_mask", [False], "true or false"),
    ("logprob_start_len", [0], f"a whole number below {1 << 63}"),
    ("logprob_start_len", [], f"a whole number below {1 << 63}"),
    ("return_hidden_states", [False], "true, false or a mode"),
    ("return_hidden_states", [], "true, false or a mode"),
    ("sampling_logprobs_mode", ["x"], "a text"),
    *(
        ("custom_logit_processor", value, "what its class's to_str() says")
        for value in (["x"], "x", "", "[]", '{"callable": 5}', '{"callable": "8x"}', '{"x": "80"}')
    ),
    ("bootstrap_room", [5], f"a whole number below {1 << 63}"),
    *((name, 1, "a text") for name in ("rid", "lora_id", "extra_key", "session_id")),
    ("cache_salt", ["a"], "a text"),
    ("received_time", "now", "a number that is finite in float32"),
    ("custom_labels", [None], "an object"),
    ("custom_labels", ["model_name"], "an object"),
    ("priority", "high", f"a whole number below {1 << 63}"),
)


@pytest.mark.parametrize("params", SERVED)
def test_what_sglang_takes_is_served(params):
    assert refusal(params) == ""
    validate_one_request(MANAGER, SimpleNamespace(sampling_params=params), [1])


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_another_type_is_one_sentence(name, value, words):
    said = repr(value) if len(repr(value)) <= 80 else repr(value)[:80] + "..."
    sentence = f"{name} is {said}: give {words}."
    assert refusal({"temperature": 0, name: value}) == sentence
    with pytest.raises(ValueError, match=name) as caught:
        validate_one_request(MANAGER, SimpleNamespace(sampling_params={name: value}), [1])
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("name", "value", "words"), OF_ONE_PROMPT)
def test_a_list_for_one_prompt_is_one_sentence(name, value, words):
    """SGLang takes lists of several prompts' values; its scheduler ended at these."""
    obj = SimpleNamespace(sampling_params={}, **{name: value})
    with pytest.raises(ValueError, match=name) as caught:
        validate_one_request(MANAGER, obj, [1])
    assert str(caught.value) == f"{name} is {value!r}: give {words}."


def test_fields_of_one_prompt_are_served():
    for mode in (True, False, None, "last"):
        obj = SimpleNamespace(
            sampling_params=None, return_logprob=np.bool_(True), logprob_start_len=-1
        )
        obj.return_hidden_states, obj.bootstrap_room = mode, None
        obj.rid, obj.extra_key, obj.priority = "one", "", np.int64(3)
        obj.custom_logit_processor = DisallowedTokensLogitsProcessor.to_str()
        validate_one_request(MANAGER, obj, [1])


def test_rows_that_a_client_names_are_refused():
    obj = SimpleNamespace(sampling_params={"max_new_tokens": 0}, token_indices_to_pool=[0])
    with pytest.raises(ValueError, match=r"^token_indices_to_pool .* drop it\.$"):
        validate_one_request(MANAGER, obj, [1])


@pytest.mark.parametrize("places", [5, [], [3], [-1], [1, 1], [2, 0], ["0"], [[0]]])
def test_delimiters_that_a_prompt_has_not_are_refused(places):
    """With --enable-mis SGLang reads rows there, and its scheduler ended."""
    obj = SimpleNamespace(sampling_params={"max_new_tokens": 0})
    obj.multi_item_delimiter_indices = places
    with pytest.raises(ValueError, match=r"^multi_item_delimiter_indices is .* from 0 to 2\.$"):
        validate_one_request(MANAGER, obj, [7, 8, 9])
    for good in (None, [0], [0, 2], (1,)):
        obj.multi_item_delimiter_indices = good
        validate_one_request(MANAGER, obj, [7, 8, 9])


def test_labels_that_the_metrics_have_not():
    """SGLang's launcher ended as it counted the answer, where it keeps metrics."""
    collector = SimpleNamespace(labels={"model_name": "m", "team": ""})
    manager = SimpleNamespace(**vars(MANAGER), metrics_collector=collector)
    obj = SimpleNamespace(sampling_params={}, custom_labels={"team": "a", "x": "b"})
    with pytest.raises(ValueError, match=r"custom_labels has 'x', .*: drop it, or start the"):
        validate_one_request(manager, obj, [1])
    validate_one_request(MANAGER, obj, [1])
    obj.custom_labels = {"team": "a"}
    validate_one_request(manager, obj, [1])


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (5, "session_params is 5: give an object."),
        ({"id": ["s"]}, "session_params.id is ['s']: give a text."),
        ({"id": "s", "rid": {}}, "session_params.rid is {}: give a text."),
        ({"id": "s", "offset": "x"}, "session_params.offset is 'x': give a whole number."),
        ({"id": "s", "offset": True}, "session_params.offset is True: give a whole number."),
        ({"id": "s", "replace": "x"}, "session_params.replace is 'x': give true or false."),
        ({"ids": "s"}, "session_params.ids is 's': drop it, or check its spelling."),
        ({"id": "s", "replace": True}, "session_params.replace is not served with the "),
        ({"id": "s", "rid": "a", "replace": True}, "session_params.replace is not served with "),
    ],
)
def test_session_parameters_over_which_the_scheduler_would_end(params, sentence):
    obj = SimpleNamespace(sampling_params={}, session_params=params)
    with pytest.raises(ValueError, match="session_params") as caught:
        validate_one_request(MANAGER, obj, [1])
    assert str(caught.value).startswith(sentence)


def test_a_session_may_have_the_tokens_of_a_prompt():
    params = {"id": "s", "rid": "a", "offset": -1, "replace": False, "drop_previous_output": None}
    obj = SimpleNamespace(sampling_params={}, session_params=params)
    validate_one_request(MANAGER, obj, [])
    for obj.session_params in ({}, {"id": None}, None):
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            validate_one_request(MANAGER, obj, [])


def test_custom_parameters_that_are_no_object():
    with pytest.raises(ValueError, match="custom_params is 5: give an object"):
        validate_one_request(MANAGER, SimpleNamespace(sampling_params={"custom_params": 5}), [1])


def test_a_long_value_is_cut():
    sentence = refusal({"stop": list(range(1000))})
    assert sentence.startswith("stop is [0, 1, 2") and len(sentence) < 140


def test_an_object_without_parameters_is_left_alone():
    """As that of an embedding request may be."""
    validate_one_request(MANAGER, SimpleNamespace(sampling_params=None), None)


def test_a_prompt_without_tokens():
    """An empty text, of which a tokenizer without a first token makes nothing."""
    obj = SimpleNamespace(sampling_params={})
    with pytest.raises(ValueError, match=r"the prompt has no tokens: send a text"):
        validate_one_request(MANAGER, obj, [])


@pytest.mark.parametrize("name", ["max_tokens", "is_normalized"])
def test_an_unknown_parameter_is_named(name):
    obj = SimpleNamespace(sampling_params={"temperature": 0, name: 5})
    with pytest.raises(ValueError, match=f"'{name}' is not a sampling parameter"):
        validate_one_request(MANAGER, obj, [1])


@pytest.mark.parametrize("number", [-1, 1001, "x", 1.5])
def test_more_top_log_probs_than_tokens(number):
    obj = SimpleNamespace(sampling_params={}, top_logprobs_num=number)
    with pytest.raises(ValueError, match=r"top_logprobs_num is .* from 0 to 1000\."):
        validate_one_request(MANAGER, obj, [1])


@pytest.mark.parametrize("number", [None, 0, 1000])
def test_as_many_as_there_are_tokens(number):
    obj = SimpleNamespace(sampling_params={}, top_logprobs_num=number)
    validate_one_request(MANAGER, obj, [1])


def test_embedding_overrides_are_no_json():
    obj = SimpleNamespace(sampling_params={}, positional_embed_overrides=5)
    with pytest.raises(ValueError, match="positional_embed_overrides are tensors"):
        validate_one_request(MANAGER, obj, [1])
    obj.positional_embed_overrides = PositionalEmbeds(embeds=torch.zeros(1, 4), positions=[0])
    validate_one_request(MANAGER, obj, [1])


@pytest.mark.parametrize("width", [0, 3, 5])
def test_embeddings_of_another_width_replace_no_tokens(width):
    """SGLang's scheduler ended at these, as `/v1/score` makes them of `query_embed_overrides`."""
    embeds = PositionalEmbeds(embeds=torch.zeros(1, width), positions=[0])
    obj = SimpleNamespace(sampling_params={}, positional_embed_overrides=embeds)
    with pytest.raises(ValueError, match=f"replaces a token has {width} numbers: give 4"):
        validate_one_request(MANAGER, obj, [1])


@pytest.mark.parametrize(
    ("embeds", "said"),
    [
        ([[0.5] * 3], "has the shape [1, 3]"),
        ([0.5] * 4, "has the shape [4]"),
        ([], "has the shape [0]"),
        ([[]], "has the shape [1, 0]"),
        ([[0.5] * 4, [0.5] * 3], "is no list of equally many numbers for each token"),
        ([["x"] * 4], "is no list of equally many numbers for each token"),
        ([[None] * 4], "is no list of equally many numbers for each token"),
    ],
)
def test_a_prompt_of_embeddings_has_those_of_the_model(embeds, said):
    """SGLang's scheduler ended at another width."""
    obj = SimpleNamespace(sampling_params={}, input_embeds=embeds)
    with pytest.raises(ValueError, match="input_embeds") as caught:
        validate_one_request(MANAGER, obj, None)
    assert str(caught.value) == f"input_embeds {said}: give 4 numbers for each token of the prompt."
    obj.input_embeds = [[0.5, 1, -2.0, 1e39]] * 3
    validate_one_request(MANAGER, obj, None)


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$b",
        "(a|aa)+$b",
        "a*a*b",
        "a+a+b",
        ".*foo.*bar",
        "(?i)a*A*b",
        r"\w+\d+x",
        "a*b?a*c",
        "(.{1,300}a){1,100}",
        "((a{0,30}){0,30}){0,30}b",
        "(?:a*)*",
        f"({'a*' * 200})*b",
        "(?i:a+A+a+A+a+A+a+A+x)",
        "(?i:a+)A+x",
        "a+(?i:A+)x",
        "(?i:(?-i:a+)A+)x",
        "(?i)(?:st|\N{LATIN SMALL LETTER LONG S}t)+x",
        "(?i)(?:µa|μa)+x",
        "(?i:(?:st|\N{LATIN SMALL LETTER LONG S}t)+)x",
        r"(?a)[^\w]*é[^\w]*éx",
        r"(?a:[^\w]*)é[^\w]*éx",
    ],
)
def test_expressions_that_may_stall_the_scheduler_are_refused(expression):
    assert refusal({"stop_regex": expression}).startswith("stop_regex is ")


@pytest.mark.parametrize(
    "expression",
    [
        "a*b",
        "[^\n]*END",
        r"\d+\.\d+b",
        r"\n\s*\d+\.\s+",
        r"\w+\s+\w+\s",
        "(a|b)+c",
        "",
        "a{0}",
        "[a-z]+-[0-9]+-x",
        "[^,]*,[^,]*;",
        "(red|blue)-[0-9]{3}",
        "(?i)</(think|tool)>",
        "(?i)(?:stop|king)+x",
        "(?i:stop|end) *END",
        r"第\d+章\s+x",
    ],
)
def test_expressions_whose_repeats_share_no_character_are_served(expression):
    assert refusal({"stop_regex": expression}) == ""


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"text": "a", "sampling_params": {"n": None}}, "n is null"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"n": None}]}, "n is null"),
        ({"input_ids": [1, 2], "sampling_params": []}, "sampling_params is an empty list"),
        ({"input_embeds": []}, "input_embeds is empty"),
        ({"input_embeds": [[]]}, "input_embeds is empty"),
    ],
)
def test_a_body_that_sglang_would_fail_over_is_refused_in_words(body, sentence):
    """It answers these HTTP 500."""
    found = switch.contract_error(lambda _body: None, body)
    assert found is not None and found.startswith(sentence)
    assert switch.contract_error(lambda _body: "SGLang's own", body) == "SGLang's own"


@pytest.mark.parametrize(
    "body",
    [
        {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": [{}, {"n": 1}]},
        {"input_ids": [[1], [2]], "rid": ["x", "y"]},
        {"text": "a", "rid": "x", "sampling_params": {"deterministic": False}},
        {"input_ids": 7, "rid": ["x"]},
        {"input_ids": [1, 2], "sampling_params": [{}]},
        {"text": ["a"], "sampling_params": [{}, {}]},
        {"text": [], "sampling_params": [{}]},
        {"text": "abc", "sampling_params": [{}]},
        {"text": "a", "rid": ["x", "y"], "sampling_params": {"n": 2}},
        {"input_ids": [], "sampling_params": None},
        [1],
        None,
    ],
)
def test_other_bodies_are_left_to_sglang(body):
    assert switch.contract_error(lambda _body: None, body) is None


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"a": value}])
def test_custom_params_that_cannot_be_pickled_are_refused(wrap):
    """SGLang answers HTTP 500."""
    custom = {"a": 1}
    for _ in range(DEEPEST - 1):
        custom = {"a": wrap(custom["a"])}
    validate_one_request(MANAGER, SimpleNamespace(sampling_params={"custom_params": custom}), [1])
    custom = {"a": [custom] * 3}
    for _ in range(900):
        custom = {"a": wrap(custom["a"])}
        with pytest.raises(ValueError, match=f"more than {DEEPEST} deep: flatten it"):
            request = SimpleNamespace(sampling_params={"custom_params": custom})
            validate_one_request(MANAGER, request, [1])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"text": ["a", "b"]}, "sampling_params is a list of 1, but there are 2 prompts: give an"),
        ({"input_ids": [[1]] * 3}, "sampling_params is a list of 1, but there are 3 prompts: give"),
        ({"text": "a", "sampling_params": 5}, "sampling_params is 5: give an object, or one for"),
        ({"text": ["a"], "sampling_params": [5]}, "sampling_params is 5: give an object, or one"),
        ({"input_ids": [1, 2], "rid": ["a", "b"]}, "rid is a list, but there is one prompt"),
        ({"text": "a", "sampling_params": {"n": 1}, "rid": ["a"]}, "rid is a list, but there is"),
        ({"text": "a", "sampling_params": {"n": 2}, "rid": ["x", "y"]}, ""),
        ({"text": ["a"], "rid": ["x"]}, ""),
        ({"input_embeds": [[[1.0]], [[2.0]]], "rid": ["x", "y"]}, ""),
        ({"text": "a"}, ""),
        ({"text": ["a"]}, ""),
        ({"text": []}, ""),
        ({"input_ids": [1, 2]}, ""),
        ({"input_ids": [[1], [2]], "sampling_params": [{}] * 3}, ""),
        ({"text": ["a", "b"], "sampling_params": {}}, ""),
        ({"text": ["a", "b"], "sampling_params": None}, ""),
    ],
)
def test_sampling_parameters_of_a_list_are_one_for_each_prompt(fields, sentence):
    """SGLang answers HTTP 500."""
    obj = SimpleNamespace(**({"sampling_params": [{}]} | fields))
    found = list_error(obj)
    assert found.startswith(sentence) and bool(found) == bool(sentence)
    if sentence:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            openai_answers.generate_request(None, None, obj)


def test_a_list_for_one_prompt_is_said_to_be_one():
    """Its first object was called no sampling parameter."""
    with pytest.raises(ValueError, match="is a list, but there is one prompt: give an object"):
        validate_one_request(MANAGER, SimpleNamespace(sampling_params=[{"n": 1}]), [1])
