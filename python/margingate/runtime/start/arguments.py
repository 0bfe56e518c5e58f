"""The flag and its options in SGLang's arguments: command line, config file and `sglang.Engine`."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from margingate.config import GateConfig, GateError, load_threshold, make_config, option_name
from margingate.runtime.compat import machine
from margingate.runtime.compat.server_args import ATTRIBUTE, RADIX_BACKEND, gate_config
from margingate.runtime.hooks import registry
from margingate.runtime.observe import event_socket
from margingate.runtime.start import refusals, refused_models

logger = logging.getLogger(__name__)

_PREFIX = "gate_"
_pending: ContextVar[dict[str, Any] | None] = ContextVar("margingate_pending", default=None)
_wanted: ContextVar[bool] = ContextVar("margingate_wanted", default=False)  # by Engine(...)

DEVICE_DEFAULTS = {"cpu": {"rows": 16, "prefill_chunk": 64}}
DEFAULTS = {"rows": 64, "prefill_chunk": 512}
STOCK_PATH_ROWS = 128  # of a verify pass on a GPU: more cost more a pass, and hold more requests


def add_options(_result: Any, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args: a group of our own, made from the dataclass."""
    group = parser.add_argument_group(
        "deterministic gate (margingate)",
        "Answers that do not depend on what else is in the batch.",
    )
    group.add_argument(
        "--deterministic-gate",
        action="store_true",
        help="Compute decode steps so that a row's bits do not depend on the batch, and where that "
        "cannot be had, verify rows by their margin and repair what flipped.",
    )
    for option in fields(GateConfig):
        flag = option_name(option.name)
        text = option.metadata["help"]
        if option.default is False:
            group.add_argument(flag, action="store_true", default=None, help=text)
            continue
        shown = "" if option.default is None else f" Default: {option.default}."
        # Choices are checked by GateConfig, so that every way in refuses with the same sentence.
        choices = option.metadata.get("choices", ())
        metavar = "{" + ",".join(choices) + "}" if choices else option.metadata["metavar"]
        group.add_argument(flag, metavar=metavar, help=text + shown)


def from_command_line(original: Any, cls: type, args: argparse.Namespace) -> Any:
    """AROUND ServerArgs.from_cli_args: keep our values for the __init__ that runs inside."""
    try:
        options = _pop_options(dict(vars(args)))
        token = _pending.set(options)
        try:
            made = original(cls, args)
        finally:
            _pending.reset(token)
        if options["enabled"]:
            confirm_settings(made)
        return made
    except GateError as error:
        sys.exit(f"margingate: {error}")


