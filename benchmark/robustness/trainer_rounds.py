"""A trainer's rounds: sample, replace the weights under load, sample; nothing is lost or mixed.

    python -m benchmark.robustness.trainer_rounds --rounds 20 --requests 64 --out result.json

Starts a gated server of a Llama-like model in one file. In each round it sends greedy and seeded
requests, pauses the server while they run (in place, retracting, aborting, or not at all), replaces
weights (from disk, or within a session from tensors or by a broadcast; with and without a flush)
and asks them again. A few versions of the weights take turns, so that each comes back. Every answer
must come, say the generations of the weights that computed it, and have the fingerprint of its
weights, or none if it saw two. Answers under one version must have the same tokens and log-probs
whenever it is in memory, and those under two versions must differ. Memory of the server's processes
is read after each round. Ends with status 1 if anything of it does not hold.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import requests
import torch
from safetensors import safe_open

from benchmark.bench.machine import environment
from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.embedded_model import ensure_model
from margingate.harness.servers import free_port, launch

VERSIONS = (0, 1, 2, 0, 3)  # of the weights by round, over and over; 0: those of the files
NAMES = ("model.layers.0.input_layernorm.weight", "model.norm.weight")  # columns and logits change
MODES = ("in_place", "retract", "abort", None)  # of the pause
FLUSHED = {"in_place": False, "retract": True, "abort": True, None: False}


def named_tensors(model: Path, version: int) -> list[tuple[str, torch.Tensor]]:
    """What is replaced, as a version of the weights has it."""
    generator = torch.Generator().manual_seed(version)
    with safe_open(model / "model.safetensors", framework="pt") as file:
        tensors = [(name, file.get_tensor(name)) for name in NAMES]
    if version == 0:
        return tensors
    return [
        (name, (t * (1 + 0.2 * torch.randn(t.shape, generator=generator))).to(t.dtype))
        for name, t in tensors
    ]


class Trainer:
    """What a trainer asks of a server: samples, pauses, other weights."""

    def __init__(self, client: Client, model: Path) -> None:
        self.client, self.model = client, model
        self.label, self._group = 0, None

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Raises RuntimeError unless the server did it."""
        reply = requests.post(f"{self.client.base_url}/{path}", json=body, timeout=300)
        said: dict[str, Any] = reply.json() if reply.content else {}
        if not reply.ok or said.get("success") is False:
            raise RuntimeError(f"{path} answered {reply.status_code}: {reply.text[:300]}")
        return said

    def sample(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """All at once, with log-probs; each second one at temperature 1 with a seed of its own."""
        draws = ({}, {"temperature": 1})
        params = {p.name: {**draws[i % 2], "sampling_seed": i} for i, p in enumerate(prompts)}
        return self.client.together(prompts, params=params, return_logprob=True)

    def update(self, version: int, *, flush: bool) -> None:
        """Put a version of the weights in memory, by one way and the next time by another."""
        self.label += 1
        more = {"weight_version": f"{self.label}: {version}", "flush_cache": flush}
        if version == 0 and self.label % 2:
            self.post("update_weights_from_disk", model_path=str(self.model), **more)
            return
        tensors = named_tensors(self.model, version)
        self.post("begin_weight_update")
        if self.label % 2:
            self._broadcast(tensors, more)
        else:
            content = base64.b64encode(pickle.dumps(tensors)).decode()
            self.post("update_weights_from_tensor", serialized_named_tensors=[content], **more)
        self.post("end_weight_update")

    def _broadcast(self, tensors: list[tuple[str, torch.Tensor]], more: dict[str, Any]) -> None:
        """By a process group that has the server as its second rank."""
        with ThreadPoolExecutor(1) as pool:
            if self._group is None:
                self._group = self._joined(pool)
            described = {
                "names": [name for name, _ in tensors],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
                "shapes": [list(tensor.shape) for _, tensor in tensors],
            }
            done = pool.submit(self.post, "update_weights_from_distributed", **described, **more)
            for _, tensor in tensors:
                torch.distributed.broadcast(tensor, src=0, group=self._group)
            done.result()

    def _joined(self, pool: ThreadPoolExecutor) -> Any:
        from sglang.srt.utils import init_custom_process_group

        port, name = free_port(), "weight_update_group"
        place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1}
        asked = {**place, "world_size": 2, "group_name": name, "backend": "gloo"}
        joined = pool.submit(self.post, "init_weights_update_group", **asked)
        group = init_custom_process_group(
            backend="gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=2,
            rank=0,
            group_name=name,
        )
        joined.result()
        return group

    def update_under_load(
        self, prompts: Sequence[Prompt], version: int, mode: str | None
    ) -> list[Answer]:
        """The answers to requests that run while the weights are replaced."""
        before = self.client.gate_state()["steps"]
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(self.sample, prompts)
            while (
                self.client.gate_state()["steps"] < before + len(prompts) // 2
                and not answers.done()
            ):
                time.sleep(0.02)
            if mode is not None:
                self.post("pause_generation", mode=mode)
            try:
                self.update(version, flush=FLUSHED[mode])
            finally:
                if mode is not None:
                    self.post("continue_generation")
            return answers.result()


def essence(answer: Answer) -> tuple[Any, ...]:
    """Tokens and log-probs, bit by bit."""
    return answer.tokens, tuple(value for value, *_ in answer.meta["output_token_logprobs"])


