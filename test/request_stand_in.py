"""A stand-in for a request of SGLang's, and what the gate makes of it."""

from array import array
from types import SimpleNamespace
from typing import Any

from sentences import sentence

from margingate.config import GateConfig
from margingate.runtime.request.admission import attach
from margingate.runtime.request.record import GateRequest

CONFIG = GateConfig()
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
    return sentence(gate.refusal)
