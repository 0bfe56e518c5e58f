"""Each hook raises in turn on one server: who ends, what the others get, and what is left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from checks import assert_clean
from routes import ROUTES

from margingate.harness.client import Client
from margingate.runtime.hooks.launcher_table import DETOKENIZER_HOOKS, TOKENIZER_HOOKS
from margingate.runtime.hooks.registry import Hook
from margingate.runtime.hooks.scheduler_table import RUNTIME_HOOKS, STOCK_HOOKS
from margingate.runtime.request.guard import Policy

# Only in the test's server, in each of its processes: the hook whose target is in the file raises
# once. Where it is given requests, one of them has to be the test's victim; a hook that ends the
# request that it is given, has to be given that one; and one that ends the gated requests of the
# forward that runs, or all open ones, has to find some.
INJECT = """
import importlib.util, os, sys
NAME, ARMED = "margingate.runtime.request.guard", os.environ["MARGINGATE_TEST_ARMED"]

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

def rids(given, several):
    for each in given:
        yield getattr(each, "rid", None)
        if several:
            yield from getattr(each, "rids", None) or ()
            reqs = each if isinstance(each, list) else getattr(each, "reqs", None)
            yield from (getattr(req, "rid", None) for req in reqs or ())

def armed(target, given, several):
    try:
        with open(ARMED) as file:
            if file.read() != target:
                return False
    except FileNotFoundError:
        return False
    found = [rid for rid in rids(given, several) if isinstance(rid, str)]
    if found and not any(rid.startswith("victim") for rid in found):
        return False
    if not found and any(getattr(each, "reqs", each) == [] for each in given):
        return False
    os.unlink(ARMED)
    return True

def inject(guard):
    wrap = guard.wrap
    def wrapped(target, function, policy, **kwargs):
        several = policy is not guard.Policy.REQUEST
        finds = policy in (guard.Policy.FORWARD, guard.Policy.OPEN)
        def raising(*given, **named):
            nobody = finds and not guard._gated(guard._concerned(policy, ()))
            if not nobody and armed(target, (*given, *named.values()), several):
                raise RuntimeError("injected")
            return function(*given, **named)
        guarded = wrap(target, raising, policy, **kwargs)
        guarded.__wrapped__ = function
        return guarded
    guard.wrap = wrapped

sys.meta_path.insert(0, Finder())
"""
# Not thrown from yet: whose request the first two serve is not seen from their arguments, on a slow
# machine no retraction comes while the test waits for the third, the fourth runs as weights are
# replaced, which would change the answers that are compared, and the last for gpt-oss alone.
LEFT_OUT = (
    "entrypoints.http_server.generate_contract_error",
    "managers.tokenizer_manager.TokenizerManager.generate_request",
    "managers.schedule_batch.release_req",
    "managers.scheduler.Scheduler.record_weight_version_change",
    "entrypoints.context.HarmonyContext._record_finish_reason",
)


def thrown_from(*hooks: Hook) -> list[Hook]:
    return [h for h in hooks if h.policy is not Policy.FATAL and h.target not in LEFT_OUT]


SCHEDULER = thrown_from(*RUNTIME_HOOKS, *STOCK_HOOKS)
OTHERS = thrown_from(*TOKENIZER_HOOKS, *DETOKENIZER_HOOKS)
SEVERAL = (Policy.BATCH, Policy.FORWARD, Policy.OPEN)  # they may end gated neighbours too
ENDED = "margingate failed on this request"
TOKENS = 12
Answer = tuple[int, Any]  # HTTP status, and what came


def post(url: str, path: str, **body: Any) -> Answer:
    reply = requests.post(url + path, json=body, timeout=300)
    try:
        return reply.status_code, reply.json()
    except ValueError:
        return reply.status_code, reply.text


def victim_body(tokens: int = TOKENS, **changes: Any) -> dict[str, Any]:
    """A prompt of several chunks; seed, penalty and log-probs, so that all hooks have work."""
    params = {"temperature": 0.8, "sampling_seed": 5, "frequency_penalty": 0.2, "ignore_eos": True}
    body = {"text": "One river is the Seine, another one is the Rhine. " * 10, "rid": "victim"}
    body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    return body | {"sampling_params": params | {"max_new_tokens": tokens}} | changes


class Round:
    """One hook raises on the server while neighbours are answered."""

    def __init__(self, client: Client, armed: Path, prompts: Any) -> None:
        self.client, self.url, self.armed = client, client.base_url, armed
        self._prompts = prompts
        self.alone = [self._neighbour(i) for i in range(2)]
        assert all(status == 200 for status, _ in self.alone), self.alone

    def _neighbour(self, i: int, **params: Any) -> Answer:
        params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, **params}
        ids = list(self._prompts[i].input_ids)
        return post(self.url, "/generate", input_ids=ids, sampling_params=params)

    def run(self, target: str, act: Callable[[Round], Answer]) -> tuple[Answer, list[Answer]]:
        """The victim's answer, and those of two gated neighbours and of one that is not."""
        new = self.armed.with_suffix(".new")
        new.write_text(target)
        with ThreadPoolExecutor(3) as pool:
            beside = [pool.submit(self._neighbour, i) for i in range(2)]
            beside.append(pool.submit(self._neighbour, 2, deterministic=False))
            new.rename(self.armed)
            victim = act(self)
            self._wait_until(lambda: not self.armed.exists(), f"{target} did not run")
            return victim, [each.result() for each in beside]

    def generate(self) -> Answer:
        return post(self.url, "/generate", **victim_body())

    def while_it_runs(self, act: Callable[[], Any], tokens: int, to_its_end: bool) -> Answer:
        """Does `act` until the hook has raised: before the victim's request has come, it can't.

        Args:
            tokens: of the victim's, more than are made while this process is stopped for seconds.
            to_its_end: goes on until the victim has its answer.
        """
        with ThreadPoolExecutor(1) as pool:
            victim: Future[Answer] = pool.submit(
                post, self.url, "/generate", **victim_body(tokens, return_logprob=False)
            )
            while (to_its_end or self.armed.exists()) and not victim.done():
                act()
                time.sleep(0.02)
            return victim.result()

    def pause(self) -> Answer:
        """SGLang takes all requests out of their columns, and goes on with them."""

        def act() -> None:
            assert post(self.url, "/pause_generation", mode="retract")[0] == 200
            assert post(self.url, "/continue_generation")[0] == 200

        return self.while_it_runs(act, 100, to_its_end=False)

    def abort(self) -> Answer:
        """None of the victim's many tokens is waited for: what a hook has left is aborted."""

        def act() -> None:
            post(self.url, "/abort_request", rid="victim")

        return self.while_it_runs(act, 4000, to_its_end=True)

    def wait(self) -> Answer:
        """What is armed needs no request."""
        requests.get(self.url + "/server_info", timeout=60)
        return self.generate()

    @staticmethod
    def _wait_until(holds: Callable[[], bool], sentence: str) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, sentence
            time.sleep(0.02)


