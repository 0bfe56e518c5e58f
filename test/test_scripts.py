"""Examples and benchmark scripts where something is missing: one sentence, no traceback.

And what CI runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import workers

from benchmark.kernels import row_counts
from margingate.harness.defaults import PROMPTS

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9"
TURNS = ("--base-url", NOWHERE, "--conversations", "2", "--prompts", str(PROMPTS))
HOLES = ("--model", "tiny", "--out", "x")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, as one would start it in the checkout."""
    command = (sys.executable, *command)
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, cwd=ROOT
    )


def run_benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", f"benchmark.{name}", *arguments)


EXAMPLES = ("openai_client", "evaluation", "frontend_program", "trainer")
LACKING = (  # a benchmark, its arguments, and what it says
    ("bench.serving_table", ["nofile"], "nofile cannot be read (No such file or directory): name"),
    (
        "bench.serving_table",
        [__file__],
        "holds no results of serving.py: name a file that it wrote",
    ),
    ("bench.serving_table", [], "the following arguments are required: file"),
    (
        "speed.serving",
        ["--model", "no", "--out", "x"],
        "--model: no/config.json cannot be read (No",
    ),
    (
        "readme_table",
        ["--out", "{tmp}", "--shape", "no", "--parts"],
        "--shape no/config.json cannot be read (No such file or directory): give a folder",
    ),
    ("sameness.turns", [*TURNS, "--model", "{model}"], f"{NOWHERE} does not answer ("),
    (
        "sameness.turns",
        [*TURNS, "--model", str(ROOT)],
        f"--model {ROOT} has no tokenizer that loads (",
    ),
    (
        "sameness.turns",
        [*TURNS, "--model", "no", "--turns", "13"],
        "have 24 lines, and 2 conversations",
    ),
    (
        "sameness.turns",
        [*TURNS, "/none", "--model", "no"],
        "--prompts /none cannot be read (No such",
    ),
    (
        "sameness.holes",
        [*HOLES, "--lengths", "7-x"],
        "--lengths 7-x: give numbers or ranges as 224-272.",
    ),
    (
        "sameness.holes",
        [*HOLES, "--random-counts", "9", "--max", "8"],
        "give --max or less, 8.",
    ),
)
# Scripts one after the other, so that torch is imported once: the status of each, and its stderr.
ONE_AFTER_THE_OTHER = """if True:
    import contextlib, io, json, runpy, sys
    ended = []
    for script, *arguments in json.loads(sys.argv[1]):
        sys.argv, status, said = [script, *arguments], 0, io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                status = end.code
        if isinstance(status, str):  # as Python does
            status, _ = 1, said.write(status)
        ended.append([status, said.getvalue()])
    print(json.dumps(ended))
    """


@pytest.fixture(scope="module")
def ended(model, tmp_path_factory) -> list[tuple[int, str]]:
    """Of EXAMPLES without a server, and then of LACKING."""
    places = {"{tmp}": str(tmp_path_factory.mktemp("out")), "{model}": str(model)}
    calls = [[f"examples/{name}.py", "--base-url", NOWHERE] for name in EXAMPLES]
    for name, arguments, _ in LACKING:
        script = f"benchmark/{name.replace('.', '/')}.py"
        calls.append([script, *(places.get(each, each) for each in arguments)])
    done = run("-c", ONE_AFTER_THE_OTHER, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=EXAMPLES)
def test_an_example_without_a_server_is_one_sentence_and_status_2(ended, number):
    status, error = ended[number]
    said = error.splitlines()[-1]
    assert status == 2, error
    assert "server answers at http://127.0.0.1:9" in said
    assert said.endswith("--deterministic-gate, or name another with --base-url.")


@pytest.mark.parametrize("number", range(len(LACKING)))
def test_a_benchmark_that_lacks_something_is_one_sentence(ended, number):
    status, error = ended[len(EXAMPLES) + number]
    assert status in (1, 2), error
    assert LACKING[number][2] in error.splitlines()[-1]


SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT / "benchmark").with_suffix("").parts)
    for pattern in ("*.py", "*/*.py")
    for path in (ROOT / "benchmark").glob(pattern)
    if 'if __name__ == "__main__"' in path.read_text()
)


def test_each_benchmark_says_how_it_is_used_and_has_a_line_in_the_readme():
    """All at once, in one process: torch is imported once, and no GPU is needed for it."""
    code = """if True:
        import contextlib, importlib, io, sys
        for name in sys.argv[1:]:
            module = importlib.import_module(f"benchmark.{name}")
            assert f"python -m benchmark.{name} " in module.__doc__, f"{name} does not say how"
            sys.argv, said = [name, "--help"], io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
                module.main()
            assert said.getvalue().startswith("usage: "), f"{name} has no --help"
        """
    done = run("-c", code, *SCRIPTS)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "benchmark/README.md").read_text(), re.M)
    assert sorted(listed) == SCRIPTS


def test_each_run_has_a_line_in_the_index_of_results():
    """And each page that cites a run is named beside it."""
    folder = ROOT / "benchmark/results"
    lines = (folder / "README.md").read_text().splitlines()
    cited = {match[1]: line for line in lines if (match := re.match(r"\| \[([\w-]+)\]", line))}
    assert sorted(cited) == sorted(path.name for path in folder.iterdir() if path.is_dir())
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in set(re.findall(r"results/([\w-]+)", page.read_text())):
            assert page.name in cited[name], f"{page.name} cites {name}"


