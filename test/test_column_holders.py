"""Each asker of who holds K/V columns sees whom it must, and nobody twice."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.in_flight import InFlight

PLACES = ["processed", "running", "last", "in flight", "held", "rejoining", "open", "in chunks"]


class Open(list[Any]):
    """As much of OpenRequests as is asked."""

    def __init__(self, given: dict[str, list[Any]]) -> None:
        super().__init__(given["open"])
        self.held, self.rejoining = given["held"], given["rejoining"]


def request(*, holds: bool = True, gated: bool = True) -> Any:
    req = SimpleNamespace(kv=SimpleNamespace(holds_kv=holds))
    if gated:
        req.gate = object()
    return req


def holders(place: str, req: Any) -> ColumnHolders:
    given = {each: [req] if each == place else [] for each in PLACES}
    batch = {each: SimpleNamespace(reqs=given[each]) for each in PLACES}
    scheduler = SimpleNamespace(
        running_batch=batch["running"],
        last_batch=batch["last"],
        chunked_req=req if place == "in chunks" else None,
        result_queue=[(batch["in flight"], object())],
    )
    in_flight = object.__new__(InFlight)
    in_flight._scheduler, in_flight.overlaps = scheduler, True
    in_flight._processed = batch["processed"]
    return ColumnHolders(scheduler, cast(Any, Open(given)), in_flight)


@pytest.mark.parametrize("place", PLACES)
def test_who_sees_whom(place):
    req = request()
    found = holders(place, req)
    assert (found.all() == [req]) is (place != "open")  # one is also where it holds columns
    assert (found.recorded() == [req]) is (place not in ("processed", "open"))
    waited_for = place in ("running", "open", "in chunks")
    assert found.others(SimpleNamespace(reqs=[]), request()) is waited_for
    assert not found.others(SimpleNamespace(reqs=[]), req)


@pytest.mark.parametrize("place", PLACES)
def test_nobody_sees_one_without_columns(place):
    found = holders(place, request(holds=False))
    assert not found.all() and not found.recorded()
    assert not found.others(SimpleNamespace(reqs=[]), request())


def test_slots_of_one_that_the_gate_never_saw_are_counted_but_it_has_no_record():
    req = request(gated=False)
    found = holders("running", req)
    assert found.all() == [req] and not found.recorded()


def test_one_in_several_places_is_there_once_and_a_batch_may_be_missing():
    req = request()
    found = holders("running", req)
    found._requests.held.append(req)
    found._scheduler.chunked_req = req
    found._scheduler.last_batch = None
    assert found.all() == found.recorded() == [req]


def test_a_replay_waits_for_those_of_its_own_batch():
    req = request()
    found = holders("last", request())
    assert found.others(SimpleNamespace(reqs=[req, request()]), req)
