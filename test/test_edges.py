"""Edges between SGLang's scheduler and the gate that a server test meets only by chance."""

from __future__ import annotations

from collections import deque
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
from sglang.srt.managers.schedule_policy import AddReqResult

from margingate.config import GateConfig, GateError
from margingate.runtime.probe.checks import check_decode
from margingate.runtime.probe.checks.check_decode import CanonicalSteps
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.probe.startup_checks import StartupChecks
from margingate.runtime.request import guard, lifecycle
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest
from margingate.runtime.sampling import sampler
from margingate.runtime.schedule import next_batch
from margingate.runtime.schedule.prefill_admission import Admission
from margingate.runtime.verify import retraction


def unreachable(*_args, **_kwargs):
    raise AssertionError("SGLang's own code was called")


ALONE, TOGETHER = Admission(Prefill(), 64), Admission(Prefill(together=True), 64)


def test_prompts_that_may_share_a_forward_are_left_to_sglang():
    req = SimpleNamespace(gate=SimpleNamespace(gated=True, kept=None))
    adder = SimpleNamespace(can_run_list=[])
    asked = (adder, req, False, None)
    assert TOGETHER.add_one_req(lambda *a: a, *asked) == asked
    assert TOGETHER.add_chunked_req(lambda *a: a, "adder", req) == ("adder", req)


@pytest.mark.parametrize("gated", [True, False])
def test_nothing_is_prefilled_beside_a_parked_chunk(gated):
    """SGLang would take the parked chunk to be in that batch, and lose the answer's first token."""
    adder = SimpleNamespace(can_run_list=[])
    req = SimpleNamespace(gate=SimpleNamespace(gated=gated, kept=None))
    assert ALONE.add_one_req(unreachable, adder, req, True, None) is AddReqResult.OTHER


def retracted(reason):
    gate = SimpleNamespace(gated=True, kept=object(), key="a")
    return SimpleNamespace(
        gate=gate, finished_reason=reason, finished_len=1, finished=lambda: True, to_finish=None
    )


def test_a_first_token_that_stands_in_for_kept_output_ends_nothing():
    req = retracted(FINISH_LENGTH(1))
    lifecycle.finish_checked(OpenRequests(GateConfig(rows=8)), req)
    assert req.finished_reason is None and req.finished_len is None


def test_an_abort_of_a_retracted_request_stands():
    requests, req = OpenRequests(GateConfig(rows=8)), retracted(FINISH_ABORT("gone"))
    requests.open(req)
    lifecycle.finish_checked(requests, req)
    assert isinstance(req.finished_reason, FINISH_ABORT) and not requests.held


@pytest.mark.parametrize("guarantee", ["sparse", "exact"])
@pytest.mark.parametrize("as_decoded", [True, False])
@pytest.mark.parametrize("measured", [None, {1: True, 8: True}, {1: True, 8: False}])
def test_scores_are_those_of_decoding_where_every_answer_has_canonical_ones(
    guarantee, as_decoded, measured
):
    steps = None if measured is None else CanonicalSteps(measured, graphs=False)
    if steps is not None and as_decoded:
        steps.extend()
    checks = StartupChecks(cast(Any, None), steps, Prefill(True, as_decoded))
    settled = guarantee == "exact" or (measured is not None and all(measured.values()))
    expected = "as_decoded" if as_decoded and settled else "as_prefilled"
    assert checks.scores(GateConfig(guarantee=guarantee)) == expected


def test_a_batch_of_scores_is_sampled_where_one_is_gated():
    controller = cast(Any, SimpleNamespace(penalties=SimpleNamespace(admit=lambda _batch: None)))
    for gated in ([False, False], [False, True]):
        reqs = [SimpleNamespace(gate=SimpleNamespace(gated=each)) for each in gated]
        mode = SimpleNamespace(is_extend=lambda: True)
        batch = SimpleNamespace(reqs=reqs, forward_mode=mode, is_prefill_only=True)
        next_batch.launch(controller, batch)
        assert batch.is_prefill_only is not any(gated)
    guard.launches(None)


@pytest.mark.parametrize("scores", [[True, True], [True, False], []])
@pytest.mark.parametrize("prefill", [True, False])
def test_a_batch_of_scores_does_not_decode(scores, prefill):
    reqs = [SimpleNamespace(is_prefill_only=each) for each in scores]
    mode = SimpleNamespace(is_extend=lambda: prefill)
    last = SimpleNamespace(reqs=reqs, forward_mode=mode, is_prefill_only=False)
    next_batch._after_launch(last)
    assert last.is_prefill_only is (prefill and scores == [True, True])
    next_batch._after_launch(None)