ACTS = {"release_req": Round.pause, "pause_generation": Round.pause, "abort_request": Round.abort}
ACTS |= {"on_idle": Round.wait, "get_internal_state": Round.wait}


@pytest.fixture(scope="module")
def rounds(start, prompts, tmp_path_factory) -> Iterator[Round]:
    folder = tmp_path_factory.mktemp("inject")
    (folder / "sitecustomize.py").write_text(INJECT)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    options = ("--gate-policy", "always", "--gate-max-delay", "2", "--gate-overlap", "on")
    env = {"PYTHONPATH": path, "MARGINGATE_TEST_ARMED": str(folder / "armed")}
    env |= {"SGLANG_LOGPROB_CHUNK_SIZE": "16"}  # or no chunk of a prompt's log-probs is one
    client = Client(start(*options, env=env).base_url, TOKENS)
    return Round(client, folder / "armed", prompts)


def is_ended(answer: Answer) -> bool:
    return answer[0] == 500 and ENDED in json.dumps(answer[1])


def assert_beside(hook: Hook, rounds: Round, beside: list[Answer]) -> int:
    """Neighbours' answers are those alone; the number of those that a batch's failure ended."""
    *gated, ungated = beside
    assert ungated[0] == 200 and len(ungated[1]["output_ids"]) == TOKENS, (hook.target, ungated)
    ended = 0
    for alone, answer in zip(rounds.alone, gated, strict=True):
        if hook.policy in SEVERAL and is_ended(answer):
            ended += 1
            continue
        assert answer[0] == 200, (hook.target, answer)
        assert answer[1]["output_ids"] == alone[1]["output_ids"], hook.target
        assert answer[1]["text"] == alone[1]["text"], hook.target
    return ended


@pytest.mark.parametrize("hook", SCHEDULER, ids=lambda hook: hook.target.split(".", 1)[1])
def test_a_hook_of_the_scheduler_that_raises_ends_what_its_policy_says(rounds, hook):
    name = hook.target.rsplit(".", 1)[1]
    victim, beside = rounds.run(hook.target, ACTS.get(name, Round.generate))
    ended = assert_beside(hook, rounds, beside)
    if hook.policy is Policy.OBSERVE:
        assert victim[0] == 200 or name == "abort_request", victim
    elif hook.policy is Policy.REQUEST:
        assert is_ended(victim), victim
    else:
        assert ended or is_ended(victim), victim
        assert victim[0] == 200 or is_ended(victim), victim
    assert_clean(rounds.client)
    assert rounds.client.gate_state()["hooks_failed"][hook.target] == 1


ROUTE_OF = {
    "serving_chat": "/v1/chat/completions",
    "serving_base": "/v1/chat/completions",
    "serving_completions": "/v1/completions",
    "serving_responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "ollama": "/api/generate",
}


@pytest.mark.parametrize("hook", OTHERS, ids=lambda hook: hook.target.split(".", 1)[1])
def test_a_hook_of_another_process_that_raises_ends_one_answer_at_most(rounds, hook):
    path = next((path for part, path in ROUTE_OF.items() if part in hook.target), None)
    path = "/api/chat" if hook.target.endswith("handle_chat") else path
    streams = "stream" in hook.target

    def act(rounds: Round) -> Answer:
        if hook.target.endswith(("get_internal_state", "FanOutCommunicator.__call__")):
            info = requests.get(rounds.url + "/server_info", timeout=60)
            return info.status_code, info.text
        if hook.target.endswith("pause_generation"):
            return post(rounds.url, "/pause_generation", mode="retract")
        if hook.target.endswith("_from_disk"):
            return post(rounds.url, "/update_weights_from_disk", model_path="/no/such/folder")
        if hook.target.endswith("open_session"):
            return post(rounds.url, "/open_session", capacity_of_str_len=1)
        if path is None:
            return rounds.generate()
        reply = ROUTES[path].post(rounds.url, "Name a river.", 4, streams)
        return reply.status_code, reply.text

    status, said = rounds.run(hook.target, act)[0], None
    status, said = status
    if hook.policy is Policy.OBSERVE:
        assert status == 200, said
    else:
        assert status == 500 or "injected" in str(said), (status, said)
    assert_clean(rounds.client)


def test_the_server_still_gives_the_answers_that_it_gave_before(rounds):
    assert [rounds._neighbour(i)[1]["output_ids"] for i in range(2)] == [
        answer["output_ids"] for _, answer in rounds.alone
    ]
