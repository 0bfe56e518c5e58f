"""Token ids that the model has not, in a prompt or as stops."""

from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest
from request_stand_in import OPT_OUT, VOCABULARY, classify, refused, request
from sglang.srt.sampling.penaltylib import (
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
)


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
