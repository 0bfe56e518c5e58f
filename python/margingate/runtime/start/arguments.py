"""The flag and its options in SGLang's arguments: command line, config file and `sglang.Engine`."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from margingate.config import GateConfig, GateError, load_threshold, make_config, option_name
from margingate.runtime.compat import release
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.arguments.server_args import ATTRIBUTE, RADIX_BACKEND, gate_config
from margingate.runtime.compat.compute import mxfp4
from margingate.runtime.compat.model.architectures import has_sinks
from margingate.runtime.compat.process import machine
from margingate.runtime.observe import event_socket
from margingate.runtime.start import pools, refusals, refused_models

logger = logging.getLogger(__name__)

_PREFIX = "gate_"
_FROM_COMMAND_LINE = "_margingate_ends"  # on ServerArgs: a refusal is one line and exit status 1

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
    """AROUND ServerArgs.from_cli_args: attach our values, which no field of SGLang's takes.

    From here on a refusal ends the process with its sentence, and without a traceback.
    """
    try:
        options = pop_options(dict(vars(args)))
        made = original(cls, args)
        if options.pop("enabled"):
            attach(made, options)
            setattr(made, _FROM_COMMAND_LINE, True)
            _confirm_attached(made)
        return made
    except GateError as error:
        sys.exit(f"margingate: {error}")


def pop_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take the gate's keys out of `values`; raises GateError for options without the flag."""
    wanted = bool(values.pop("deterministic_gate", False))
    names = [name for name in values if name.startswith(_PREFIX)]
    options = {name.removeprefix(_PREFIX): values.pop(name) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not wanted:
        name = option_name(next(iter(options)))
        raise GateError(f"{name} is set without --deterministic-gate: add the flag, or drop it.")
    return {"enabled": wanted, **options}


def attach(server_args: Any, options: dict[str, Any]) -> None:
    """Give unresolved arguments the gate's settings, validated; raises GateError.

    A copy of them that leaves the settings out has the name of the gate's tree, and is refused. The
    tree's factory knows where there is to be none.
    """
    release.check_version()
    given = settings.view(server_args)
    model = model_identity(given.model_path, options)
    setattr(server_args, ATTRIBUTE, make_config(options, model))
    if given.radix_cache_backend is None:
        settings.choose(server_args, radix_cache_backend=RADIX_BACKEND)


@contextmanager
def ending(server_args: Any) -> Iterator[None]:
    """What is refused here of a command line ends the process with one line; else it raises."""
    try:
        yield
    except GateError as error:
        if getattr(server_args, _FROM_COMMAND_LINE, False):
            sys.exit(f"margingate: {error}")
        raise


def resolve(original: Any, self: Any) -> None:
    """AROUND ServerArgs.resolve_once: set what the gate needs, refuse what it cannot serve."""
    config = gate_config(self)
    if config is None:
        _refuse_copy(self)
        original(self)
        return
    with ending(self):
        if settings.is_resolved(self):
            confirm_settings(self)
            return
        config = _prepare(self, config)
        original(self)
        config = _with_device_defaults(config, settings.view(self))
        _refuse_resolved(self, config)
        setattr(self, ATTRIBUTE, config)  # last: settings without rows were not checked


def _prepare(server_args: Any, config: GateConfig) -> GateConfig:
    """Choose what is not given, before SGLang does; the config with its choice of overlap."""
    given = settings.view(server_args)
    refusals.refuse_server(given)  # first as given, before SGLang's own checks speak
    if config.overlap == "auto":
        config = replace(config, overlap=_best_overlap(given, config))
    if config.overlap == "off" and not given.disable_overlap_schedule:
        settings.choose(server_args, disable_overlap_schedule=True)
        logger.info("margingate sets --disable-overlap-schedule: it verifies between two steps.")
    if attention := _attention(given, config):
        settings.choose(server_args, attention_backend=attention)
    # SGLang would choose each of these itself for some models; asked for, they are refused above.
    settings.choose(
        server_args,
        enforce_disable_flashinfer_allreduce_fusion=True,
        boundary_reduction="ar",
        enable_lean_attention=False,
    )
    pools.choose(server_args, config)
    if given.moe_runner_backend == "auto" and has_sinks(given):
        settings.choose(server_args, moe_runner_backend=mxfp4.runner(given))
    settings.choose(server_args, radix_cache_backend=RADIX_BACKEND)
    return config


def _refuse_copy(server_args: Any) -> None:
    """Raises GateError for arguments without the gate's settings that ask for its tree.

    As they were given: a server without the gate may be one of any release of SGLang.
    """
    if getattr(server_args, "radix_cache_backend", None) == RADIX_BACKEND:
        raise GateError(
            f"radix_cache_backend is {RADIX_BACKEND}, but these arguments carry no settings of the "
            "gate, as a copy by copy.copy or msgspec.structs.replace leaves them out: use "
            "copy.deepcopy, or make them anew with --deterministic-gate."
        )


def _refuse_resolved(server_args: Any, config: GateConfig) -> None:
    """Check what SGLang made of the arguments. Raises GateError."""
    args = settings.view(server_args)
    refusals.refuse_server(args)
    refusals.refuse_chunks(args, config)
    refusals.refuse_audit(args, config)
    refusals.refuse_replicas(args, config)
    refusals.refuse_confidential(args, config)
    refusals.refuse_simulation(args, config)
    refusals.refuse_grammars(args)
    event_socket.refuse_endpoint(args, config)
    if args.model_path.lower() not in ("none", "dummy"):  # SGLang resolves nothing for these
        refusals.refuse_fast_path(server_args, config)
        refused_models.refuse_column_type(server_args)
        model = settings.model_config(server_args)
        refused_models.refuse_model(model)
        refusals.refuse_experts(args, config, model)
        if config.calibration is not None:
            load_threshold(config.calibration, machine.describe(server_args), part="machine")


def _confirm_attached(server_args: Any) -> None:
    if gate_config(server_args) is None:
        raise _without_hook("ServerArgs.from_cli_args")


def confirm_settings(server_args: Any) -> None:
    """Our hooks on ServerArgs must have run: one that is in place may still never be called.

    Raises:
        GateError: the flag was given, and these arguments carry no settings, or unchecked ones.
    """
    _confirm_attached(server_args)
    config = gate_config(server_args)
    if config is None or config.rows is None:
        raise _without_hook("ServerArgs.resolve_once")


def _without_hook(target: str) -> GateError:
    return GateError(
        f"--deterministic-gate was given, but SGLang made its arguments without the hook on "
        f"{target}: reinstall sglang=={release.SGLANG_VERSION}, or restrict the plugins with "
        "SGLANG_PLUGINS."
    )


def _best_overlap(args: Any, config: GateConfig) -> str:
    """On a CPU a step and its results share the cores, so nothing is gained."""
    import torch

    on_gpu = args.device in (None, "cuda") and torch.cuda.is_available()
    return "on" if on_gpu and not config.study else "off"


def _attention(args: Any, config: GateConfig) -> str | None:
    """On CUDA, where nothing is chosen: the backend that is the fastest on this path."""
    import torch
    from sglang.srt.utils import is_flashinfer_available

    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    chosen = any(getattr(args, name) is not None for name in names)
    on_gpu = args.device in (None, "cuda") and torch.cuda.is_available()
    wanted = config.policy != "observe" or config.study  # a study is for gated servers
    if not wanted or chosen or not on_gpu:
        return None
    if config.invariant or not is_flashinfer_available() or has_sinks(args):
        logger.info("margingate sets --attention-backend triton, inside which its kernels run.")
        return "triton"
    logger.info("margingate sets --attention-backend flashinfer, with decode as SGLang's own.")
    return "flashinfer"  # its kernels run beside it


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
    """On the stock path the verifier has a graph of its own: larger, since spans fill it.

    A forward has no more rows than the server runs requests.
    """
    most = args.max_running_requests or STOCK_PATH_ROWS
    if not config.invariant:
        return min(STOCK_PATH_ROWS, most)
    return min(DEFAULTS["rows"], most, _largest_graph(args) or most)


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
