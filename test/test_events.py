"""Events: their records, the socket that never waits, and the command that shows them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from sentences import one_sentence

from margingate.cli import watch_view
from margingate.cli.main import main
from margingate.config import GateConfig, GateError
from margingate.core.ledger import Outcome
from margingate.events import (
    SCHEMA,
    End,
    EventError,
    Flag,
    Gaps,
    Message,
    Pass,
    Received,
    Settled,
    Step,
    Subscriber,
    Totals,
    Verdict,
    decode,
    encode,
    subscribe,
)
from margingate.harness.servers import free_port
from margingate.option_checks import check_endpoint
from margingate.runtime.observe import event_socket
from margingate.runtime.observe.event_socket import MOST_RECORDS, MOST_TOPICS, QUEUE, Publisher

FLIP = Verdict("r1", 7, "flip", 11, 12, 0.125, True, 3)
COUNTS = {"steps": 40, "flagged": 4, "passes": 3, "flips": 1, "missed": 0, "rolled_back": 3}
RECORDS = (
    Step(5, "decode", 8, 7, False, 7, 1),
    Flag("r1", 7, 0.125, "below"),
    FLIP,
    Verdict("r1", 8, "stale", None, 3, None, False, 0),
    Pass(12, 2, 0.03, "full"),
    Settled("r1", 0.04),
    End("r1", "stop", 24, {"steps": 24, "drain_s": 0.5}),
    Totals(5, 4, 3, 7, 1, COUNTS),
)


PATIENCE_S = 60  # for what comes at once, were this process not stopped or starved


@pytest.fixture
def endpoint(ports) -> str:
    """Of a port that no client is given before it is bound, as may be one that the system chose."""
    return f"tcp://127.0.0.1:{free_port(ports)}"


@pytest.fixture
def out(endpoint) -> Iterator[Publisher]:
    out = Publisher(endpoint)
    yield out
    out.close()


def message(seq: int, *records, stream: str = "a") -> Message:
    return Message(SCHEMA, stream, seq, 1.5, list(records))


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


# Records


def test_what_is_encoded_is_decoded():
    sent = message(3, *RECORDS)
    assert decode(encode(sent)) == sent


def test_records_are_maps_that_any_msgpack_reader_understands():
    plain = msgspec.msgpack.decode(encode(message(3, FLIP)))
    assert plain["schema"] == SCHEMA and plain["seq"] == 3
    [record] = plain["records"]
    assert (record["type"], record["rid"], record["row"]) == ("verdict", "r1", 7)


def test_a_reader_passes_over_fields_it_does_not_know():
    plain = msgspec.msgpack.decode(encode(message(3, FLIP)))
    plain["records"][0]["new"] = 1
    assert decode(msgspec.msgpack.encode(plain)) == message(3, FLIP)


@pytest.mark.parametrize("data", [b"", b"\xff", b"hello", msgspec.msgpack.encode({"seq": 1})])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(EventError) as caught:
        decode(data)
    assert "no event of the gate" in str(caught.value)


def test_another_schema_is_refused_whatever_else_it_says():
    with pytest.raises(EventError) as caught:
        decode(msgspec.msgpack.encode({"schema": SCHEMA + 1, "seq": "?"}))
    assert f"schema {SCHEMA + 1}" in one_sentence(caught.value)


def test_gaps_are_counted():
    gaps = Gaps()
    assert [gaps.before(message(seq)) for seq in (9, 10, 13, 14)] == [0, 0, 2, 0]
    assert gaps.before(message(3, stream="b")) == 2  # started anew, and two went by
    assert gaps.before(message(4, stream="b")) == 0


# The option


@pytest.mark.parametrize(
    "value", ["tcp://127.0.0.1:5557", "tcp://*:1", "tcp://[::1]:65535", "ipc:///tmp/x", "ipc://@x"]
)
def test_endpoints(value):
    assert GateConfig(events_endpoint=value).events_endpoint == value


@pytest.mark.parametrize(
    "value",
    [
        *("", "5557", "127.0.0.1:5557", "tcp://127.0.0.1", "tcp://:5557", "tcp://h:0"),
        *("tcp://h:65536", "tcp://h:5557/x", "tcp://h:*", "udp://h:1", "ipc://", "ipc://a b"),
        *("tcp://h:1\n", 5557, True),
    ],
)
def test_what_is_no_endpoint_is_refused(value):
    with pytest.raises(GateError) as caught:
        check_endpoint("--gate-events-endpoint", value)
    text = one_sentence(caught.value)
    assert text.startswith(f"--gate-events-endpoint is {value!r}: give tcp://HOST:PORT")


def test_each_data_parallel_rank_has_an_endpoint():
    assert event_socket.endpoint_of("tcp://h:10", 0) == "tcp://h:10"
    assert event_socket.endpoint_of("tcp://h:10", 3) == "tcp://h:13"
    assert event_socket.endpoint_of("ipc:///tmp/x", 3) == "ipc:///tmp/x-3"
    with pytest.raises(GateError, match="give a lower one"):
        event_socket.endpoint_of("tcp://h:65535", 1)


def test_an_endpoint_in_use_is_refused_before_any_scheduler_starts(endpoint, out):
    args = SimpleNamespace(node_rank=0, dp_size=1)
    with pytest.raises(GateError) as caught:
        event_socket.refuse_endpoint(args, GateConfig(events_endpoint=endpoint))
    text = one_sentence(caught.value)
    assert text.startswith(f"--gate-events-endpoint {endpoint} cannot be bound (Address")
    out.close()
    event_socket.refuse_endpoint(args, GateConfig(events_endpoint=endpoint))
    args.node_rank = 1  # rank 0 of tensor parallelism is elsewhere
    event_socket.refuse_endpoint(args, GateConfig(events_endpoint="tcp://203.0.113.1:1"))


def test_an_ipc_endpoint_is_not_taken_from_another_server(tmp_path):
    endpoint = f"ipc://{tmp_path}/events"
    first = Publisher(endpoint)
    with pytest.raises(GateError, match="cannot be bound"):
        Publisher(endpoint)
    first.close()
    Publisher(endpoint).close()
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(GateError, match="a file is there"):
        Publisher(f"ipc://{tmp_path}/notes")
    assert (tmp_path / "notes").read_text() == "kept"


# The publisher


def test_a_subscriber_gets_one_message_per_step_in_order(endpoint, out):
    with Subscriber(endpoint) as subscriber:
        wait_for(out.look, "nobody was heard of")
        for record in RECORDS:
            out.tell(lambda record=record: record)
        out.send()
        out.tell(lambda: FLIP)
        out.send()
        out.send()  # nothing was told: nothing is sent
        first, second = subscriber.receive(PATIENCE_S), subscriber.receive(PATIENCE_S)
        assert first and second and subscriber.receive(0.05) is None
    assert first.message.records == list(RECORDS)
    assert (second.message.records, second.message.seq) == ([FLIP], first.message.seq + 1)
    assert (first.lost, second.lost) == (0, 0)
    wait_for(lambda: out.look() or not out.listening, "the subscriber seems not to leave")


def test_a_long_step_is_sent_in_pieces(endpoint, out):
    with Subscriber(endpoint) as subscriber:
        wait_for(out.look, "nobody was heard of")
        for _ in range(2 * MOST_RECORDS + 1):
            out.tell(lambda: FLIP)
        out.send()
        found = [subscriber.receive(PATIENCE_S) for _ in range(3)]
    assert [len(r.message.records) for r in found] == [MOST_RECORDS, MOST_RECORDS, 1]


def publish(out: Publisher, steps: int, make: Callable[[], Verdict]) -> float:
    """Seconds for so many steps of 20 records."""
    start = time.monotonic()
    for _ in range(steps):
        for _ in range(20):
            out.tell(make)
        out.look()
        out.send()
    return time.monotonic() - start


def test_without_a_subscriber_no_record_is_made(out):
    def fail() -> Verdict:
        raise AssertionError("made for nobody")

    assert publish(out, 10_000, fail) < 10
    assert out._records == []


def test_one_who_comes_back_sees_that_it_missed_something(endpoint, out):
    with Subscriber(endpoint) as subscriber:
        wait_for(out.look, "nobody was heard of")
        publish(out, 1, lambda: FLIP)
        before = subscriber.receive(PATIENCE_S).message.seq
    wait_for(lambda: out.look() or not out.listening, "the subscriber seems not to leave")
    publish(out, 5, lambda: FLIP)
    with Subscriber(endpoint) as subscriber:
        wait_for(out.look, "nobody was heard of")
        publish(out, 1, lambda: FLIP)
        assert subscriber.receive(PATIENCE_S).message.seq == before + 6


def test_a_subscriber_that_stops_reading_is_not_waited_for(endpoint, out):
    with zmq.Context() as context, context.socket(zmq.SUB) as lazy:
        lazy.setsockopt(zmq.RCVHWM, 1)
        lazy.setsockopt(zmq.RCVBUF, 1 << 16)
        lazy.setsockopt(zmq.SUBSCRIBE, b"")
        lazy.connect(endpoint)
        wait_for(out.look, "nobody was heard of")
        publish(out, QUEUE, lambda: FLIP)  # the queues are full now
        before = psutil.Process().memory_info().rss
        assert publish(out, 10_000, lambda: FLIP) < 10  # 200,000 records, about 25 MB
        assert psutil.Process().memory_info().rss - before < 10 << 20
        gaps, lost = Gaps(), 0
        while not lost:  # it is served again, as there is room
            publish(out, 1, lambda: FLIP)
            assert lazy.poll(PATIENCE_S * 1000), "it is not served again"
            lost += gaps.before(decode(lazy.recv()))


def test_a_subscriber_of_too_many_topics_is_disconnected_and_others_come_back(endpoint, out):
    with zmq.Context() as context, context.socket(zmq.SUB) as greedy:
        greedy.setsockopt(zmq.LINGER, 0)
        greedy.connect(endpoint)
        for number in range(20 * MOST_TOPICS):
            greedy.subscribe(str(number).encode())
        seen: list[int] = []

        def look() -> int:
            out.look()
            seen.append(len(out._topics))
            return seen[-1]

        wait_for(look, "none of its topics came")
        end = time.monotonic() + 2
        while time.monotonic() < end:
            look()
        assert 0 < max(seen) <= MOST_TOPICS
    wait_for(lambda: out.look() or not out.listening, "the greedy one is gone")


def test_an_address_that_is_still_in_use_is_asked_for_ten_times_a_second(out, monkeypatch):
    """A socket a turn was more than libzmq closes on a busy machine, until it had none left."""
    asked, times = [], iter(range(10_000))
    monkeypatch.setattr(event_socket, "monotonic", lambda: next(times) / 1000)

    def in_use(*_: object) -> None:
        asked.append(1)
        raise GateError("in use")

    real = event_socket._bound
    monkeypatch.setattr(event_socket, "_bound", in_use)
    out._socket.close(0)
    assert not any(out.look() for _ in range(1000)) and 9 <= len(asked) <= 11
    monkeypatch.setattr(event_socket, "_bound", real)
    wait_for(lambda: out.look() or not out._socket.closed, "it is not bound again")


def test_a_socket_that_cannot_be_had_is_a_sentence(endpoint):
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 1)
    with context, context.socket(zmq.SUB), pytest.raises(GateError) as caught:
        event_socket._bound(context, endpoint)
    assert "cannot be bound (Too many open files)" in one_sentence(caught.value)


def test_a_record_that_cannot_be_encoded_is_lost_and_raises_nothing(out):
    out.listening = True
    out.tell(lambda: Verdict("\ud800", 1, "match", 2, 2, 0.5, False, 0))
    out.send()


def test_two_subscribers_are_independent(endpoint, out):
    with zmq.Context() as context, context.socket(zmq.SUB) as lazy:
        lazy.setsockopt(zmq.RCVHWM, 1)
        lazy.setsockopt(zmq.SUBSCRIBE, b"")
        lazy.connect(endpoint)
        with Subscriber(endpoint) as subscriber:
            wait_for(out.look, "nobody was heard of")

            def hears() -> object:  # the second to subscribe is not told of
                publish(out, 1, lambda: FLIP)
                return subscriber.receive(0.2)

            wait_for(hears, "the second subscriber hears nothing")
            for _ in range(2000):
                publish(out, 1, lambda: FLIP)
                assert subscriber.receive(PATIENCE_S).lost == 0


def test_subscribe_iterates(endpoint, out):
    arrivals = subscribe(endpoint)
    with talking(out):
        first, second = next(arrivals), next(arrivals)
    assert second.message.seq == first.message.seq + 1
    arrivals.close()


def test_an_endpoint_without_a_host_cannot_be_subscribed_to():
    with pytest.raises(EventError) as caught:
        Subscriber("tcp://*:5557")
    assert "name the server's host" in one_sentence(caught.value)
    with pytest.raises(GateError):
        Subscriber("5557")


# The observer


def test_the_observer_tells_what_the_gate_does(endpoint, out):
    from margingate.runtime.observe.event_records import GateEvents
    from margingate.runtime.request.open_requests import OpenRequests
    from margingate.runtime.request.record import Counts

    counts = Counts(steps=9, flagged=1)
    gate = SimpleNamespace(margins=[9.0, 0.1, 5.0], flags=bytearray(3), counts=counts)
    finish = SimpleNamespace(to_json=lambda: {"type": "length"})
    req = SimpleNamespace(rid="r", gate=gate, output_ids=[4, 6, 7], finished_reason=finish)
    batch = SimpleNamespace(reqs=[req], forward_mode=SimpleNamespace(is_decode=lambda: True))
    requests = OpenRequests(GateConfig(rows=8))
    req.gate.key, requests.step, requests.totals = "1:r", 3, Counts(passes=2)
    requests.open(req)
    events = GateEvents(requests, out)
    with Subscriber(endpoint) as subscriber:
        wait_for(lambda: events.turned() or out.listening, "nobody was heard of")
        [totals] = subscriber.receive(PATIENCE_S).message.records
        events.flagged(req, 2, 0.1, "below")
        events.stepped(batch, 1, False)
        events.judged(req, 2, Outcome.FLIP, 6, 5)
        events.judged(req, 3, Outcome.STALE, -1, 8)
        events.passed(2, 1, 0.5, "now")
        events.settled(req, 0.25)
        events.ended(req)
        events.turned()
        found = subscriber.receive(PATIENCE_S).message.records
    assert (totals.counts["steps"], totals.counts["passes"], totals.open) == (9, 2, 1)
    assert found[:4] == [
        Flag("r", 2, 0.1, "below"),
        Step(3, "decode", 1, 1, False, 1, 0),
        Verdict("r", 2, "flip", 6, 5, 0.1, True, 2),
        Verdict("r", 3, "stale", None, 8, None, False, 0),
    ]
    assert found[4:6] == [Pass(2, 1, 0.5, "now"), Settled("r", 0.25)]
    assert (found[6].finish, found[6].tokens, found[6].counts["steps"]) == ("length", 3, 9)


# The command


@contextmanager
def talking(out: Publisher) -> Iterator[None]:
    """Meanwhile all RECORDS are published again and again, as steps of their own."""
    done = threading.Event()

    def talk() -> None:
        while not done.wait(0.02):
            out.look()
            for record in RECORDS:
                out.tell(lambda record=record: record)
            out.send()

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def watched(out: Publisher, capsys: Any, enough: Callable[[str], bool], *options: str) -> str:
    """What `margingate watch` prints, for longer where this process gets no time to say enough."""
    with talking(out):
        for seconds in ("1.5", "5", "30"):
            status = main(["watch", *options, "--for", seconds])
            if enough(said := capsys.readouterr().out):
                break
    assert status == 0
    return str(said)


def test_watch_json_prints_a_line_per_record(endpoint, out, capsys):
    def lines(said: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in said.splitlines()]

    def enough(said: str) -> bool:
        kinds = {"step", "flag", "verdict", "end", "totals"}
        return len(lines(said)) >= len(RECORDS) and {line["type"] for line in lines(said)} >= kinds

    said = watched(out, capsys, enough, "--endpoint", endpoint, "--json")
    assert enough(said), said
    printed = lines(said)
    flip = next(line for line in printed if line.get("outcome") == "flip")
    assert (flip["rid"], flip["row"], flip["token"], flip["verified"]) == ("r1", 7, 11, 12)
    assert all({"seq", "time", "stream"} <= line.keys() for line in printed)


def test_a_line_tells_of_lost_messages_and_is_json_whatever_the_margin():
    odd = Flag("r", 1, float("nan"), "not_finite")
    first, second = map(json.loads, watch_view.lines(Received(message(9, odd), lost=4)))
    assert (first["type"], first["messages"]) == ("lost", 4)
    assert second["margin"] is None


def test_watch_shows_figures_and_the_last_flips(endpoint, out, capsys):
    texts = ("trigger rate", "10.0% (4 of 40)", "75.0% (3 of 4)", "r1", "0.1250", "40 ms")

    def enough(said: str) -> bool:
        return all(text in said for text in texts)

    shown = watched(out, capsys, enough, "--endpoint", endpoint)
    assert enough(shown), shown


def test_the_view_says_that_nothing_comes():
    from rich.console import Console

    view, console = watch_view.View("tcp://h:1", quiet_s=3), Console(width=80)

    def shown(at: float) -> str:
        with console.capture() as capture:
            console.print(view.render(at))
        return capture.get()

    assert "waiting for events from tcp://h:1" in shown(0)
    view.feed(Received(message(1, *RECORDS), lost=2), at=1)
    assert "waiting for events" not in shown(2) and "2 of 3" in shown(2)
    assert "waiting for events from tcp://h:1: none for 9 s" in shown(10)


def test_rates_are_taken_over_the_last_seconds():
    view = watch_view.View("tcp://h:1", quiet_s=3)
    for second in range(20):
        sums = Totals(second, 0, 0, 0, 0, {"passes": second * 4})
        record = Message(SCHEMA, "a", second + 1, float(second), [sums])
        view.feed(Received(record, 0), at=second)
    assert len(view._totals) <= 7
    assert view._rate("passes") == "4.0" and view._rate("steps") == "1.0"


@pytest.mark.parametrize("flags", [["--json"], []])
def test_watch_says_when_nothing_came(endpoint, capsys, flags):
    assert main(["watch", "--endpoint", endpoint, "--for", "0.4", *flags]) == 2
    out, said = capsys.readouterr()
    assert f"no events came from {endpoint} in 0.4 s" in said
    assert out == ("" if flags else f"waiting for events from {endpoint}\n")


def test_watch_refuses_what_it_cannot_subscribe_to(capsys):
    for wrong in ("5557", "tcp://*:5557"):
        assert main(["watch", "--endpoint", wrong]) == 2
        assert wrong in one_sentence(said := capsys.readouterr().err.strip())
    assert "* is for the server's side: give the host, such as tcp://127.0.0.1:5557." in said
    assert main(["watch", "--endpoint", f"ipc:///{'a' * 107}"]) == 2
    said = one_sentence(capsys.readouterr().err.strip())
    assert "--endpoint has a path of 108 bytes, and the system takes 107 at most: start" in said
    for unknown in ("tcp://no-such-host.invalid:5557", f"tcp://{'a' * 64}.invalid:5557"):
        assert main(["watch", "--endpoint", unknown]) == 2
        said = one_sentence(capsys.readouterr().err.strip())
        assert f"{unknown} cannot be connected to (" in said and "name the server's host" in said
    assert main(["watch", "--endpoint", "tcp://h:1", "--for", "0"]) == 2
    assert "--for is 0" in capsys.readouterr().err


def test_watch_refuses_another_schema(endpoint, capsys):
    with zmq.Context() as context, context.socket(zmq.PUB) as other:
        other.bind(endpoint)
        done = threading.Event()

        def talk() -> None:
            while not done.wait(0.02):
                other.send(msgspec.msgpack.encode({"schema": 99, "seq": 1}))

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            assert main(["watch", "--endpoint", endpoint, "--json", "--for", str(PATIENCE_S)]) == 2
        finally:
            done.set()
            thread.join()
    assert "the events have schema 99" in one_sentence(capsys.readouterr().err.strip())


def test_ctrl_c_ends_it_cleanly(endpoint):
    """Also where pytest runs in the background of a script, and ignores it."""
    command = ["env", "--default-signal=INT", sys.executable, "-m", "margingate.cli.main", "watch"]
    command += ["--endpoint", endpoint, "--json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stderr.readline()
            assert said.startswith("margingate: waiting for events from tcp://")
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()
