"""lm-evaluation-harness against a gated server and a stock one: are its results files the same?

    python -m benchmark.sameness.evaluation_harness --lm-eval /tmp/lm-eval/bin/lm_eval \
        --prompts DATA/gsm8k.jsonl --out harness.json

Two tasks are made of a file of prompts: one that is scored by log-likelihoods (which of four last
sentences belongs to a text) and one that generates (the last sentence itself). lm_eval asks each
server one by one and with many requests at once, the gated one twice. Its files are held to those
of the first run with that server: log-likelihoods by every digit, answers by every letter, and the
table of results. Ends with status 1 if the gated server's differ.

lm_eval stays out of SGLang's environment: python -m venv /tmp/lm-eval, and in it
pip install "lm-eval[api]" transformers. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.bench.machine import environment
from margingate.harness.client import Client, read_prompts
from margingate.harness.embedded_model import ensure_model
from margingate.harness.servers import Server, launch

TASKS = ("gate_choice", "gate_generate")
CHOICES = 4  # last sentences to choose among
ROUNDS = {"gated": 2, "stock": 1}
OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")

# Quoted lines are lm_eval's templates: a field of a document in double braces.
YAML = {
    "gate_choice": """
task: gate_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "gate_generate": """
task: gate_generate
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{last}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: TOKENS
  temperature: 0
metric_list:
  - metric: chrf
""",
}
_DATA = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: FILE
test_split: test
num_fewshot: 0
metadata:
  version: 1
"""


@dataclass(frozen=True)
class Found:
    """What lm_eval wrote in one run."""

    samples: dict[str, list[Any]]  # by task, each document's requests and answers
    results: dict[str, Any]  # by task, its metrics
    seconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lm-eval", default="lm_eval", help="its command, in its own environment")
    parser.add_argument("--model", help="folder; default: the embedded SmolLM2")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL, a prompt a line")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=24, help="generated for a document, at most")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--servers", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    parser.add_argument(
        "--files", type=Path, help="folder that keeps lm_eval's; runs that it has are not repeated"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for every server, after --")
    return parser.parse_args()


def documents(path: Path, count: int) -> list[dict[str, Any]]:
    """Texts without their last sentence, it, and three of other texts to choose it among.

    Raises:
        OSError, ValueError: as `read_prompts` does; ValueError too where fewer than `count` texts
            have two sentences or more.
    """
    parts = []
    for _, text in read_prompts(path):
        *before, last = re.split(r"(?<=[.?!])\s+", " ".join(text.split()))
        if before and len(last) > 10:
            parts.append((" ".join(before), last))
    if len(parts) < count:
        raise ValueError(
            f"{path} has {len(parts)} texts of two sentences: give --documents {len(parts)} at most"
        )
    made = []
    for i, (text, last) in enumerate(parts[:count]):
        others = [parts[(i + step) % len(parts)][1] for step in range(1, CHOICES)]
        gold = i % CHOICES
        choices = [*others[:gold], last, *others[gold:]]
        made.append({"text": text, "last": last, "choices": choices, "gold": gold})
    return made


def write_tasks(folder: Path, docs: Sequence[dict[str, Any]], tokens: int) -> None:
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in YAML.items():
        filled = (text.strip() + _DATA).replace("FILE", str(data)).replace("TOKENS", str(tokens))
        (folder / f"{name}.yaml").write_text(filled)


def evaluate(
    args: argparse.Namespace, server: Server, tasks: Path, at_once: int, out: Path
) -> None:
    """Have lm_eval write its files of one run; raises RuntimeError where it fails."""
    asked = {
        "model": args.model,
        "base_url": f"{server.base_url}/v1/completions",
        "num_concurrent": at_once,
        "max_retries": 1,
        "tokenizer_backend": "huggingface",
    }
    command = [args.lm_eval, "run", "--model", "local-completions", "--tasks", *TASKS]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in asked.items())]
    command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    env = {**os.environ, **OFFLINE}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"{args.lm_eval} ended with {done.returncode}: {said[:300]}")


def read(out: Path) -> Found:
    """What lies in lm_eval's folder; documents in their own order."""
    (table,) = out.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(lines, key=lambda line: line["doc_id"])
    said = json.loads(table.read_text())
    return Found(samples, said["results"], float(said["total_evaluation_time_seconds"]))


