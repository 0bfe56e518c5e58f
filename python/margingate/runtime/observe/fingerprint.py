"""One short hash of everything that a gated answer depends on besides its request.

Equal fingerprints promise equal answers to equal requests, as far as the guarantee goes. Different
ones promise nothing: what is in here may matter, not must. docs/limits.md lists it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

import margingate
from margingate.config import GateConfig
from margingate.core.rowclass import RowPlan
from margingate.runtime.attention import fixed_split
from margingate.runtime.compat.arguments import settings, settings_table
from margingate.runtime.compat.process import machine
from margingate.runtime.compat.process.ranks import gathered
from margingate.runtime.observe import weight_digest
from margingate.runtime.probe import startup
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.probe.measuring import cache
from margingate.runtime.probe.operators.unpacked import Unpacked
from margingate.runtime.verify.verifier import Verifier

logger = logging.getLogger(__name__)

DIGITS = 16
# Of the model's and the tokenizer's folder; weights are read from memory instead.
FILES = (
    "config.json",
    "*processor_config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.vocab",
    "*.bpe",
    "tekken.json",
    "params.json",
    "*.jinja",
    "chat_template.*",
    "additional_chat_templates/*",
    "*.py",
)
ARGUMENTS = settings_table.names(settings_table.ARITHMETIC, settings_table.COUNTED)
READ = ("chat_template", "completion_template", "decrypted_config_file")  # or a file's name
LIBRARIES = (  # what reads requests and writes answers; those that compute are in the probe's key
    *("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral_common", "numpy"),
    *("jinja2", "openai-harmony", "llguidance", "xgrammar", "outlines", "outlines_core", "lark"),
    *("interegular", "msgspec", "partial-json-parser", "pydantic", "pillow", "torchvision"),
)
OBSERVED = "policy observe guarantees nothing"
SIMULATED = "simulated verdicts guarantee nothing"
STALE = "the weights were updated; it is computed with the next request"
UPDATING = "the weights are being updated"
CROSSED = "the weights were updated while it was served"


class Fingerprint:
    """The hash of fixed parts and of the weights, which may be replaced in a running server."""

    def __init__(
        self, parts: dict[str, Any], weights_now: Callable[[], str], forwards: Callable[[], int]
    ) -> None:
        """Computes it.

        Args:
            parts: for JSON; a part that is None could not be told, and so there is no hash.
            weights_now: the digest of the weights in memory; may be a collective of all ranks.
            forwards: how many were launched so far.
        """
        self.parts = parts
        self._weights_now, self._forwards = weights_now, forwards
        self._generation = 0
        self._begun = forwards()  # forwards before those of this generation
        self._stale = True
        self._updating = False
        self._value = ""
        self._refresh()

    @property
    def generation(self) -> int:
        """Of the weights in memory: how often they may have been replaced between forwards."""
        return self._generation

    def weights_changed(self, *, updating: bool = False) -> bool:
        """The weights may be others now. Returns whether that is another generation.

        It is not where no forward was launched since the last change: nothing saw those weights,
        and the parts of one update count once.

        Args:
            updating: they may change further without a word, until this is called again.
        """
        self._stale, self._updating = True, updating
        seen = self._forwards() != self._begun
        self._begun = self._forwards()
        self._generation += seen
        return seen

    def admit(self) -> int:
        """Before a request's first column, on every rank alike: catch up. Returns the generation.

        Not at the update: that may be one of many, and memory may be gone between them.
        """
        if self._stale and not self._updating:
            self._refresh()
        return self._generation

    def of(self, seen: Iterable[int] = ()) -> dict[str, str | None]:
        """For the record of a request that saw these generations; none: for now."""
        crossed = any(generation != self._generation for generation in seen)
        because = CROSSED if crossed else self._because()
        if because:
            return {"fingerprint": None, "fingerprint_because": because}
        return {"fingerprint": self._value}

    def _because(self) -> str:
        """Why there is none; empty where there is one."""
        if self._stale:
            return self._never() or (UPDATING if self._updating else STALE)
        return self._never()

    def _never(self) -> str:
        unknown = [name for name, part in self.parts.items() if part is None]
        if unknown:
            return f"{', '.join(unknown)} could not be found"
        said = self.parts.get("guarantee")
        return str(said) if said in (OBSERVED, SIMULATED) else ""

    def _refresh(self) -> None:
        if because := self._never():
            self._stale = False
            logger.info("margingate: there is no fingerprint: %s.", because)
            return
        start = time.monotonic()
        self.parts["weights"] = self._weights_now()[:DIGITS]
        self._value, self._stale = _hash(self.parts), False
        seconds = time.monotonic() - start
        logger.info("margingate: fingerprint %s (weights read in %.1f s)", self._value, seconds)


def make(scheduler: Any, config: GateConfig, verifier: Verifier, prefill: Prefill) -> Fingerprint:
    """The fingerprint of a scheduler whose gate is about to come up."""
    runner = verifier.runner
    args = settings.view(scheduler.server_args)
    known = cache.identity(runner, (), 0)
    versions = known["versions"] | libraries()
    parts = {
        "files": files(args.model_path, args.tokenizer_path, args.revision),
        "arguments": arguments(args),
        "guarantee": guarantee(config),
        "plan": plan(config, verifier, prefill),
        "machine": machine.describe(scheduler.server_args)
        | {name: known[name] for name in ("units", "threads", "arithmetic", "environment")}
        | {"backend": known["attention"], "longest": scheduler.max_req_len},
        "versions": versions | {"margingate": margingate.__version__},
    }
    return Fingerprint(
        parts, lambda: _weights(scheduler, runner.model), lambda: int(scheduler.forward_ct)
    )


def libraries() -> dict[str, str | None]:
    """Versions of LIBRARIES, of Python and of the C library."""
    return {name: machine.version(name) for name in LIBRARIES} | machine.interpreter()


def files(model: str, tokenizer: str, revision: str | None) -> dict[str, str] | None:
    """Hashes of the small files that configure model and tokenizer; None where they are not found.

    Names are those of folders or, on Hugging Face's hub, of what is in its local cache.
    """
    found = {}
    for kind, name in {"model": model, "tokenizer": tokenizer}.items():
        folder = _folder(name, revision)
        if folder is None:
            return None
        named = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
        hashes = {str(path.relative_to(folder)): _hash(path.read_bytes()) for path in named}
        found[kind] = _hash(hashes)
    return found


def _folder(name: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a repository's name
        return None
    return Path(config).parent if isinstance(config, str) else None


def arguments(args: Any) -> dict[str, Any]:
    """ARGUMENTS by name, and what SGLang makes of others; files count by their text."""
    named = settings_table.values(args, ARGUMENTS)
    graphs = getattr(getattr(args, "cuda_graph_config", None), "prefill", None)  # as resolved
    named["prefill_graphs"] = str(graphs)
    named["conversation"] = _conversation(args)
    return named | {name: _text_of(named[name]) for name in READ}


def _conversation(args: Any) -> str | None:
    """The name of SGLang's own chat template that it takes for a model's path, if it takes one.

    It looks for words such as vicuna, janus or unlimited anywhere in the path, and then leaves the
    template of the model's folder.
    """
    from sglang.srt.parser.conversation import get_conv_template_by_model_path

    if args.chat_template or not args.model_path:
        return None
    name: str | None = get_conv_template_by_model_path(args.model_path)
    return name


def _text_of(value: str | None) -> str | None:
    try:
        return Path(value).read_text() if value and Path(value).is_file() else value
    except OSError:  # a template that is longer than a file's name can be
        return value


def guarantee(config: GateConfig) -> dict[str, Any] | str:
    """What decides which rows are settled unverified; with `exact`, none are."""
    if config.policy == "observe":
        return OBSERVED
    if config.simulates:
        return SIMULATED
    if config.guarantee == "exact":
        return {"guarantee": "exact"}
    names = ["guarantee", "policy", "threshold", "repair"]
    if config.router_threshold is not None:
        names.append("router_threshold")
    chosen = asdict(config)
    return {name: chosen[name] for name in names}


def plan(config: GateConfig, verifier: Verifier, prefill: Prefill) -> dict[str, Any]:
    """What is canonical: shapes of verify pass and prefill, and row counts of each operator."""
    graphs = [size for size in verifier.graph_sizes(1 << 20) if size >= verifier.rows]
    records = startup.records()
    kept: dict[str, Any] = {"limit": startup.largest_rows(verifier.device)}
    kept |= {
        found["name"]: RowPlan(*found["plan"]).bits()
        for found in records
        if found["plan"] and len({key for _, key in found["classes"]}) > 1
    }
    kept |= {
        f"{found['name']}, in prefills": RowPlan(*found["prefill_plan"]).bits()
        for found in records
        if found["prefill_plan"]
    }
    return {
        "rows": config.rows,
        "prefill": prefill.record() if prefill.together else {"chunk": config.prefill_chunk},
        "graph": min(graphs, default=None),  # rows of the graph that a verify pass replays
        "split": fixed_split.split_of(verifier.backend),
        "kept": kept if config.invariant else None,
        "unpacked": [each["name"] for each in records if each["kind"] == Unpacked.kind],
    }


def _weights(scheduler: Any, model: Any) -> str:
    """Digest of the weights of all ranks, each of which holds a part of them.

    Raises on all ranks what it raises on one: the others wait for its part.
    """
    own, error = "", None
    try:
        own = weight_digest.digest(model)
    except Exception as raised:
        error = raised
    digests = gathered(scheduler, own)
    if "" in digests:
        raise error or RuntimeError(f"rank {digests.index('')} could not read its weights")
    return digests[0] if len(digests) == 1 else _hash(digests)


def _hash(value: Any) -> str:
    """Of bytes as they are, of anything else as JSON."""
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(value if isinstance(value, bytes) else text).hexdigest()[:DIGITS]
