"""Does an answer depend on the row count that its prompt had alone, or on what it was batched with?

    python -m benchmark.sameness.holes --model qwen2.5-1.5b \
        --out qwen.json [--logs DIR] [-- server options]
    python -m benchmark.sameness.holes --model llama-3.1-8b --random-counts 25 --max 4096 \
        --out random.json

Writes a model with the layers' shapes of `--model`, `--layers` of them, normal weights (standard
deviation 1 / sqrt(inputs), so that a last bit of any layer reaches the logits, and top logits are
close) and a vocabulary of 49,152, and serves it gated, without a tokenizer: once with SGLang's
prefill graphs and once without (`--graphs`). Prompts are random token ids, of every length in
`--lengths` (default 224 to 272 and 377 to 408) or of `--random-counts` lengths drawn from 1 to
`--max`. Each is answered:

    alone          one at a time, nothing cached: what all others are compared with
    alone-again    from the cache
    together       cache flushed, in shuffled groups with other prompts of random lengths, one call
                   a group, so that one prefill forward has many of them
    together-again the same from the cache
    alone-after    one at a time, from the cache that `together` left
    together-2     cache flushed, other groups, other neighbours

Compared are output tokens, log-probs bit for bit, and K/V columns of the first, middle and last
layer bit for bit (`--gate-study`). The table has, of each, how many lengths differ and which. It
runs on older commits too: it uses HTTP and public server options alone. `-- --gate-policy observe`
is the control: nothing is gated, and answers must differ. A CPU takes `--model tiny` and
`--model tiny-experts`.
Ends with status 1 where an answer differs, 2 where a server failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from margingate.harness.servers import Server, launch, machine_args

CONFIGS = Path(__file__).parents[1] / "models/configs"
VOCAB = 49152
ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
QWEN_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
    "llama-3.2-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 5e5,
        "rope_scaling": ROPE,
    },
    "llama-3.1-8b": json.loads((CONFIGS / "llama-3.1-8b/config.json").read_text()),
    "qwen3-30b-a3b": json.loads((CONFIGS / "qwen3-30b-a3b/config.json").read_text()),
    "tiny-experts": {
        **QWEN_EXPERTS,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "rope_theta": 1e4,
    },
    "tiny": {
        **LLAMA,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_theta": 1e4,
    },
}
LENGTHS = ("224-272", "377-408")
KEPT = 60  # prompts whose columns the server keeps at once: its own limit is 64
GROUP, COMPANY = 12, 4  # most prompts and most others in one call
PREFILL = re.compile(r"Prefill batch.*?#new-seq: (\d+), #new-token: (\d+)")
TOLD = re.compile(r"margingate: gated prompts are .*")  # how the gate prefills
KINDS = ("tokens", "logprobs", "columns")


class Asked(NamedTuple):
    """A prompt; one without a name is a neighbour."""

    name: str
    ids: list[int]


def main() -> int:
    args = arguments()
    args.logs.mkdir(parents=True, exist_ok=True)
    print(f"{args.model}, {args.layers} layers, seed {args.seed}: {len(args.lengths)} lengths")
    print(*args.lengths, flush=True)
    record: dict[str, Any] = {"command": sys.argv, "seed": args.seed, "lengths": args.lengths}
    record["cases"] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        write_model(Path(folder), args)
        for graphs in args.graphs:
            record["cases"][f"prefill graphs {graphs}"] = case(Path(folder), graphs, args)
            args.out.write_text(json.dumps(record, indent=1))
    cases = record["cases"].values()
    if any("error" in found for found in cases):
        return 2
    return int(any(one[kind] for c in cases for one in c["phases"].values() for kind in KINDS))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, required=True, help="whose layers' shapes")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lengths", nargs="+", default=LENGTHS, help="ranges, ends included")
    parser.add_argument("--random-counts", type=int, help="so many random lengths instead")
    parser.add_argument("--max", type=int, default=4096, help="the largest of them")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--graphs", nargs="+", choices=("on", "off"), default=("off", "on"))
    parser.add_argument("--graphs-max", type=int, help="tokens of the largest prefill graph")
    parser.add_argument("--tokens", type=int, default=4, help="of an answer")
    parser.add_argument("--memory", type=float, default=0.4, help="--mem-fraction-static")
    parser.add_argument("--kv-tokens", type=int, default=200_000)
    parser.add_argument("--start-s", type=float, default=150)
    parser.add_argument("--scratch", type=Path, help="where the model is written; default: /tmp")
    parser.add_argument("--code", type=Path, help="another checkout, whose servers are asked")
    parser.add_argument("--logs", type=Path, help="folder of the logs; default: that of --out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for the servers, after --")
    args = parser.parse_args()
    args.logs = args.logs or args.out.parent
    draw = random.Random(args.seed)
    if args.random_counts:
        if args.random_counts > args.max:
            parser.error(f"--random-counts {args.random_counts}: give --max or less, {args.max}.")
        args.lengths = sorted(draw.sample(range(1, args.max + 1), args.random_counts))
    else:
        try:
            args.lengths = sorted({n for text in args.lengths for n in span(text)} - {0})
        except ValueError:
            parser.error(f"--lengths {' '.join(args.lengths)}: give numbers or ranges as 224-272.")
    return args


def span(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


# -- the model


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """config.json and model.safetensors in BF16, as Hugging Face names them."""
    import torch
    from safetensors.torch import save_file

    config = CONFIGS[args.model] | {
        "vocab_size": VOCAB,
        "num_hidden_layers": args.layers,
        "hidden_act": "silu",
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,  # tied, a token's own logit would lead by far
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.Generator(device).manual_seed(17)
    tensors = {}
    for name, shape in parameters(config):
        if "norm" in name:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        scale = shape[-1] ** -0.5 if len(shape) == 2 and "embed" not in name else 1.0
        drawn = torch.randn(shape, generator=source, device=device) * scale
        tensors[name] = drawn.bfloat16().cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if device == "cuda":
        torch.cuda.empty_cache()


def parameters(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes; q, k and v have a bias in Qwen2, and q and k norms in Qwen3."""
    hidden = config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    yield "model.embed_tokens.weight", (VOCAB, hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{at}self_attn.{name}_proj.weight", (count * width, hidden)
            if config["model_type"] == "qwen2":
                yield f"{at}self_attn.{name}_proj.bias", (count * width,)
        yield f"{at}self_attn.o_proj.weight", (hidden, heads * width)
        if config["model_type"] == "qwen3_moe":
            yield f"{at}self_attn.q_norm.weight", (width,)
            yield f"{at}self_attn.k_norm.weight", (width,)
            yield f"{at}mlp.gate.weight", (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from mlp(
                    f"{at}mlp.experts.{expert}.", hidden, config["moe_intermediate_size"]
                )
        else:
            yield from mlp(f"{at}mlp.", hidden, config["intermediate_size"])
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCAB, hidden)


def mlp(at: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}gate_proj.weight", (inner, hidden)
    yield f"{at}up_proj.weight", (inner, hidden)
    yield f"{at}down_proj.weight", (hidden, inner)


# -- one server


def environment_of(code: Path) -> dict[str, str]:
    """With which a process imports margingate from that checkout."""
    code = code.resolve()
    first = (str(code), f"{code}/python", f"{code}/sgl-kernel-patches")
    return {"PYTHONPATH": os.pathsep.join((*first, os.environ.get("PYTHONPATH", "")))}


def case(folder: Path, graphs: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, ask in all phases, print and return what differs."""
    log = args.logs / f"{args.out.stem}-graphs-{graphs}.log"
    env = environment_of(args.code) if args.code else {}
    server = launch(folder, log, *options(graphs, args), gate=True, start_s=args.start_s, env=env)
    began = time.monotonic()
    try:
        with server:
            start_s = time.monotonic() - began
            phases = ask_all(server, args)
            gate = get(server, "/server_info")["internal_states"][0].get("margingate", {})
    except Exception as problem:
        print(f"prefill graphs {graphs}: {problem}", flush=True)
        return {"error": repr(problem)}
    seconds = time.monotonic() - began
    print(f"prefill graphs {graphs}: {seconds:.0f} s, {start_s:.0f} s of them to start")
    told = sorted({line.strip() for line in TOLD.findall(log.read_text(errors="replace"))})
    print(*(f"    {line}" for line in told), sep="\n")
    print_phases(phases)
    found = {"start_s": start_s, "seconds": seconds, "said": told, "phases": phases}
    return found | {"gate": gate}


def options(graphs: str, args: argparse.Namespace) -> list[str]:
    """The server's, the user's last."""
    found = ["--skip-tokenizer-init", "--gate-study", "--context-length", "16384"]
    found += ["--max-total-tokens", str(args.kv_tokens)]
    if not machine_args():  # a GPU
        found += ["--mem-fraction-static", str(args.memory), "--cuda-graph-max-bs-decode", "16"]
        if graphs == "off":
            found += ["--cuda-graph-backend-prefill", "disabled"]
        elif args.graphs_max:
            found += ["--cuda-graph-max-bs-prefill", str(args.graphs_max)]
    return found + args.server_args


def ask_all(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Every phase for every length, KEPT lengths at a time; what differs by phase."""
    phases: dict[str, Any] = {}
    draw = random.Random(args.seed + 1)
    prompts = [Asked(f"{n}", ids(draw, n)) for n in args.lengths]
    for at in range(0, len(prompts), KEPT):
        block = prompts[at : at + KEPT]
        flush(server)
        alone = one_by_one(server, block, "keep", args)
        for name in ("alone-again", "together", "together-again", "alone-after", "together-2"):
            if name in ("together", "together-2"):
                flush(server)
                sets = groups(block, draw, max(args.lengths))
            seen = server.log.stat().st_size
            if name.startswith("alone"):
                answers = one_by_one(server, block, "against", args)
            else:
                answers = {}
                for group in sets:
                    answers |= ask(server, group, "against", args)
            compare(phases.setdefault(name, empty()), alone, answers)
            phases[name]["forwards"] += forwards(server.log, seen)
    return phases


def ids(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1000, VOCAB) for _ in range(length)]


def groups(block: Sequence[Asked], draw: random.Random, longest: int) -> list[list[Asked]]:
    """The block, shuffled and cut, with neighbours. Some groups ask their first prompt alone."""
    left, found = draw.sample(block, len(block)), []
    while left:
        size = draw.randint(1, GROUP)
        taken, left = left[:size], left[size:]
        others = [
            Asked("", ids(draw, draw.randint(8, min(longest, 1024))))
            for _ in range(draw.randint(2, COMPANY))
        ]
        mixed = draw.sample(taken + others[1:], len(taken) + len(others) - 1)
        found.append([others[0], *mixed])
    return found


def one_by_one(
    server: Server, block: Sequence[Asked], what: str, args: argparse.Namespace
) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for prompt in block:
        answers |= ask(server, [prompt], what, args)
    return answers


def ask(
    server: Server, group: Sequence[Asked], what: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One call of /generate for the group; answers by name, without the neighbours'."""
    params = [
        {
            "temperature": 0,
            "max_new_tokens": args.tokens,
            "ignore_eos": True,
            "custom_params": {"gate_columns": {what: one.name}} if one.name else {},
        }
        for one in group
    ]
    body = {
        "input_ids": [one.ids for one in group],
        "sampling_params": params,
        "return_logprob": True,
    }
    said = post(server, "/generate", body)
    return {one.name: answer for one, answer in zip(group, said, strict=True) if one.name}


def post(server: Server, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        server.base_url + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(server.base_url + path, timeout=60) as answer:
        return json.loads(answer.read())


def flush(server: Server) -> None:
    """Forget all cached prompts; raises HTTPError where the server is not idle within 5 s."""
    url = f"{server.base_url}/flush_cache?timeout=5"
    urllib.request.urlopen(urllib.request.Request(url, b""), timeout=60).read()


# -- what differs


def empty() -> dict[str, Any]:
    return {"of": 0, "cached": 0, "ungated": 0, "forwards": [], **{kind: [] for kind in KINDS}}


def compare(found: dict[str, Any], alone: dict[str, Any], answers: dict[str, Any]) -> None:
    """Add to `found`: the lengths whose answers are not as alone, and counts."""
    for name, answer in answers.items():
        kinds = differing(alone[name], answer)
        for kind in kinds:
            found[kind].append(int(name))
        found["of"] += 1
        found["cached"] += answer["meta_info"]["cached_tokens"]
        found["ungated"] += not answer["meta_info"].get("gate", {}).get("gated")
    for kind in KINDS:
        found[kind].sort()


def differing(alone: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    """Of KINDS; columns differ too where the server says nothing of them."""
    ours, theirs = ([*one["meta_info"]["output_token_logprobs"]] for one in (alone, answer))
    columns = answer["meta_info"].get("gate", {}).get("columns", {})
    distances = [columns.get("prompt", [[None]]), *columns.get("rows", [[[None]]])]
    checks = {
        "tokens": alone["output_ids"] == answer["output_ids"],
        "logprobs": [value for value, *_ in ours] == [value for value, *_ in theirs],
        "columns": all(n == 0 for part in distances for pair in part for n in pair),
    }
    return [kind for kind, same in checks.items() if not same]


def forwards(log: Path, start: int) -> list[tuple[int, int]]:
    """Requests and tokens of each prefill forward that the log names from byte `start` on."""
    time.sleep(0.2)  # the log's last lines
    with log.open("rb") as stream:
        stream.seek(start)
        text = stream.read().decode(errors="replace")
    return [(int(seqs), int(tokens)) for seqs, tokens in PREFILL.findall(text)]


def print_phases(phases: dict[str, Any]) -> None:
    print(f"    {'phase':15}{'of':>4}{'cached':>8}{'forwards':>9}{'most':>5}", *KINDS, "differ")
    for name, one in phases.items():
        most = max((seqs for seqs, _ in one["forwards"]), default=0)
        counts = [f"{kind} {len(one[kind])}" for kind in KINDS]
        print(
            f"    {name:15}{one['of']:>4}{one['cached']:>8}{len(one['forwards']):>9}{most:>5} ",
            *counts,
            f"ungated {one['ungated']}",
        )
        for kind in KINDS:
            if one[kind]:
                print(f"        {kind}:", *one[kind])
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
