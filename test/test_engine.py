"""`sglang.Engine(deterministic_gate=True)`, in a program of its own as a user would write it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import STOCK_PATH, TOKENS

from margingate.servers import CPU_ENV, machine_args

ENGINE = """
import json, sys
import sglang

if __name__ == "__main__":
    ask = json.load(sys.stdin)
    engine = sglang.Engine(**ask["engine"], deterministic_gate=True, gate_threshold=0.5)
    call = lambda ids: engine.generate(input_ids=ids, sampling_params=ask["params"])
    replies = [*map(call, ask["ids"]), *call(ask["ids"])]
    print("REPLIES", json.dumps([[r["output_ids"], r["meta_info"]["gate"]] for r in replies]))
    engine.shutdown()
"""


def test_the_engine_alone_and_in_a_batch(model, prompts, tmp_path):
    options = iter((*machine_args(), *STOCK_PATH, "--model-path", str(model)))
    keywords = {name[2:].replace("-", "_"): value for name, value in zip(options, options)}
    for name, kind in (("mem_fraction_static", float), ("max_total_tokens", int)):
        keywords[name] = kind(keywords[name])
    ask = {
        "engine": keywords,
        "params": {"temperature": 0, "max_new_tokens": TOKENS},
        "ids": [prompt.input_ids for prompt in prompts[:5]],
    }
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        input=json.dumps(ask),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **CPU_ENV},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPLIES ")]
    assert lines, done.stderr[-3000:]
    tokens, gates = zip(*json.loads(lines[0].removeprefix("REPLIES ")))
    assert len(tokens) == 10 and tokens[:5] == tokens[5:]
    assert all(gate["gated"] for gate in gates)
    for count in ("flagged", "verified"):
        assert sum(gate[count] for gate in gates) > 0