def test_an_engines_process_is_the_module_that_was_started(tmp_path):
    """speed.decode_step starts itself once more for each engine: here one that cannot start."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64, "vocab_size": 8}')
    options = ("--modes", "stock", "--kv-tokens", "64", "--together", "1", "--budget-s", "1")
    folder = ("--model", str(tmp_path), "--out", str(tmp_path / "steps.json"))
    done = run_benchmark("speed.decode_step", *folder, *options)
    assert "stock did not start" in done.stdout, done.stderr
    log = (tmp_path / "steps.stock.log").read_text()
    assert "benchmark/speed/decode_step.py" in log and "engines.start" in log, log


def test_the_table_of_a_serving_run_is_printed(tmp_path):
    figures = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
    found = dict.fromkeys((*figures, "p99_tpot_ms"), 2.0)
    run_of = {"mix": "1k-1k", "rate": "inf", "mode": "stock", "completed": 4}
    file = tmp_path / "serving.json"
    file.write_text(json.dumps({"results": [{**run_of, **found, "ratios": dict.fromkeys(found)}]}))
    done = run_benchmark("bench.serving_table", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:4] == ["1k-1k@inf", "x4", "stock", "2"]


def test_row_counts_finds_a_hole_between_counts_of_one_class():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    other = rows.clone()
    other[1, 0] = torch.nextafter(other[1, 0], torch.tensor(9.0, dtype=torch.bfloat16))
    bits = [row_counts.row_hashes(out) for out in (other, rows, rows, other, other, rows)]
    counts, classes = [8, 16, 24, 25, 26, 32], row_counts.label(torch.stack(bits))
    assert row_counts.runs(counts, classes) == [(0, 8, 8), (1, 16, 24), (0, 25, 26), (1, 32, 32)]
    assert (25, 26) in row_counts.holes(counts, classes)


AVX2 = "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2"


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("fpu avx2 avx512f avx512bw avx512vl avx512dq avx512_bf16 amx_bf16", [AVX2]),
        ("avx512dq avx2 avx512bw avx512vl", [AVX2]),
        ("avx2 avx512f", []),
        ("sse4_2 avx2", []),
        (None, []),
    ],
)
def test_ci_imitates_the_kinds_of_cpu_that_are_less_than_its_own(tmp_path, flags, kinds):
    file = tmp_path / "cpuinfo"
    file.write_text("Features : asimd\n" if flags is None else f"model : x\nflags\t\t: {flags}\n")
    command = [str(ROOT / ".ci/other_cpus"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == kinds


MADE = """mkdir -p .venv/bin
for name in pytest ruff mypy; do
  echo 'echo "ran $(basename "$0") $* [$ONEDNN_MAX_CPU_ISA]"' > .venv/bin/$name
  chmod +x .venv/bin/$name
done"""


def test_each_module_that_starts_servers_has_a_place_in_the_order():
    """Without one it would go last, and a worker be left alone with it."""
    modules = {path.name for path in (ROOT / "test").glob("test_server_*.py")}
    assert modules <= set(workers.PLACES)


def test_ci_runs_the_readmes_commands_the_linters_some_modules_again_and_the_older(tmp_path):
    """In a repository whose commands only say that they ran; a stage that fails is its status."""
    repo, folder = tmp_path / "repo", tmp_path / "tmp"
    shutil.copytree(ROOT / ".ci", repo / ".ci")
    (repo / ".ci/older").write_text("#!/bin/sh\necho ran older\n")
    folder.mkdir()
    blocks = {"demo": "echo ran demo", "test": MADE}
    text = [f"<!-- ci:{name} -->\n```\n{block}\n```\n" for name, block in blocks.items()]
    (repo / "README.md").write_text("\n".join(text))
    env = {**os.environ, "TMPDIR": str(folder), "ONEDNN_MAX_CPU_ISA": ""}

    def ci() -> subprocess.CompletedProcess[str]:
        for command in (["init", "-q"], ["add", "-A"]):
            subprocess.run(["git", *command], cwd=repo, check=True, timeout=300)
        command = [str(repo / ".ci/run")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=900, env=env
        )
        assert not list(tmp_path.glob("*/margingate-ci*")), "it leaves nothing"
        return done

    done = ci()
    kinds = subprocess.check_output([str(ROOT / ".ci/other_cpus")], text=True, timeout=300)
    names = [kind.split()[0].partition("=")[2] for kind in kinds.splitlines()]
    *ran, last = (line[4:] for line in done.stdout.splitlines() if line.startswith("ran "))
    assert last == "older", done.stderr
    assert done.returncode == 0 and done.stdout.count("== passed") == 1, done.stderr
    assert ran[:4] == ["demo", "ruff check []", "ruff format --check []", "mypy  []"]
    assert [line.partition("[")[2] for line in ran[4:]] == [f"{name}]" for name in names]
    for place, line in enumerate(ran[4:]):
        listed, _, chosen = line.partition(" [")[0].partition(" -k ")
        modules = listed.split()[1:]
        assert modules and bool(chosen) == (place > 0)
        texts = [(ROOT / name).read_text() for name in modules]
        for word in chosen.split(" or ") if chosen else ():
            assert any(f"def test_{word}" in text for text in texts), word
    (repo / ".ci/other_cpus").write_text("#!/bin/sh\nexit 7\n")
    done = ci()
    assert done.returncode == 7 and "== passed" not in done.stdout
