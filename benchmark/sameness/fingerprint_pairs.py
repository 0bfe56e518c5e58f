"""Do servers that differ in one setting have other fingerprints, or else the same answers?

    python -m benchmark.sameness.fingerprint_pairs --out pairs.json

Starts a reference server, then one server after the other, each with one setting more, and asks all
of them the same requests, alone and together. Compared are the fingerprint and, bit by bit, token
ids, texts and log-probs of the answers that are gated on both. A setting that ends the start counts
as refused, with the sentence. With --together N, each server has N of those settings at once that
are called without effect, and a group that turns out otherwise is taken apart. Goes on where --out
was left, so that it can be run in slices of --budget-s. Prints a table; ends with status 1 where a
fingerprint is the same and an answer is not, or a request ended a server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from benchmark.bench.fingerprint_requests import ask_all
from benchmark.bench.machine import environment
from margingate.harness.embedded_model import ensure_model
from margingate.harness.servers import Server, ServerError, launch

REFERENCE, FOLDER = "reference", "smollm2"
BROKEN, SAME, ENDED = "BROKEN", "same answers", "ended"


@dataclass(frozen=True)
class Setting:
    """What one server has that the reference has not."""

    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    folder: str = FOLDER  # the model's


def _args(*names: str) -> dict[str, Setting]:
    """By their text, which is split at spaces."""
    return {name: Setting(tuple(name.split())) for name in names}


def _env(*names: str) -> dict[str, Setting]:
    return {name: Setting(env=dict([name.split("=", 1)])) for name in names}


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
)
# Each claims the same answers under the same fingerprint; the likeliest to break that come first.
# None undoes another, so that a server may have many of them: a group says no less than a pair.
WITHOUT_EFFECT: dict[str, Setting] = {
    "the same again": Setting(),
    **_args("--disable-radix-cache", "--max-running-requests 3"),
    **_args("--schedule-policy lof", "--num-continuous-decode-steps 4", "--max-prefill-tokens 128"),
    **_args("--scheduler-recv-interval 5", "--prefill-max-requests 1", "--sleep-on-idle"),
    **_env("SGLANG_TEST_RETRACT=1", "SGLANG_INIT_NEW_TOKEN_RATIO=0.1", "PYTHONHASHSEED=1"),
    **_args("--stream-interval 5", "--incremental-streaming-output", "--batch-notify-size 2"),
    **_args("--served-model-name another", "--random-seed 7", "--enable-cache-report"),
    **_args("--enable-metrics", "--log-requests --log-requests-level 3", "--skip-server-warmup"),
    **_args("--weight-loader-disable-mmap", "--enable-custom-logit-processor"),
    "another name of the model's folder": Setting(folder="a-copy"),
    **_args("--gate-overlap on", "--gate-max-delay 3", "--gate-audit-rate 1"),
    **_args("--enable-priority-scheduling --schedule-low-priority-values-first"),
    **_args("--radix-eviction-policy lfu", "--schedule-conservativeness 0.1"),
    **_args("--mem-fraction-static 0.2", "--weight-version another", "--decode-log-interval 1"),
    **_env("OMP_WAIT_POLICY=ACTIVE", "LC_ALL=C", "TOKENIZERS_PARALLELISM=false"),
    **_env("MALLOC_ARENA_MAX=1", "TZ=Asia/Tokyo"),
    **_args("--detokenizer-worker-num 2", "--enable-request-time-stats-logging"),
    **_args("--gc-threshold 50", "--stream-response-default-include-usage"),
}
# In the fingerprint, by what they become at least, or refused.
COUNTED: dict[str, Setting] = {
    "a folder named as a model that SGLang knows": Setting(folder="vicuna-7b"),
    **_args("--page-size 16", "--kv-cache-dtype fp8_e5m2", "--enable-mixed-chunk"),
    **_args("--constrained-json-disable-any-whitespace", "--grammar-backend xgrammar"),
    "a chat template": Setting(("--chat-template", "FOLDER/one.jinja")),
    **_args("--max-total-tokens 1024", "--chunked-prefill-size 128", "--chunked-prefill-size 32"),
    **_args("--context-length 2048", "--grammar-backend none"),
    **_args("--constrained-json-whitespace-pattern [\\n]{1,2}", "--tool-call-parser hermes"),
    **_args("--sampling-defaults openai", "--gate-rows 8", "--gate-guarantee exact"),
    **_args("--gate-fast-path stock", "--reasoning-parser qwen3"),
    **_args('--preferred-sampling-params {"repetition_penalty":1.3}'),
    # These change the arithmetic, so that each start measures anew.
    **_env("GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"),
    **_env("ONEDNN_MAX_CPU_ISA=AVX512_CORE", "OMP_NUM_THREADS=1", "ATEN_CPU_CAPABILITY=avx2"),
    **_args("--enable-fp32-lm-head", "--dtype float32"),
}
SETTINGS = {REFERENCE: Setting()} | WITHOUT_EFFECT | COUNTED
AND = " + "


def folders(root: Path, layers: int) -> None:
    """One model under several names, with its first layers alone, and the files of settings."""
    whole = ensure_model("smollm2")
    config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": layers}
    for name in {setting.folder for setting in SETTINGS.values()}:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in whole.iterdir():
            if file.name != "config.json" and not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        (folder / "config.json").write_text(json.dumps(config))
    (root / "one.jinja").write_text(TEMPLATE)


def combined(name: str) -> Setting:
    """Of one setting, or of several whose names are joined by AND."""
    chosen = [SETTINGS[each] for each in name.split(AND)]
    env = {key: value for one in chosen for key, value in one.env.items()}
    folders = [one.folder for one in chosen if one.folder != FOLDER]
    return Setting(tuple(arg for one in chosen for arg in one.args), env, *folders)


def names(together: int) -> list[str]:
    """Of the servers: `together` of the settings without effect in each, the others alone."""
    quiet = list(WITHOUT_EFFECT)
    groups = [AND.join(quiet[i : i + together]) for i in range(0, len(quiet), together)]
    return [REFERENCE, *groups, *COUNTED]


def measure(name: str, root: Path) -> dict[str, Any]:
    """What a server with this setting says: its fingerprint and answers, or why it has none."""
    setting = combined(name)
    args = [each.replace("FOLDER", str(root)) for each in setting.args]
    log = root / "logs" / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}.log"
    server = launch(root / setting.folder, log, *args, gate=True, env=setting.env, stop_s=0.5)
    begun = time.monotonic()
    try:
        with server:
            up_s = time.monotonic() - begun
            return {**_asked(server), "up_s": up_s, "seconds": time.monotonic() - begun}
    except ServerError as error:
        return {"refused": str(error)}
    except requests.ConnectionError:
        return {ENDED: str(server.error("ended while it was asked"))}


def _asked(server: Server) -> dict[str, Any]:
    info = requests.get(f"{server.base_url}/server_info", timeout=60).json()
    gate = info["internal_states"][0]["margingate"]
    return {"fingerprint": gate["fingerprint"], "answers": ask_all(server.base_url)}


def verdict(reference: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Of one server beside the reference: compared and other answers, and what that means."""
    for kind in ("refused", ENDED):
        if kind in found:
            return {"is": kind, "why": found[kind]}
    mine, theirs = reference["answers"], found["answers"]
    both = [name for name in mine if mine[name]["gated"] and theirs[name]["gated"]]
    other = [name for name in both if mine[name] != theirs[name]]
    same = reference["fingerprint"] == found["fingerprint"] is not None
    kind = (BROKEN if other else SAME) if same else "another fingerprint"
    left = [name for name in mine if name not in both]
    return {"is": kind, "compared": len(both), "other": other, "not compared": left}