def test_steps_of_any_size_are_canonical_where_prefill_gives_their_bits():
    steps = CanonicalSteps({1: True, 8: True}, graphs=True)
    assert (
        steps.is_canonical(5, True)
        and not steps.is_canonical(5, False)
        and not steps.is_canonical(9, True)
    )
    steps.extend()
    assert steps.is_canonical(5, False) and steps.is_canonical(900, False)
    some = CanonicalSteps({1: True, 8: False}, graphs=True)
    some.extend()
    assert steps.everywhere and not some.everywhere
    assert not some.is_canonical(8, True) and some.is_canonical(1, True)


def test_nothing_is_concluded_from_one_row_count_to_another_without_graphs():
    steps = CanonicalSteps({1: True, 2: False, 3: True, 5: True}, graphs=False)
    assert [n for n in range(1, 8) if steps.is_canonical(n, False)] == [1, 3, 5]
    assert str(steps) == "3 of 4 measured row counts (1, 3, 5)"
    steps = CanonicalSteps(dict.fromkeys(range(1, 65), True), graphs=False)
    assert str(steps) == "64 of 64 measured row counts (1 to 64)"


@pytest.mark.parametrize(
    ("mode", "computed", "ranks", "brought"),
    [
        ("extend", True, 1, True),
        ("extend", False, 1, False),
        ("extend", None, 1, False),
        ("decode", True, 1, False),
        ("extend", True, 2, False),
    ],
)
def test_a_computed_prefill_is_brought_in_before_the_next_step(mode, computed, ranks, brought):
    """Of several ranks one may see it earlier than another, and they must go on alike."""
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: mode == "extend"))
    event = None if computed is None else SimpleNamespace(query=lambda: computed)
    processed: list[object] = []
    stub = SimpleNamespace(
        enable_overlap=True,
        server_args=SimpleNamespace(tp_size=ranks),
        result_queue=deque([(batch, SimpleNamespace(copy_done=event))]),
        process_batch_result=lambda batch, _result: processed.append(batch),
    )
    in_flight = InFlight(stub)
    for _ in range(2):
        in_flight.bring_in_prefill()
    assert processed == [batch] * brought
    assert InFlight.is_processed(stub.result_queue[0][1]) is brought
    stub.result_queue.clear()
    in_flight.bring_in_prefill()
    stub.enable_overlap = False
    InFlight(stub).bring_in_prefill()


@pytest.mark.parametrize(
    ("ranks", "said"), [(1, "choose other --gate-rows, or"), (3, "tp-size 3 ")]
)
def test_a_verifier_whose_rows_depend_on_its_padding_is_refused(ranks, said):
    """So it is with several ranks where an all-reduce sums in an order that goes by the place."""
    runner = SimpleNamespace(server_args=SimpleNamespace(tp_size=ranks))

    def forward(rows, count, graph):
        return torch.arange(count).view(-1, 1) + float(len(rows))

    stub = SimpleNamespace(runner=runner, rows=8, forward=forward)
    with pytest.raises(GateError, match=f"8 rows depends on its padding.*{said}"):
        check_decode._reference(stub, list(range(16)))


@pytest.mark.parametrize(
    ("kept", "running", "room", "fits"),
    [
        (None, 3, 0, True),
        (6000, 3, 6198, False),
        (6000, 3, 9200, True),
        (6000, 0, 6198, True),
        (100, 3, 4200, False),
        (100, 3, 4300, True),
    ],
)
def test_a_retracted_request_is_admitted_where_its_answer_has_room_too(kept, running, room, fits):
    """Else it is prefilled and retracted in turns, and nothing else decodes."""
    gate = SimpleNamespace(kept=None if kept is None else SimpleNamespace(tokens=[0] * kept))
    req = SimpleNamespace(
        gate=gate,
        full_untruncated_fill_ids=[0] * 100,
        prefix_len=20,
        sampling_params=SimpleNamespace(max_new_tokens=8192),
    )
    adder = SimpleNamespace(
        can_run_list=[],
        running_batch=SimpleNamespace(is_empty=lambda: not running),
        rem_total_tokens=room,
        is_hybrid_swa=False,
    )
    found = TOGETHER.add_one_req(lambda *_: "SGLang's", adder, req, False, None)
    assert found == ("SGLang's" if fits else AddReqResult.NO_TOKEN)


def test_nothing_overtakes_a_gated_prompt_that_must_go_alone():
    """Ungated prompts in chunks, one behind another, would keep it from ever starting."""
    ungated, req = prompt(), prompt(gated=True)
    for half_done in (True, False):
        adder = SimpleNamespace(can_run_list=[ungated])
        found = ALONE.add_one_req(unreachable, adder, req, half_done, None)
        assert found is AddReqResult.OTHER


def prompt(
    *, gated: bool = False, embeds: Any = None, overrides: Any = None, items: Any = None
) -> Any:
    gate = SimpleNamespace(gated=gated, kept=None)
    named = {"positional_embed_overrides": overrides, "input_embeds": embeds}
    named["multi_item_delimiter_indices"] = items
    return SimpleNamespace(gate=gate, multimodal_inputs=None, **named)


