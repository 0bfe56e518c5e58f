"""Ways into SGLang's arguments, and what tests of refusals say of them."""

import argparse
import logging
import os
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from sentences import sentence

from margingate.config import GateConfig
from margingate.harness.embedded_model import ensure_model

GATE = "--deterministic-gate"
OPTIONS = {"--gate-" + option.name.replace("_", "-") for option in fields(GateConfig)}


@pytest.fixture(scope="module")
def folder() -> str:
    return str(ensure_model("smollm2"))


@pytest.fixture(scope="module", autouse=True)
def server_args_class() -> Any:
    """ServerArgs with the plugin loaded into this process, as SGLang's entry points load it."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    return ServerArgs


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """SGLang's argument handling sets variables and replaces the root logger's handlers."""
    environment, handlers = dict(os.environ), list(logging.root.handlers)
    level = logging.root.level
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def prepare(folder):
    """Resolve a command line as SGLang's launcher does."""
    from sglang.srt.server_args import prepare_server_args

    def prepared(*argv: str, model: str = folder) -> Any:
        made = prepare_server_args(["--model-path", model, "--device", "cpu", *argv])
        made.resolve_once()
        return made

    return prepared


@pytest.fixture
def make(server_args_class):
    """Make and resolve ServerArgs as an Engine does that is given these keywords."""
    from sglang.srt.entrypoints.engine import Engine

    def made(**keywords: Any) -> Any:
        server_args = Engine.server_args_class(**keywords)
        assert isinstance(server_args, server_args_class)
        server_args.resolve_once()
        return server_args

    return made


@pytest.fixture
def parser(server_args_class) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    server_args_class.add_cli_args(parser)
    return parser


def exits(prepare: Any, *argv: str, **keywords: str) -> str:
    """The line that ends the process: Python prints it to stderr and exits with 1.

    test_hooked_processes.py sees a whole process do so.
    """
    with pytest.raises(SystemExit) as caught:
        prepare(*argv, **keywords)
    text = caught.value.code
    assert isinstance(text, str)
    assert text.startswith("margingate: ")
    assert sentence(text)
    return text.removeprefix("margingate: ")


def model_config(text: dict[str, Any] | None = None, **changes: Any) -> SimpleNamespace:
    """A stand-in for SGLang's ModelConfig of a dense decoder."""
    values = {
        "hf_text_config": SimpleNamespace(**(text or {})),
        "hf_config": SimpleNamespace(
            get_text_config=lambda: None, architectures=["OneForCausalLM"]
        ),
        "is_generation": True,
        "attention_arch": SimpleNamespace(name="MHA"),
        "is_hybrid_swa": False,
        "is_hybrid_swa_compress": False,
        "has_attention_sinks": False,
        "is_encoder_decoder": False,
        "is_multimodal": False,
        "is_draft_model": False,
        "linear_attn_registry_result": None,
        "quantization": None,
    }
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**{**values, **changes})


def backends(device: str, decode: str) -> SimpleNamespace:
    return SimpleNamespace(
        device=device,
        attention_backend="triton",
        prefill_attention_backend=None,
        decode_attention_backend=decode,
    )