def broken(record: dict[str, Any], name: str) -> bool:
    """Whether this server has the fingerprint of the reference and not its answers, or ended."""
    return verdict(record[REFERENCE], record[name])["is"] in (BROKEN, ENDED)


def apart(record: dict[str, Any]) -> list[str]:
    """The members of groups that did not give the same answers, each to be asked alone."""
    groups = [name for name in record if AND in name]
    bad = [name for name in groups if verdict(record[REFERENCE], record[name])["is"] != SAME]
    return [each for name in bad for each in name.split(AND)]


def table(record: dict[str, Any]) -> None:
    """Print a row a server."""
    for name in list(record)[1:]:
        row = verdict(record[REFERENCE], record[name])
        print(f"{name}\n    {row['is']}: ", end="")
        if "why" in row:
            print(row["why"])
            continue
        said = f"{len(row['other'])} of {row['compared']} answers are others"
        parts = {"others": row["other"][:9], "not compared": row["not compared"]}
        lists = [f"; {what}: {'; '.join(some)}" for what, some in parts.items() if some]
        print(said + "".join(lists))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=5, help="of SmolLM2's 30")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="these, even if done before")
    parser.add_argument("--together", type=int, default=1, help="settings without effect a server")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start no server after that")
    parser.add_argument("--table", action="store_true", help="print what --out holds, no more")
    return parser.parse_args()


def main() -> int:
    args = options()
    record = json.loads(args.out.read_text())["servers"] if args.out.exists() else {}
    root = Path(tempfile.gettempdir()) / f"margingate-pairs-{args.layers}"
    folders(root, args.layers)
    begun = time.monotonic()
    todo = args.only or [name for name in names(args.together) if name not in record]
    todo = [] if args.table else list(todo)
    while todo and time.monotonic() - begun < args.budget_s:
        name = todo.pop(0)
        record[name] = measure(name, root)
        print(f"{time.monotonic() - begun:4.0f} s {name}", flush=True)
        text = json.dumps({"environment": environment(), "servers": record}, indent=1)
        args.out.write_text(text)
        todo = todo or [each for each in apart(record) if each not in record]
    if todo:
        print(f"left for another run: {', '.join(todo)}")
    table(record)
    return int(any(broken(record, name) for name in record))


if __name__ == "__main__":
    sys.exit(main())
