"""README's table: stock SGLang, its deterministic mode and margingate, each with its defaults.

    python -m benchmark.readme_table --out DIR --model SMOLLM2 --prompts *.jsonl

Runs three scripts one after the other on one GPU, each with all three kinds of server up and the
same requests for each: sameness.servers (answers alone, batched, shuffled and cached),
speed.decode_step (decode steps and prefills) and speed.serving (tokens a second and first tokens
under load). No server is told an attention backend; stock SGLang and its mode choose
FlashAttention 3 on Hopper. DIR gets records, logs, what ran (parts.json) and table.md, which has
each point too; the table is printed.

`--minutes` is for all parts; what one leaves over goes to the next. A part that was cut leaves what
it had measured, and a cell says what it lacks. `--parts` names those that are run (nothing behind
it: none); the table is made of all that DIR has. Status 1: something is lacking, or the records are
of different machines. Without a GPU all of it is small, with a made-up shape (`--shape tiny`), and
SGLang's mode, which needs one, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmark.bench import engines, readme_cells
from benchmark.bench.readme_cells import COLUMNS, FAILED, MODES, OUT_OF_TIME, Part, Row
from benchmark.bench.timed_command import run
from benchmark.speed.decode_step import fits
from margingate.harness.defaults import PROMPTS
from margingate.harness.embedded_model import ensure_model

# What a part has of the time that is left when it begins, in shares of those not run yet.
SHARES = {"sameness": 6, "steps": 5, "serving": 7}
SCRIPTS = {
    "sameness": "benchmark.sameness.servers",
    "steps": "benchmark.speed.decode_step",
    "serving": "benchmark.speed.serving",
}
STEP_TOKENS = 32  # behind which a decode step's time is known
START_S = 100  # of the limit, at most 0.4 of it: for servers to come up
ARRANGEMENTS = {"company": ("batched", "shuffled1"), "cached": ("cached",)}
ABSENT = {COLUMNS[1]: "needs a GPU"}  # without one
ON_GPU: dict[str, Any] = {
    **{"shape": "benchmark/models/configs/llama-3.1-8b", "per_file": 25, "tokens": 256},
    **{"batches": [1, 8, 32, 64, 128, 256], "contexts": [256, 2048, 8192]},
    **{"prefills": [1000, 2048, 4096, 8000], "kv_tokens": 180_000},
    **{"mixes": ["sharegpt", "1k-1k", "4k-1k"], "rates": ["inf", "4"]},
    **{"load_seconds": 10.0, "load_tokens": 100_000, "minutes": 18.0},
}
SMALL: dict[str, Any] = {
    **{"shape": "tiny", "per_file": 6, "tokens": 24},
    **{"batches": [1, 4], "contexts": [32, 128], "prefills": [64, 256], "kv_tokens": 16_384},
    **{"mixes": ["32-16", "128-16"], "rates": ["inf", "4"]},
    **{"load_seconds": 2.0, "load_tokens": 1_000, "minutes": 20.0},
}
FEW_TOKENS = ["--max-total-tokens", "16384", "--max-running-requests", "16"]
TINY = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"},
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32_000},
    **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
}
TELLING = re.compile(
    r"out of time before|did not (start|come up)|ended at start|requests failed|error"
)
BACKEND = re.compile(r"attention_backend'?[=:] ?'(\w+)'")


def arguments() -> argparse.Namespace:
    gpu = engines.on_gpu()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder; what is there is kept")
    parser.add_argument("--parts", nargs="*", choices=SHARES, default=list(SHARES))
    parser.add_argument("--minutes", type=float, help="for all parts together")
    parser.add_argument("--model", default="smollm2", help="of sameness: a folder; else embedded")
    parser.add_argument("--prompts", nargs="+", type=Path, default=[PROMPTS], help="of sameness")
    parser.add_argument("--per-file", type=int, help="prompts of each file")
    parser.add_argument("--tokens", type=int, help="of an answer, at most")
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight, of sameness")
    parser.add_argument("--shape", help="of steps and serving: folder with config.json, or tiny")
    parser.add_argument("--kv-tokens", type=int, help="of each K/V pool of steps and serving")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--contexts", nargs="+", type=int)
    parser.add_argument("--prefills", nargs="*", type=int, help="tokens of a prompt")
    parser.add_argument("--step-repeats", type=int, default=2, help="of a decode step; best counts")
    parser.add_argument("--mixes", nargs="+")
    parser.add_argument("--rates", nargs="+", help="a second, or inf")
    parser.add_argument("--load-seconds", type=float, help="of arrivals at a finite rate")
    parser.add_argument("--load-tokens", type=int, help="of a load at rate inf")
    parser.set_defaults(gpu=gpu, **(ON_GPU if gpu else SMALL))
    return parser.parse_args()


def modes(args: argparse.Namespace, part: str) -> list[str]:
    """What the columns are called there, less those that cannot run here."""
    return [names[0] for column, names in MODES[part].items() if args.gpu or column not in ABSENT]


def words(values: list[Any]) -> list[str]:
    return [str(value) for value in values]


def sameness_command(args: argparse.Namespace, limit_s: float) -> list[str]:
    """The servers' own limits are the same for all three; SmolLM2 takes little of a GPU."""
    model = ensure_model(args.model) if args.model == "smollm2" else args.model
    most = args.per_file * len(args.prompts)
    asked = [name for names in ARRANGEMENTS.values() for name in names]
    fitting = ["--max-total-tokens", "60000", "--context-length", "4096"]
    fitting += ["--mem-fraction-static", "0.3", "--cuda-graph-max-bs-decode", str(args.at_once)]
    return [
        *("--model", str(model), "--prompts", *words(args.prompts)),
        *("--per-file", str(args.per_file), "--others", str(most), "--tokens", str(args.tokens)),
        *("--at-once", str(args.at_once), "--servers", *modes(args, "sameness")),
        *("--arrangements", *asked, "--out", str(args.out / "sameness.json")),
        *("--", *(fitting if args.gpu else FEW_TOKENS)),
    ]