@pytest.mark.parametrize("admission", [ALONE, TOGETHER])
@pytest.mark.parametrize("first", [None, [[0.5]]])
@pytest.mark.parametrize("second", [None, [[0.5]]])
def test_a_prompt_in_embeddings_shares_no_forward_with_one_in_tokens(admission, first, second):
    """SGLang gives the forward the embeddings of one alone, and its scheduler ended."""
    first, second = (prompt(embeds=embeds) for embeds in (first, second))
    adder = SimpleNamespace(can_run_list=[first])
    found = admission.add_one_req(lambda *_: "SGLang's", adder, second, False, None)
    alike = (first.input_embeds is None) == (second.input_embeds is None)
    assert found == ("SGLang's" if alike else AddReqResult.OTHER)


@pytest.mark.parametrize("first", [None, [3, 5]])
@pytest.mark.parametrize("second", [None, [2]])
def test_a_prompt_of_several_items_shares_no_forward_with_another(first, second):
    """SGLang's scheduler ended over a forward of scores in which one had no delimiters."""
    adder = SimpleNamespace(can_run_list=[prompt(items=first)])
    found = TOGETHER.add_one_req(lambda *_: "SGLang's", adder, prompt(items=second), False, None)
    assert found == ("SGLang's" if (first is None) == (second is None) else AddReqResult.OTHER)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_no_gated_prompt_shares_a_forward_with_overrides(gated, chunked):
    """GraniteMoeHybrid scales no embedding of a row in such a forward."""
    pair = [prompt(gated=gated), prompt(overrides=object())]
    first, second = reversed(pair) if chunked else pair
    adder = SimpleNamespace(can_run_list=[first])
    found = TOGETHER.add_one_req(lambda *_: "SGLang's", adder, second, False, None)
    assert found == (AddReqResult.OTHER if gated else "SGLang's")


@pytest.mark.parametrize(
    ("reason", "given_up"),
    [
        (None, False),
        (FINISH_ABORT(), False),
        (FINISH_ABORT("timeout", status_code=HTTPStatus.SERVICE_UNAVAILABLE), False),
        (FINISH_ABORT("memory", status_code=HTTPStatus.INTERNAL_SERVER_ERROR), True),
    ],
)
def test_an_abort_that_meets_a_retraction_keeps_what_was_settled(reason, given_up):
    assert retraction._is_given_up(SimpleNamespace(to_finish=reason)) is given_up


def test_a_retracted_request_that_left_the_queue_is_forgotten():
    def make(key: str, *, away: bool):
        return SimpleNamespace(gate=GateRequest(key, True), is_retracted=away)

    keys = ("decoding", "queued", "chunked", "merging", "again", "dropped")
    reqs = {key: make(key, away=key != "decoding") for key in keys}
    reqs["again"].is_retracted, reqs["again"].gate.kept = False, object()
    requests = OpenRequests(GateConfig(rows=8))
    for req in reqs.values():
        requests.open(req)
    requests.mark_prefilled_again(reqs["again"])
    scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[reqs["decoding"]]),
        last_batch=SimpleNamespace(reqs=[reqs["merging"]]),
        waiting_queue=[reqs["queued"]],
        chunked_req=reqs["chunked"],
    )
    next_batch.close_vanished(scheduler, requests, [])
    assert [key for key in keys if key not in requests] == ["dropped"]


# -- what SGLang's sampler is given to choose from


@pytest.mark.parametrize(
    ("greedy", "observes", "logprobs", "masks", "width"),
    [
        (True, False, False, None, 1),
        (True, False, False, [False, False], 1),
        (True, False, False, [False, True], None),
        (True, False, True, None, 1),
        (True, False, True, [False, True], None),
        (True, True, False, None, None),
        (False, False, False, None, None),
    ],
)
def test_a_greedy_batch_leaves_sglang_one_column_to_choose_from(
    greedy, observes, logprobs, masks, width
):
    info = SimpleNamespace(
        is_all_greedy=greedy, return_sampling_masks=masks, top_ks=torch.tensor([1, 20])
    )
    forward = sampler._Forward(info, None, torch.zeros(2), logprobs)
    info.temperatures = torch.ones(2, 1)
    sampling = sampler.Sampling(cast(Any, None), observes=observes)
    sampling._forward = forward
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    given = sampling.after_preprocess(logits)
    assert (None if given is None else given.shape[1]) == width
    assert forward.best.ids.tolist() == [1, 0] and len(logits[0]) == 3
    assert (forward.logprobs is not None) == logprobs
    sampling._forward = None
    assert sampling.after_preprocess(logits) is None, "log-probs without a token"
