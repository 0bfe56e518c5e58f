"""Do servers that differ in one setting have other fingerprints, or else the same answers?

    python benchmark/fingerprint_pairs.py --out pairs.json

Starts a reference server, then one server after the other, each with one setting more, and asks all
of them the same requests, alone and together. Compared are the fingerprint and, bit by bit, token
ids, texts and log-probs of the answers that are gated on both. A setting that ends the start counts
as refused, with the sentence. Goes on where --out was left, so that it can be run in slices of
--budget-s. Prints a table; ends with status 1 where a fingerprint is the same and an answer is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from determinism import environment
from fingerprint_requests import ask_all

from margingate.cli.model import ensure_model
from margingate.servers import Server, ServerError, launch

REFERENCE = "reference"
BROKEN = "BROKEN"


@dataclass(frozen=True)
class Setting:
    """What one server has that the reference has not."""

    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    folder: str = "smollm2"  # the model's


def _args(*names: str) -> dict[str, Setting]:
    """By their text, which is split at spaces."""
    return {name: Setting(tuple(name.split())) for name in names}


def _env(*names: str) -> dict[str, Setting]:
    return {name: Setting(env=dict([name.split("=", 1)])) for name in names}


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
)
# Those that are called without effect come first, for they claim equal answers: the likeliest to
# break that before the others.
SETTINGS: dict[str, Setting] = {
    REFERENCE: Setting(),
    "a folder named as a model that SGLang knows": Setting(folder="vicuna-7b"),
    "the same again": Setting(),
    **_args("--chunked-prefill-size 128", "--disable-radix-cache", "--max-running-requests 3"),
    **_args("--stream-interval 5", "--incremental-streaming-output"),
    **_args("--schedule-policy lof", "--gate-overlap on", "--served-model-name another"),
    **_args("--enable-priority-scheduling --schedule-low-priority-values-first"),
    **_args("--num-continuous-decode-steps 4", "--random-seed 7", "--max-prefill-tokens 128"),
    **_env("SGLANG_TEST_RETRACT=1", "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"),
    **_args("--enable-custom-logit-processor", "--prefill-max-requests 1"),
    **_env("OMP_WAIT_POLICY=ACTIVE", "PYTHONHASHSEED=1"),
    # In the fingerprint by what they become, or refused.
    **_args("--constrained-json-disable-any-whitespace", "--grammar-backend xgrammar"),
    **_args("--max-total-tokens 1024", "--chunked-prefill-size 32", "--page-size 16"),
    **_args("--constrained-json-whitespace-pattern [\\n]{1,2}", "--kv-cache-dtype fp8_e5m2"),
    **_args("--enable-mixed-chunk", "--tool-call-parser hermes", "--sampling-defaults openai"),
    "a chat template": Setting(("--chat-template", "FOLDER/one.jinja")),
    **_args("--gate-rows 8", "--gate-guarantee exact", "--gate-fast-path stock"),
    # Without effect, and less likely to have one.
    **_args("--gate-max-delay 3", "--gate-audit-rate 1", "--skip-server-warmup"),
    **_args("--scheduler-recv-interval 5", "--schedule-conservativeness 0.1"),
    **_args("--schedule-policy random", "--radix-eviction-policy lfu", "--max-queued-requests 2"),
    **_args("--mem-fraction-static 0.2", "--min-free-slots-delay 2", "--enable-dynamic-chunking"),
    **_args("--enable-cache-report", "--enable-metrics", "--batch-notify-size 2"),
    **_args("--weight-loader-disable-mmap", "--sleep-on-idle"),
    **_args("--log-requests --log-requests-level 3", "--disable-overlap-schedule"),
    "another name of the model's folder": Setting(folder="a-copy"),
    **_env("LC_ALL=C", "MALLOC_ARENA_MAX=1", "TOKENIZERS_PARALLELISM=false"),
    **_args("--reasoning-parser qwen3", "--context-length 2048", "--grammar-backend outlines"),
    **_args('--preferred-sampling-params {"repetition_penalty":1.3}'),
    # These change the arithmetic, so that each start measures anew.
    **_env("ONEDNN_MAX_CPU_ISA=AVX512_CORE", "OMP_NUM_THREADS=1", "ATEN_CPU_CAPABILITY=avx2"),
    **_args("--enable-fp32-lm-head", "--dtype float32"),
}


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


def measure(name: str, root: Path) -> dict[str, Any]:
    """What a server with this setting says: its fingerprint and answers, or why it has none."""
    setting = SETTINGS[name]
    args = [each.replace("FOLDER", str(root)) for each in setting.args]
    log = root / "logs" / f"{list(SETTINGS).index(name)}.log"
    server = launch(root / setting.folder, log, *args, gate=True, env=setting.env, stop_s=0.5)
    begun = time.monotonic()
    try:
        with server:
            up_s = time.monotonic() - begun
            return {**_asked(server), "up_s": up_s, "seconds": time.monotonic() - begun}
    except ServerError as error:
        return {"refused": str(error)}


def _asked(server: Server) -> dict[str, Any]:
    import requests

    info = requests.get(f"{server.base_url}/server_info", timeout=60).json()
    gate = info["internal_states"][0]["margingate"]
    return {"fingerprint": gate["fingerprint"], "answers": ask_all(server.base_url)}


def verdict(reference: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Of one server beside the reference: compared and other answers, and what that means."""
    if "refused" in found:
        return {"is": "refused", "why": found["refused"]}
    mine, theirs = reference["answers"], found["answers"]
    both = [name for name in mine if mine[name]["gated"] and theirs[name]["gated"]]
    other = [name for name in both if mine[name] != theirs[name]]
    same = reference["fingerprint"] == found["fingerprint"] is not None
    kind = (BROKEN if other else "same answers") if same else "another fingerprint"
    left = [name for name in mine if name not in both]
    return {"is": kind, "compared": len(both), "other": other, "not compared": left}


def table(record: dict[str, Any]) -> bool:
    """Print a row a setting; returns whether one is broken."""
    reference, broken = record[REFERENCE], False
    for name, found in record.items():
        if name == REFERENCE or name not in SETTINGS:
            continue
        row = verdict(reference, found)
        broken |= row["is"] == BROKEN
        if row["is"] == "refused":
            print(f"{name:66} refused: {row['why'][:160]}")
            continue
        counted = f"{len(row['other']):3} of {row['compared']} answers are others"
        missing = f"; not compared: {', '.join(row['not compared'])}" if row["not compared"] else ""
        print(f"{name:66} {row['is']:20} {counted}{missing}")
        if row["is"] == BROKEN:
            print(f"    others: {', '.join(row['other'])}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=5, help="of SmolLM2's 30")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="these, even if done before")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start no server after that")
    parser.add_argument("--table", action="store_true", help="print what --out holds, no more")
    args = parser.parse_args()
    record = json.loads(args.out.read_text())["servers"] if args.out.exists() else {}
    root = Path(tempfile.gettempdir()) / f"margingate-pairs-{args.layers}"
    folders(root, args.layers)
    begun = time.monotonic()
    todo = args.only or [name for name in SETTINGS if name not in record]
    for name in [] if args.table else todo:
        if time.monotonic() - begun > args.budget_s:
            print(f"{name} and what follows is left for another run.")
            break
        record[name] = measure(name, root)
        print(f"{time.monotonic() - begun:4.0f} s {name}", flush=True)
        text = json.dumps({"environment": environment(), "servers": record}, indent=1)
        args.out.write_text(text)
    return int(table(record))


if __name__ == "__main__":
    sys.exit(main())