def _pop_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take the gate's keys out of `values`; raises GateError for options without the flag."""
    wanted = bool(values.pop("deterministic_gate", False))
    names = [name for name in values if name.startswith(_PREFIX)]
    options = {name.removeprefix(_PREFIX): values.pop(name) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not wanted:
        name = option_name(next(iter(options)))
        raise GateError(f"{name} is set without --deterministic-gate: add the flag, or drop it.")
    return {"enabled": wanted, **options}


def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ServerArgs.__init__: attach the validated config before SGLang resolves anything."""
    options = dict(_pending.get() or _pop_options(kwargs))
    if options.pop("enabled"):
        registry.check_version()
        model = model_identity(kwargs.get("model_path") or (args[0] if args else ""), options)
        object.__setattr__(self, ATTRIBUTE, make_config(options, model))
    original(self, *args, **kwargs)


def post_init(original: Any, self: Any) -> None:
    """AROUND ServerArgs.__post_init__: set what the gate needs, refuse what it cannot serve."""
    config = gate_config(self)
    if config is None:
        original(self)
        return
    refusals.refuse_server(self)  # first as given, before SGLang's own checks speak
    if config.overlap == "auto":
        config = replace(config, overlap=_best_overlap(self, config))
    if config.overlap == "off" and not self.disable_overlap_schedule:
        self.disable_overlap_schedule = True
        logger.info("margingate sets --disable-overlap-schedule: it verifies between two steps.")
    _choose_attention(self, config)
    # SGLang chooses a fused all-reduce by itself for some models; asked for, it is refused above.
    self.enforce_disable_flashinfer_allreduce_fusion = True
    if not self.disable_radix_cache:
        self.radix_cache_backend = RADIX_BACKEND
    original(self)
    config = _with_device_defaults(config, self)
    object.__setattr__(self, ATTRIBUTE, config)
    refusals.refuse_server(self)
    refusals.refuse_chunks(self, config)
    refusals.refuse_audit(self, config)
    refusals.refuse_simulation(self, config)
    refusals.refuse_grammars(self)
    event_socket.refuse_endpoint(self, config)
    if self.model_path.lower() not in ("none", "dummy"):  # SGLang resolves nothing for these
        refusals.refuse_fast_path(self, config)
        refused_models.refuse_column_type(self)
        refused_models.refuse_model(self.get_model_config(), observes=config.policy == "observe")
        if config.calibration is not None:
            load_threshold(config.calibration, machine.describe(self), part="machine")


def confirm_settings(server_args: Any) -> None:
    """Our hooks on ServerArgs must have run: one that is in place may still never be called.

    Raises:
        GateError: the flag was given, and these arguments carry no settings, or unchecked ones.
    """
    config = gate_config(server_args)
    if config is None or config.rows is None:
        step = "__init__" if config is None else "__post_init__"
        raise GateError(
            f"--deterministic-gate was given, but SGLang made its arguments without the hook on "
            f"ServerArgs.{step}: reinstall sglang=={registry.SGLANG_VERSION}, or restrict the "
            "plugins with SGLANG_PLUGINS."
        )


def engine_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND Engine.__init__: with the flag, nothing is launched before the settings are there."""
    token = _wanted.set(bool(kwargs.get("deterministic_gate", False)))
    try:
        original(self, *args, **kwargs)
    finally:
        _wanted.reset(token)


def gate_to_launch(server_args: Any) -> GateConfig | None:
    """The gate's settings of a server that is about to be launched, or None where it has none.

    Raises:
        GateError: as `confirm_settings`, where the Engine being made was given the flag.
    """
    if _wanted.get():
        confirm_settings(server_args)
    return gate_config(server_args)


def _best_overlap(args: Any, config: GateConfig) -> str:
    """On a CPU a step and its results share the cores, so nothing is gained."""
    import torch

    on_gpu = args.device in (None, "cuda") and torch.cuda.is_available()
    return "on" if on_gpu and not config.study else "off"


def _choose_attention(args: Any, config: GateConfig) -> None:
    """On CUDA, where nothing is chosen: the backend that is the fastest on this path."""
    import torch
    from sglang.srt.utils import is_flashinfer_available

    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    chosen = any(getattr(args, name) is not None for name in names)
    on_gpu = args.device in (None, "cuda") and torch.cuda.is_available()
    wanted = config.policy != "observe" or config.study  # a study is for gated servers
    if not wanted or chosen or not on_gpu:
        return
    if config.invariant or not is_flashinfer_available():
        args.attention_backend = "triton"
        logger.info("margingate sets --attention-backend triton, inside which its kernels run.")
    else:  # its kernels run beside it
        args.attention_backend = "flashinfer"
        logger.info("margingate sets --attention-backend flashinfer, with decode as SGLang's own.")


def _with_device_defaults(config: GateConfig, args: Any) -> GateConfig:
    """Rows and chunk where none are given: the device's, or what SGLang has room for."""
    defaults = DEVICE_DEFAULTS.get(args.device, DEFAULTS)
    rows = defaults["rows"]
    if args.device != "cpu":
        rows = _rows_on_a_gpu(config, args)
    chunk = args.chunked_prefill_size or -1
    most = chunk if chunk > 0 else defaults["prefill_chunk"]
    return replace(
        config,
        rows=config.rows or rows,
        prefill_chunk=config.prefill_chunk or min(defaults["prefill_chunk"], most),
    )


def _rows_on_a_gpu(config: GateConfig, args: Any) -> int:
    """On the stock path the verifier has a graph of its own: larger, since spans fill it."""
    if not config.invariant:
        return min(STOCK_PATH_ROWS, args.max_running_requests or STOCK_PATH_ROWS)
    return min(DEFAULTS["rows"], _largest_graph(args) or DEFAULTS["rows"])


def _largest_graph(args: Any) -> int | None:
    """Rows of the largest decode graph; None where there are none."""
    graphs = getattr(args.cuda_graph_config, "decode", None)
    if graphs is None or graphs.backend == "disabled":
        return None
    largest: int | None = max(graphs.bs) if graphs.bs else graphs.max_bs
    return largest


def model_identity(model_path: str, options: dict[str, Any]) -> dict[str, str]:
    """What a calibration file must match: the hash of the model's config.json.

    Read only where a calibration is asked for; raises GateError when it cannot be.
    """
    if options.get("threshold") != "auto":
        return {}
    path = Path(model_path) / "config.json"
    try:
        return {"config_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError:
        raise GateError(
            f"--gate-threshold auto compares the calibration with {path}, which cannot be read: "
            "give --model-path a local folder, or the threshold as a number."
        ) from None
