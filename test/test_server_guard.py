"""A hook that raises for one request ends that request; its neighbours answer as alone."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from checks import assert_clean, assert_same

from margingate.harness.client import Client

# Only in the test's server: each guarded function first raises for a request named after it.
INJECT = """
import importlib.util, sys
NAME = "margingate.runtime.request.guard"

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def load(module):
            run(module)
            inject(module)
        spec.loader.exec_module = load
        return spec

def inject(guard):
    wrap = guard.wrap
    def wrapped(target, function, *args, **kwargs):
        mark = "fail-" + function.__name__ + "-"
        def raising(*given, **named):
            for each in (*given, *named.values()):
                for req in [each, *(getattr(each, "reqs", None) or ())]:
                    if str(getattr(req, "rid", "")).startswith(mark):
                        raise RuntimeError("injected")
            return function(*given, **named)
        guarded = wrap(target, raising, *args, **kwargs)
        guarded.__wrapped__ = function
        return guarded
    guard.wrap = wrapped

sys.meta_path.insert(0, Finder())
"""
HOOKS = ("request_init", "add_request", "add_one_req", "update_finish_state", "accept")


@pytest.fixture(scope="module")
def client(start, tmp_path_factory) -> Client:
    folder = tmp_path_factory.mktemp("inject")
    (folder / "sitecustomize.py").write_text(INJECT)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    options = ("--gate-fast-path", "stock", "--gate-policy", "always")
    return Client(start(*options, env={"PYTHONPATH": path}).base_url, 12)


def ask(client: Client, rid: str) -> tuple[int, Any]:
    body = {"text": "The capital of France is", "rid": rid}
    body["sampling_params"] = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        client.base_url + "/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_hook_that_raises_ends_its_request_alone(client, prompts):
    alone = client.alone(prompts[:3])
    for name in HOOKS:
        with ThreadPoolExecutor(1) as pool:
            marked = pool.submit(ask, client, f"fail-{name}-1")
            beside = client.together(prompts[:3])
            status, answer = marked.result()
        assert "margingate failed on this request" in json.dumps(answer), (name, status, answer)
        assert_same(alone, beside)
        assert_clean(client)
    state = client.gate_state()
    assert len(state["hooks_failed"]) == len(HOOKS)
