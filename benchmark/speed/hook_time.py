"""What margingate's hooks take of the scheduler's thread: microseconds a decode step, by hook.

    python -m benchmark.speed.hook_time --out hooks.json
    python -m benchmark.speed.hook_time --modes stock overlap --kinds streamed --batches 1 2 4 \
        --out servers.json

A tiny model with a small vocabulary, so that tensors take next to nothing: what is left is Python,
and on a GPU the launching of kernels. All requests of a batch decode; the figure of a hook is the
median over the steps that have them all. `bench/hook_clock.py` says what is a hook's own time.
The mode `stock` has no hooks: its turn of the scheduler's loop, with and without the wait for the
device, is what the others' is to be held against. `--model` serves another model, with dummy
weights: then a turn is that of its server. `--operators` counts torch's operators and Triton's
launches in a step instead; times are of no use then. A mode may be NAME@FOLDER, another checkout's.
All modes' engines are up at once, asleep while another is measured, and every point is measured
engine by engine, so that a drift of the machine meets them all.

Left out of the sum: the wait for the device, SGLang's own sending, and hooks on layers, which on a
GPU run as a graph is captured. On a CPU, where kernels are oracles that go row by row, stand-ins
run in their place.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmark.bench import engines, hook_clock

GATE = {"deterministic_gate": True, "sleep_on_idle": True}
MODES: dict[str, dict[str, Any]] = {
    "stock": {"sleep_on_idle": True},
    "overlap": {**GATE, "gate_overlap": "on"},
    "no-overlap": {**GATE, "gate_overlap": "off"},
    "stock-path": {**GATE, "gate_fast_path": "stock", "gate_threshold": 0.0},
    "exact": {**GATE, "gate_guarantee": "exact"},
}
START_S = 900  # a busy machine takes long
USUAL = ("overlap", "no-overlap")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "streamed": {"stream": True},
    "log-probs": {"return_logprob": True, "top_logprobs_num": 2},
    "seeded": {"sampling": {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 5}},
}
VOCABULARY, PROMPT, TOKENS = 512, 16, 96
SHOWN = 12  # hooks of a point
LEAST_KV = 32_768  # tokens; what is checked at start takes some
# On a GPU they run as a graph is captured, and in no step.
IN_GRAPHS = ("Linear", "_compute_lm_head", "all_reduce", "TopK", "moe")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 1,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

if __name__ == "__mp_main__":  # a process of SGLang's, which will be the scheduler, or not
    hook_clock.install(operators="--operators" in sys.argv)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", type=mode, default=USUAL, help=", ".join(MODES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each request")
    parser.add_argument("--model", type=engines.model_folder, help="default: a tiny one")
    parser.add_argument("--operators", action="store_true", help="count calls")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, help="folder of the logs; default: that of --out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--kv-tokens", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def mode(text: str) -> str:
    """A mode, with or without @FOLDER; ValueError where there is none of that name."""
    if text.partition("@")[0] not in MODES:
        raise ValueError(text)
    return text


async def decode(engine: Any, kind: str, batch: int, tokens: int) -> None:
    """All at once, so that most steps have all of them."""
    rng = random.Random(batch)
    options = dict(KINDS[kind])
    params = {
        "max_new_tokens": tokens,
        "ignore_eos": True,
        **{"temperature": 0, **options.pop("sampling", {})},
    }

    async def ask(stagger: int) -> None:
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(PROMPT)]
        asked = {**params, "max_new_tokens": tokens + stagger}
        answer = await engine.async_generate(input_ids=prompt, sampling_params=asked, **options)
        if options.get("stream"):
            async for _ in answer:
                pass

    # Prompts are computed one by one, and those that came first are ahead.
    await asyncio.gather(*(ask(batch - i) for i in range(batch)))


def measure(engine: Any, kind: str, batch: int, tokens: int) -> dict[str, Any] | None:
    """What `Clock.take` says of the steps with all requests; None where there were none."""
    _state(engine)
    engine.loop.run_until_complete(decode(engine, kind, batch, tokens))
    found: dict[str, Any] | None = _state(engine)[hook_clock.ANSWER].get(str(batch))
    return found


def _state(engine: Any) -> dict[str, Any]:
    found: dict[str, Any] = engine.get_server_info()["internal_states"][0]
    return found


def serve(args: argparse.Namespace) -> None:
    """Start one engine, then measure what each line of stdin asks for."""
    options = MODES[args.one.partition("@")[0]]
    most = max(args.batches)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        model = args.model or folder
        engine = engines.start(model, args.kv_tokens, most, max_running_requests=most, **options)
        engines.serve(engine, partial(measure, tokens=args.tokens))
        engine.shutdown()


def own_us(hooks: Mapping[str, tuple[float, int]]) -> float:
    """Microseconds of a step's hooks together."""
    left_out = (hook_clock.APART, hook_clock.OPERATOR, *IN_GRAPHS)
    return sum(us for name, (us, _) in hooks.items() if not any(out in name for out in left_out))


def _largest(hook: tuple[str, tuple[float, int]]) -> tuple[float, int]:
    return -hook[1][0], -hook[1][1]


def show(results: list[dict[str, Any]]) -> None:
    """A line for each batch, and one for each hook of the largest."""
    for result in results:
        hooks = result["hooks"]
        print(
            f"{result['mode']:12} {result['kind']:10} {result['batch']:4} requests: "
            f"{own_us(hooks):8.1f} us of a turn of {result['turn_us']:8.1f}, "
            f"{result['busy_us']:8.1f} without waits"
        )
        for name, (took, calls) in sorted(hooks.items(), key=_largest)[:SHOWN]:
            print(f"    {took:9.1f} us {calls:6.0f} calls  {name}")
        if counted := [calls for name, (_, calls) in hooks.items() if hook_clock.OPERATOR in name]:
            print(f"    {sum(counted):9.0f} calls of operators")


def main() -> None:
    args = arguments()
    if args.one:
        serve(args)
        return
    engines.START_S = START_S
    args.logs = args.logs or args.out.parent
    args.logs.mkdir(parents=True, exist_ok=True)
    most = max(args.batches)
    args.kv_tokens = max(LEAST_KV, 2 * most * (PROMPT + args.tokens + most))
    results: list[dict[str, Any]] = []
    workers = engines.all_up(args.modes, args)
    for kind, batch, worker in product(args.kinds, args.batches, workers):
        if (said := worker.ask(kind, batch)) is not None:
            results.append({"mode": worker.mode, "kind": kind, "batch": batch, **said})
            show(results[-1:])
            engines.write(args.out, results)
    for worker in workers:
        worker.end()


if __name__ == "__main__":
    main()
