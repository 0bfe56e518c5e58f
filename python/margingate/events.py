"""The gate's events: their records, how they are written down, and how to receive them.

A server with `--gate-events-endpoint` publishes one message per scheduler step (docs/events.md).
This module needs neither torch nor SGLang.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec
import zmq

from margingate.option_checks import check_endpoint

SCHEMA = 1  # rises when a field changes its meaning or goes; new fields and types do not count


class EventError(ValueError):
    """One sentence: what arrived that is not understood, or why nothing can arrive."""


class Record(msgspec.Struct, frozen=True, tag_field="type"):
    """What every record is: a map whose "type" says which one."""


class Step(Record, frozen=True, tag="step"):
    """A forward was committed."""

    step: int  # forwards so far
    mode: str  # "prefill" or "decode"
    batch: int  # requests in it
    gated: int  # gated ones among them
    canonical: bool  # its rows needed no verification
    open: int  # gated requests that have a row and have not ended
    held: int  # those of them that stopped and wait for their last rows


class Flag(Record, frozen=True, tag="flag"):
    """A row is to be verified."""

    rid: str  # the request's id
    row: int  # from 1
    margin: float  # logits
    reason: str


class Verdict(Record, frozen=True, tag="verdict"):
    """A verify pass computed a row: "match", "flip", "missed" or "stale"."""

    rid: str
    row: int  # from 1
    outcome: str
    token: int | None  # what was emitted; None where it was rolled back meanwhile
    verified: int  # what the verifier chose
    margin: float | None  # of the row when it was emitted, logits
    repaired: bool  # its K/V column was rewritten
    rolled_back: int  # tokens that a flip dropped, this one included


class Pass(Record, frozen=True, tag="pass"):
    """A verify pass was run, judged and settled."""

    rows: int
    requests: int
    seconds: float
    due: str  # why it was run now


class Settled(Record, frozen=True, tag="settled"):
    """Everything that the request emitted is settled again."""

    rid: str
    seconds: float  # since the first token that was not


class End(Record, frozen=True, tag="end"):
    """The last output of a request is on its way."""

    rid: str
    finish: str | None  # "stop", "length" or "abort"; None for a request that vanished
    tokens: int  # emitted
    counts: dict[str, int | float]  # as in meta_info["gate"]


class Totals(Record, frozen=True, tag="totals"):
    """The scheduler's sums since its start; about once a second, also while nothing runs."""

    steps: int  # forwards
    decodes: int  # decode forwards among them
    canonical: int  # decode forwards that needed no verification
    open: int
    held: int
    counts: dict[str, int | float]  # as in /server_info


AnyRecord = Step | Flag | Verdict | Pass | Settled | End | Totals


class _Head(msgspec.Struct, frozen=True):
    schema: int


class Message(msgspec.Struct, frozen=True):
    """The records of one scheduler step, in the order in which things happened."""

    schema: int
    stream: str  # one life of one scheduler; sequence numbers count within it
    seq: int  # from 1, one up with each message
    time: float  # seconds since the epoch
    records: list[AnyRecord]


@dataclass(frozen=True, slots=True)
class Received:
    """A message, and how many before it never arrived."""

    message: Message
    lost: int


_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(_Head)
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as msgpack: maps with the fields' names as keys."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Read what `encode` wrote. Raises EventError for anything else, or another schema."""
    try:
        schema = _head.decode(data).schema
        if schema == SCHEMA:
            return _decoder.decode(data)
    except msgspec.DecodeError as err:
        raise EventError(
            f"a message is no event of the gate ({err}): name a --gate-events-endpoint."
        ) from None
    raise EventError(
        f"the events have schema {schema}, this version of margingate reads {SCHEMA}: use the "
        "version that the server has."
    )


class Gaps:
    """Counts the messages that never arrived, by their sequence numbers."""

    def __init__(self) -> None:
        self._stream = ""
        self._next = 0

    def before(self, message: Message) -> int:
        """How many are missing before this one; all earlier ones of a stream that began anew."""
        known, restarted = bool(self._stream), message.stream != self._stream
        lost = message.seq - (1 if restarted else self._next) if known else 0
        self._stream, self._next = message.stream, message.seq + 1
        return lost


class Subscriber:
    """Receives the events of one endpoint; a context manager. There need be no server yet.

    Raises:
        GateError: an endpoint of no known form.
        EventError: an endpoint that cannot be connected to, or whose host is unknown.
    """

    def __init__(self, endpoint: str) -> None:
        check_endpoint("endpoint", endpoint)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._gaps = Gaps()
        try:
            self._socket.connect(endpoint)
            _look_up(endpoint)
        except (zmq.ZMQError, OSError, UnicodeError) as err:
            self.close()
            why = getattr(err, "strerror", None) or "not a name of a host"
            raise EventError(
                f"{endpoint} cannot be connected to ({why}): name the server's host."
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be received any more; idempotent."""
        self._socket.close(0)
        self._context.term()

    def receive(self, timeout_s: float | None = None) -> Received | None:
        """The next message, waited for as long as need be, or None after `timeout_s`.

        Raises:
            EventError: what arrived is no message of this schema.
        """
        if not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        message = decode(self._socket.recv())
        return Received(message, self._gaps.before(message))


def _look_up(endpoint: str) -> None:
    """Raises OSError or UnicodeError for an unknown host, which ZeroMQ would try for ever."""
    if endpoint.startswith("tcp://"):
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        socket.getaddrinfo(host.strip("[]"), None)


def subscribe(endpoint: str) -> Iterator[Received]:
    """Every message from `endpoint`, as it comes, for ever; raises what `Subscriber` raises."""
    with Subscriber(endpoint) as subscriber:
        while True:
            received = subscriber.receive()
            if received is not None:
                yield received
