"""A ZeroMQ socket that publishes records: bounded, lossy, and never waited for."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import zmq

from margingate.config import GateConfig, GateError
from margingate.events import SCHEMA, AnyRecord, Message, encode

logger = logging.getLogger(__name__)

OPTION = "--gate-events-endpoint"
QUEUE = 500  # messages kept for a subscriber that does not read; later ones are lost to it
MOST_RECORDS = 512  # in one message; a step that has more sends several
_MOST_NEWS = 16  # subscriptions looked at in one turn
_AGAIN_S = 0.1  # between two tries to bind: libzmq closes sockets later, and has 1,023 of them
MOST_TOPICS = 64  # of all subscribers; messages have one prefix, so that one topic is enough


class Publisher:
    """Owns the socket. One thread; nothing here blocks, and nothing but __init__ raises.

    Raises:
        GateError: the endpoint cannot be bound.
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._endpoint = endpoint
        self._socket = _bound(self._context, endpoint)
        self._stream = uuid.uuid4().hex[:12]
        self._seq = 0
        self._topics: set[bytes] = set()
        self._again = 0.0  # when to try to bind
        self._records: list[AnyRecord] = []
        self._unheard = False  # something would have been sent, had there been a subscriber
        self.listening = False

    def tell(self, make: Callable[[], AnyRecord]) -> None:
        """Add a record to the next message; not even made where nobody listens."""
        if not self.listening:
            self._unheard = True
            return
        self._records.append(make())
        if len(self._records) >= MOST_RECORDS:
            self.send()

    def send(self) -> None:
        """Send what was told since the last call, if anything was, as one message.

        Without a subscriber a sequence number passes, so that one who comes back sees the gap.
        """
        if not self._records and not self._unheard:
            return
        self._seq += 1
        records, self._records, self._unheard = self._records, [], False
        if records and self.listening:
            message = Message(SCHEMA, self._stream, self._seq, time.time(), records)
            try:
                self._socket.send(encode(message), zmq.NOBLOCK)
            except (zmq.ZMQError, ValueError, TypeError, OverflowError) as error:
                # The second kind: a record that cannot be encoded, as an id with a lone surrogate.
                logger.debug("margingate: an events message is lost: %s", error)

    def look(self) -> bool:
        """See who came and who left; returns whether a first subscriber came."""
        listened = self.listening
        if self._socket.closed and not self._bind_again():
            return False
        for _ in range(_MOST_NEWS):
            try:
                news = self._socket.recv(zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            if news[:1] == b"\x01":
                self._topics.add(news[1:])
            elif news[:1] == b"\x00":
                self._topics.discard(news[1:])
        if len(self._topics) > MOST_TOPICS:
            self._start_anew()
        self.listening = bool(self._topics)
        return self.listening and not listened

    def _start_anew(self) -> None:
        """Drop all connections: libzmq keeps every topic of a peer and cannot turn one away.

        Subscribers connect again by themselves and see a gap in the sequence numbers.
        """
        logger.warning(
            "margingate: more than %d topics are subscribed to at %s, so all subscribers are "
            "disconnected: subscribe to the empty topic.",
            MOST_TOPICS,
            self._endpoint,
        )
        self._topics.clear()
        self._socket.close(0)
        self._bind_again()

    def _bind_again(self) -> bool:
        """Whether it could be bound; the address may be in use for a moment after a close."""
        if monotonic() < self._again:
            return False
        try:
            self._socket = _bound(self._context, self._endpoint)
        except GateError:
            self._again = monotonic() + _AGAIN_S
            return False
        return True

    def close(self) -> None:
        """Unbind; what was not sent is lost."""
        self._socket.close(0)
        self._context.term()


def endpoint_of(endpoint: str, dp_rank: int) -> str:
    """Where this data-parallel rank publishes: as given for rank 0, the ports behind for others.

    An ipc path gets "-RANK" at its end. Raises GateError where there is no such port.
    """
    if dp_rank == 0:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}-{dp_rank}"
    host, port = endpoint.rsplit(":", 1)
    if int(port) + dp_rank >= 1 << 16:
        raise GateError(
            f"{OPTION} is {endpoint!r}, but data-parallel rank {dp_rank} needs the port "
            f"{int(port) + dp_rank}: give a lower one."
        )
    return f"{host}:{int(port) + dp_rank}"


def refuse_endpoint(args: Any, config: GateConfig) -> None:
    """Before any scheduler starts: can each rank's endpoint be bound? Raises GateError."""
    if config.events_endpoint is None or args.node_rank != 0:
        return
    for rank in range(args.dp_size):
        check_bindable(endpoint_of(config.events_endpoint, rank))


def check_bindable(endpoint: str) -> None:
    """Bind and unbind. Raises GateError with one sentence where that fails."""
    context = zmq.Context()
    try:
        _bound(context, endpoint).close(0)
    finally:
        context.term()


def _bound(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    publisher = None
    try:
        publisher = context.socket(zmq.XPUB)  # a PUB that hears of subscriptions
        publisher.setsockopt(zmq.LINGER, 0)
        publisher.setsockopt(zmq.SNDHWM, QUEUE)
        publisher.setsockopt(zmq.MAXMSGSIZE, 1024)  # of what comes in: subscriptions
        publisher.setsockopt(zmq.IPV6, int("[" in endpoint))
        _check_path(endpoint)
        publisher.bind(endpoint)
    except (zmq.ZMQError, OSError) as err:
        if publisher is not None:
            publisher.close(0)
        raise GateError(
            f"{OPTION} {endpoint} cannot be bound ({err.strerror}): give an address of this "
            "machine that is free, or drop the option."
        ) from None
    return publisher


def _check_path(endpoint: str) -> None:
    """libzmq replaces whatever lies at an ipc path: raises OSError where that is in use."""
    path = Path(endpoint.removeprefix("ipc://"))
    if path == Path(endpoint) or not path.exists():
        return
    if not path.is_socket():
        raise FileExistsError(17, "a file is there")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise OSError(98, "Address already in use")