def speed_command(args: argparse.Namespace, part: str, limit_s: float) -> list[str]:
    """What steps and serving are told alike; a start is no part of --budget-s."""
    budget = max(limit_s - START_S, 0.6 * limit_s)
    return [
        *("--model", args.shape, "--modes", *modes(args, part)),
        *("--kv-tokens", str(args.kv_tokens), "--budget-s", f"{budget:.0f}"),
        *("--logs", str(args.out / "logs"), "--out", str(args.out / f"{part}.json")),
    ]


def steps_command(args: argparse.Namespace, limit_s: float) -> list[str]:
    return [
        *speed_command(args, "steps", limit_s),
        *("--batches", *words(args.batches), "--contexts", *words(args.contexts)),
        *("--prefills", *words(args.prefills), "--prefill-graphs"),
        *("--tokens", str(STEP_TOKENS), "--repeats", str(args.step_repeats)),
    ]


def serving_command(args: argparse.Namespace, limit_s: float) -> list[str]:
    return [
        *speed_command(args, "serving", limit_s),
        *("--mixes", *args.mixes, "--rates", *args.rates),
        *("--seconds", str(args.load_seconds), "--tokens", str(args.load_tokens)),
        *("--start-s", f"{0.7 * limit_s:.0f}"),
    ]


COMMANDS = {"sameness": sameness_command, "steps": steps_command, "serving": serving_command}


def asked(args: argparse.Namespace, part: str) -> dict[str, int]:
    """Points of each row of a part."""
    if part == "sameness":
        return {row: len(names) for row, names in ARRANGEMENTS.items()}
    if part == "serving":
        return {f"rate {rate}": len(args.mixes) for rate in map(rate_name, args.rates)}
    points = product(args.batches, args.contexts)
    fitting = [fits(*point, STEP_TOKENS, args.kv_tokens) for point in points]
    return {"decode": sum(fitting), "prefill": len(args.prefills)}


def rate_name(rate: str) -> str:
    """As speed.serving writes it."""
    return "inf" if rate == "inf" else str(float(rate))


def measure(args: argparse.Namespace) -> None:
    """Run the parts, one after the other, and note of each what became of it."""
    deadline = time.monotonic() + 60 * args.minutes
    for i, part in enumerate(args.parts):
        share = SHARES[part] / sum(SHARES[name] for name in args.parts[i:])
        limit_s = max(1.0, share * (deadline - time.monotonic()))
        noted = run_part(args, part, limit_s)
        known = read(args.out / "parts.json") or {}
        (args.out / "parts.json").write_text(json.dumps({**known, part: noted}, indent=1))


