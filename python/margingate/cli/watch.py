"""`margingate watch`: what the gate of a running server does, as it happens.

Subscribes to the endpoint of a server's --gate-events-endpoint. Shows a live view, or with --json
prints each record as a line. The server never waits for it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from margingate.errors import CliError

if TYPE_CHECKING:
    from margingate.events import Received, Subscriber

TICK_S = 0.25  # between two pictures
MOST_PATH = 107  # bytes of a Unix socket's path on Linux
QUIET_S = 3.0  # without a message, although a server sends its sums every second


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate watch`."""
    parser = subparsers.add_parser(
        "watch",
        help="show what the gate of a running server does",
        description="Show the events of a server that was started with --gate-events-endpoint. "
        "Ends with Ctrl-C.",
    )
    parser.add_argument(
        "--endpoint", required=True, metavar="tcp://HOST:PORT", help="the server's, or ipc://PATH"
    )
    parser.add_argument("--json", action="store_true", help="print each record as a JSON line")
    parser.add_argument(
        "--for",
        dest="seconds",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="end after this time; status 2 if nothing arrived",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Show or print what arrives; raises CliError if nothing did until the given time."""
    from margingate.errors import GateError
    from margingate.events import EventError, Subscriber
    from margingate.option_checks import check_endpoint

    if not args.seconds > 0:
        raise CliError(f"--for is {args.seconds:g}: give a number of seconds above 0.")
    until = time.monotonic() + args.seconds
    try:
        check_endpoint("--endpoint", args.endpoint)
        _refuse_endpoint(args.endpoint)
        with Subscriber(args.endpoint) as subscriber:
            show = _print_lines if args.json else _show
            heard = show(subscriber, args.endpoint, until)
    except (GateError, EventError) as err:
        raise CliError(str(err)) from err
    except BrokenPipeError:  # whoever read the lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if not heard:
        raise CliError(
            f"no events came from {args.endpoint} in {args.seconds:g} s: start a server with "
            f"--deterministic-gate --gate-events-endpoint {args.endpoint}."
        )
    return 0


def _refuse_endpoint(endpoint: str) -> None:
    """Raises CliError for what a server may bind or ZeroMQ may parse, but no one can connect to."""
    if endpoint.startswith("tcp://*:"):
        raise CliError(
            f"--endpoint is {endpoint!r}, where * is for the server's side: give the host, such as "
            f"{endpoint.replace('*', '127.0.0.1')}."
        )
    path = os.fsencode(endpoint.removeprefix("ipc://"))
    if endpoint.startswith("ipc://") and len(path) > MOST_PATH:
        raise CliError(
            f"--endpoint has a path of {len(path)} bytes, and the system takes {MOST_PATH} at "
            f"most: start the server with a shorter ipc://PATH than {endpoint}."
        )


def _arrivals(subscriber: Subscriber, until: float) -> Iterator[Received | None]:
    """What arrives until then (time.monotonic), and None after each tick without a message."""
    while (left := until - time.monotonic()) > 0:
        yield subscriber.receive(min(left, TICK_S))


def _print_lines(subscriber: Subscriber, endpoint: str, until: float) -> bool:
    from margingate.cli.watch_view import lines

    heard, ask_at = False, time.monotonic() + QUIET_S
    for received in _arrivals(subscriber, until):
        if received is not None:
            heard = True
            print("\n".join(lines(received)), flush=True)
        elif not heard and time.monotonic() > ask_at:
            print(f"margingate: waiting for events from {endpoint}", file=sys.stderr, flush=True)
            ask_at = math.inf
    return heard


def _show(subscriber: Subscriber, endpoint: str, until: float) -> bool:
    from rich.console import Console
    from rich.live import Live

    from margingate.cli.watch_view import View

    view, shown_at, console = View(endpoint, QUIET_S), 0.0, Console()
    try:
        with Live(view.render(time.monotonic()), console=console, auto_refresh=False) as live:
            for received in _arrivals(subscriber, until):
                at = time.monotonic()
                if received is not None:
                    view.feed(received, at)
                if at - shown_at >= TICK_S:
                    live.update(view.render(at), refresh=True)
                    shown_at = at
            live.update(view.render(time.monotonic()), refresh=True)
    finally:
        if not console.is_terminal:
            console.line()  # Live ends the last one on terminals only
    return view.messages > 0