class Record:
    """What answers under each version were, and what does not hold."""

    def __init__(self) -> None:
        self.known: dict[int, list[Any]] = {}
        self.fingerprints: dict[int, str] = {}
        self.wrong: list[str] = []
        self.crossed = self.answers = self.repeated = 0

    def check(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.wrong.append(sentence)

    def pure(self, version: int, generation: int, answers: Sequence[Answer], where: str) -> None:
        """Answers that one version of the weights gave."""
        said = [answer.meta["gate"] for answer in answers]
        self.answers += len(answers)
        found = {gate["fingerprint"] for gate in said}
        seen = {tuple(gate["weight_generations"]) for gate in said}
        self.check(seen == {(generation,)}, f"{where}: generations {seen}, not {generation}")
        known = self.fingerprints.setdefault(version, said[0]["fingerprint"])
        self.check(found == {known}, f"{where}: fingerprints {found}, not {known}")
        content = [essence(answer) for answer in answers]
        self.repeated += version in self.known
        before = self.known.setdefault(version, content)
        same = sum(one == other for one, other in zip(before, content, strict=True))
        self.check(same == len(content), f"{where}: {same} of {len(content)} as before")

    def under_load(self, old: int, answers: Sequence[Answer], generation: int, where: str) -> None:
        """Answers to requests that ran as the weights changed to this generation."""
        for i, answer in enumerate(answers):
            self.answers += 1
            aborted = answer.meta["finish_reason"]["type"] == "abort"
            gate = answer.meta.get("gate")
            if gate is None:  # SGLang's own answer to one that it aborts in its queue
                self.check(aborted and not answer.tokens, f"{where}: an answer without a record")
                continue
            seen = gate["weight_generations"]
            if seen == [generation - 1, generation]:
                self.crossed += 1
                self.check(gate["fingerprint"] is None, f"{where}: a fingerprint for two weights")
                self.check(
                    self._begins(old, i, answer), f"{where}: tokens of old weights did not stand"
                )
            elif seen == [generation]:
                self.check(gate["fingerprint"] is not None, f"{where}: none for the new weights")
            else:
                self.check(seen in ([generation - 1], []), f"{where}: generations {seen}")
                same = essence(answer) == self.known[old][i]
                self.check(same or aborted, f"{where}: not as under these weights before")

    def _begins(self, old: int, i: int, answer: Answer) -> bool:
        """Whether what SGLang says to be of the old weights is what they gave before."""
        first, *others = answer.meta["weight_versions"]
        end = first["end"]
        return len(others) == 1 and all(
            found[:end] == known[:end]
            for found, known in zip(essence(answer), self.known[old][i], strict=True)
        )

    def apart(self) -> None:
        """Versions differ in fingerprint and in answers, or all of this shows nothing."""
        for one, other in itertools.combinations(sorted(self.known), 2):
            differ = self.known[one] != self.known[other]
            differ &= self.fingerprints[one] != self.fingerprints[other]
            self.check(differ, f"versions {one} and {other} are the same")


def run(trainer: Trainer, prompts: Sequence[Prompt], rounds: int, pid: int) -> dict[str, Any]:
    """`rounds` of them, from the weights of the files on; `pid`: of the server's launcher.

    Returns what was counted, and under "wrong" a sentence for whatever does not hold.
    """
    record, megabytes = Record(), [memory(pid)]
    generation, version = trainer.client.gate_state()["weight_generation"], 0
    record.pure(version, generation, trainer.sample(prompts), "at first")
    for i in range(1, rounds + 1):
        old, version = version, VERSIONS[i % len(VERSIONS)]
        mode, where = MODES[(i - 1) % len(MODES)], f"round {i}"
        answers = trainer.update_under_load(prompts, version, mode)
        generation += 1
        record.under_load(old, answers, generation, f"{where}, {mode}")
        record.pure(version, generation, trainer.sample(prompts), f"{where}, after {mode}")
        megabytes.append(memory(pid))
    record.apart()
    state = trainer.client.gate_state()
    record.check(state["missed"] == 0, f"missed is {state['missed']}")
    record.check(state["integrity"] == "ok", f"integrity: {state['integrity']}")
    return {
        "rounds": rounds,
        "requests": len(prompts),
        **{name: getattr(record, name) for name in ("answers", "crossed", "repeated", "wrong")},
        "megabytes": megabytes,
    }


def memory(pid: int) -> int:
    """RSS of the schedulers below this process, MB."""
    below = psutil.Process(pid).children(recursive=True)
    return sum(p.memory_info().rss for p in below if "scheduler" in "".join(p.cmdline())) >> 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder; default: the embedded SmolLM2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for the server, after --")
    args = parser.parse_args()
    model = args.model or ensure_model("smollm2")
    some = itertools.cycle(chat_prompts(read_prompts(PROMPTS), model))
    prompts = [Prompt(f"{i}", next(some).input_ids[-48:]) for i in range(args.requests)]
    log = Path(tempfile.mkdtemp()) / "log"
    with launch(model, log, *args.server_args, gate=True) as server:
        trainer = Trainer(Client(server.base_url, args.tokens), model)
        assert server.pid is not None
        found = run(trainer, prompts, args.rounds, server.pid)
    args.out.write_text(json.dumps({**environment(), **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