def run_part(args: argparse.Namespace, part: str, limit_s: float) -> dict[str, Any]:
    """Run a script, its output in PART.txt; the record of an earlier run is dropped."""
    (args.out / f"{part}.json").unlink(missing_ok=True)
    options = COMMANDS[part](args, limit_s)
    command = [sys.executable, "-m", SCRIPTS[part], *options]
    print(f"{part}, {limit_s:.0f} s at most: python -m {SCRIPTS[part]}", *options, flush=True)
    env = {"OUT": str(args.out / "logs")}  # where sameness.servers has its logs
    ended = run(command, args.out / f"{part}.txt", limit_s, env)
    outcome = OUT_OF_TIME if ended.status is None else FAILED if ended.status else ""
    print(f"{part}: {outcome or 'done'} after {ended.seconds:.0f} s", flush=True)
    return {
        **{"outcome": outcome, "status": ended.status, "seconds": round(ended.seconds, 1)},
        **{"limit_s": round(limit_s, 1), "asked": asked(args, part), "command": command[1:]},
        "absent": {} if args.gpu else ABSENT,
    }


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None where there is none, or one that was cut while it was written."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def parts_of(folder: Path) -> dict[str, Part]:
    """What a folder has of each part."""
    noted = read(folder / "parts.json") or {}
    found = {}
    for part in SHARES:
        record, about = read(folder / f"{part}.json"), noted.get(part, {})
        unknown = readme_cells.NOT_RUN if record is None else ""  # of a folder without parts.json
        found[part] = Part(
            part,
            record,
            about.get("outcome", unknown),
            about.get("asked", {}),
            about.get("absent", {}),
        )
    return found


def backends(folder: Path) -> str:
    """The attention backends that the servers of a folder chose, by the last word of their logs."""
    chosen: dict[str, list[str]] = {column: [] for column in COLUMNS}
    for part, column in product(SHARES, COLUMNS):
        stem = "same-" if part == "sameness" else f"{part}."
        for mode in MODES[part][column]:
            log = folder / "logs" / f"{stem}{mode}.log"
            found = BACKEND.findall(log.read_text(errors="replace")) if log.exists() else []
            chosen[column] += found[-1:]
    each = [f"{column} {' and '.join(dict.fromkeys(f))}" for column, f in chosen.items() if f]
    return f"Attention backends, by the servers' logs: {', '.join(each) or 'no logs'}."


def told(folder: Path) -> list[str]:
    """Seconds of each part, and the lines of its output that say what is lacking."""
    lines = []
    for part, about in (read(folder / "parts.json") or {}).items():
        state = about["outcome"] or "done"
        lines.append(f"{part}: {state} after {about['seconds']:.0f} of {about['limit_s']:.0f} s")
        text = folder / f"{part}.txt"
        output = text.read_text(errors="replace").splitlines() if text.exists() else []
        lines += [f"{part}: {line[:300]}" for line in output if TELLING.search(line)][:20]
    return lines


def report(folder: Path) -> tuple[str, str, bool]:
    """README's table, the page with each point, and whether nothing is lacking."""
    parts = parts_of(folder)
    machines = readme_cells.machines(parts)
    names = [f"{device.removeprefix('NVIDIA ')}, SGLang {sglang}" for device, sglang in machines]
    head = "one " + (" and one ".join(names) or "machine")
    lines: list[Row] = readme_cells.rows(parts)
    table = readme_cells.markdown(head, lines)
    missing = [word for line in lines for word in line.missing]
    if len(machines) > 1:
        missing.append(f"the records are of different machines or versions: {' and '.join(names)}")
    lacking = [f"- {word}" for word in missing or ["nothing"]]
    page = [
        *("# README's table", table, backends(folder)),
        *("## Each point", readme_cells.markdown("", readme_cells.details(parts))),
        *("## What is lacking", "\n".join(lacking)),
        *("## What ran", "\n".join(f"- {line}" for line in told(folder))),
    ]
    return table, "\n\n".join(page) + "\n", not missing


def made_shape(args: argparse.Namespace) -> str:
    """--shape; `tiny` is made in --out. SystemExit where its configuration cannot be read."""
    if args.shape != "tiny":
        try:
            return engines.model_folder(args.shape)
        except argparse.ArgumentTypeError as error:
            raise SystemExit(f"--shape {error}.") from None
    folder: Path = args.out / "tiny"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


def main() -> None:
    args = arguments()
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    args.shape = made_shape(args)
    measure(args)
    table, page, whole = report(args.out)
    (args.out / "table.md").write_text(page)
    print(f"\n{table}\n\n{args.out}{os.sep}table.md has each point and what is lacking.")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
