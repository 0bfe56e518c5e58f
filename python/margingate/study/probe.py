"""What a gated server found of a model's operators, asked of one that is started or runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from margingate.errors import CliError
from margingate.harness.defaults import MODEL
from margingate.harness.inputs import api_key, in_a_line, refuse_key, server_root
from margingate.study.row_counts import classes_of_steps


def measure(model_path: str | None, server_args: Sequence[str], out: Path) -> dict[str, Any]:
    """Start a gated server that probes anew, with its log in `out`, and ask it.

    Raises CliError.
    """
    from margingate.harness.embedded_model import ensure_model
    from margingate.harness.servers import ServerError, launch

    model = model_path or str(ensure_model(MODEL))
    log = out / "server.log"
    server = launch(model, log, "--gate-probe", "fresh", *server_args, gate=True)
    print("margingate: starting a server of", model, file=sys.stderr, flush=True)
    try:
        with server:
            return ask(server.base_url)
    except ServerError as err:
        raise CliError(str(err)) from err
    except CliError as err:
        raise CliError(f"{str(err).removesuffix('.')}; its log is {log}.") from err


def ask(url: str, key: str = "none") -> dict[str, Any]:
    """What the gated server at `url` found; raises CliError for any other server."""
    import requests

    url = server_root(url)
    try:
        headers = {"Authorization": f"Bearer {api_key(key)}"}
        reply = requests.get(f"{url}/server_info", headers=headers, timeout=60)
        refuse_key(url, reply.status_code)
        info = reply.json()
        state = info["internal_states"][0]["margingate"]
    except requests.ConnectionError as err:
        raise CliError(f"no server answers at {url}: start it, or correct --base-url.") from err
    except (requests.RequestException, ValueError) as err:
        raise CliError(
            f"{url} does not answer as an SGLang server ({in_a_line(str(err))}): correct "
            "--base-url."
        ) from err
    except (KeyError, IndexError, TypeError):
        raise CliError(
            f"the server at {url} has no gate: start it with --deterministic-gate."
        ) from None
    try:
        found = {"schema": 1, "model": info["model_path"], "version": info["version"]}
        probe = {"steps": None, **state["probe"]}
        probed = bool(probe["operators"])
    except (KeyError, TypeError):
        raise CliError(
            f"the gate at {url} tells of no probe: use a server of this version of margingate."
        ) from None
    if not probed:
        raise CliError(
            f"the server at {url} did not probe: start it with --gate-fast-path invariant."
        )
    return {**found, **probe}


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The operators, and where it was measured the whole step, with class 0 of a verify pass."""
    if report["steps"] is None:
        return list(report["operators"])
    whole = {
        "kind": "model",
        "name": "decode step, as served",
        "shape": [],
        "modules": 1,
        "classes": classes_of_steps(report["steps"]["measured"]),
        "plan": None,
    }
    return [*report["operators"], whole]