def compare(reference: Found, other: Found) -> dict[str, Any]:
    """What differs from the first run: log-likelihoods, answers, documents' lines, metrics."""
    ours, theirs = (_logliks(found) for found in (reference, other))
    gaps = [abs(float(a) - float(b)) for a, b in zip(ours, theirs, strict=True) if a != b]
    answers, again = (_answers(found) for found in (reference, other))
    lines = [
        a != b
        for task in TASKS
        for a, b in zip(reference.samples[task], other.samples[task], strict=True)
    ]
    return {
        "log-likelihoods": f"{len(gaps)} of {len(ours)} differ",
        "largest distance": max(gaps, default=0.0),
        "answers": f"{sum(a != b for a, b in zip(answers, again, strict=True))} of "
        f"{len(answers)} differ",
        "lines of samples": f"{sum(lines)} of {len(lines)} differ",
        "results": "same" if reference.results == other.results else "differ",
        "seconds": round(other.seconds, 1),
    }


def _logliks(found: Found) -> list[str]:
    """Every request's, as lm_eval wrote it: all digits."""
    lines = found.samples["gate_choice"]
    return [str(response[0][0]) for line in lines for response in line["resps"]]


def _answers(found: Found) -> list[str]:
    return [str(line["resps"]) for line in found.samples["gate_generate"]]


def run(args: argparse.Namespace, tasks: Path, name: str, runs: dict[str, Any]) -> dict[str, Any]:
    """All runs of one server into `runs`, each held to the first of them; what its gate says."""
    reference: Found | None = None
    with launch(args.model, tasks / f"{name}.log", *args.server_args, gate=name == "gated") as up:
        for number in range(ROUNDS[name]):
            for at_once in (1, args.at_once):
                key = f"{at_once} at once" + (", again" if number else "")
                out = args.files / f"{name}, {key}"
                if not list(out.rglob("results_*.json")):
                    evaluate(args, up, tasks, at_once, out)
                found = read(out)
                reference = reference or found
                runs[key] = {**compare(reference, found), "metrics": metrics(found)}
                print(f"{name}, {key}:", runs[key], flush=True)
        return gate(Client(up.base_url, 1)) if name == "gated" else {}


def metrics(found: Found) -> dict[str, float]:
    """The numbers of lm_eval's table, without their errors."""
    return {
        f"{task} {name.removesuffix(',none')}": value
        for task in TASKS
        for name, value in found.results[task].items()
        if isinstance(value, float) and "stderr" not in name
    }


def gate(client: Client) -> dict[str, Any]:
    state = client.gate_state()
    return {name: state[name] for name in ("scores", "fingerprint", "steps", "missed", "integrity")}


def main() -> int:
    args = arguments()
    args.model = args.model or str(ensure_model("smollm2"))
    tasks = Path(tempfile.mkdtemp(prefix="margingate-lm-eval-"))
    args.files = args.files or tasks / "files"
    try:
        docs = documents(args.prompts, args.documents)
    except (OSError, ValueError) as error:
        sys.exit(f"--prompts: {error}")
    write_tasks(tasks, docs, args.tokens)
    head = {**environment(), "documents": args.documents, "tokens": args.tokens}
    record: dict[str, dict[str, Any]] = {name: {"runs": {}} for name in args.servers}
    try:
        for name in args.servers:
            record[name] |= run(args, tasks, name, record[name]["runs"])
    finally:
        args.out.write_text(json.dumps({**head, "servers": record}, indent=1) + "\n")
    gated = record.get("gated", {"runs": {}})["runs"].values()
    return int(not all(map(same, gated)))


def same(found: dict[str, Any]) -> bool:
    """Whether nothing of a run differs from the first."""
    counts = (found[key] for key in ("log-likelihoods", "answers", "lines of samples"))
    return found["results"] == "same" and all(count.startswith("0 of ") for count in counts)


if __name__ == "__main__":
    sys.exit(main())
