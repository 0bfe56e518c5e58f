"""What the gate cannot serve: settings of the server, of the environment, and of both together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from margingate.config import GateConfig, GateError
from margingate.runtime.compat import release
from margingate.runtime.compat.arguments import settings, settings_table
from margingate.runtime.compat.compute import mxfp4, quantization
from margingate.runtime.compat.process import machine
from margingate.runtime.start.refused_settings import SERVER_REFUSALS

_OFF = ("0", "false", "no", "n")  # as SGLang reads them


class Variable(NamedTuple):
    """An environment variable of SGLang that cannot be combined with the gate."""

    does: str  # stands behind "which"
    refused: Callable[[str], bool]  # by its value, which is not empty


def _is_on(value: str) -> bool:
    return not _is_off(value)


def _is_off(value: str) -> bool:
    return value.lower() in _OFF


def _is_set(_value: str) -> bool:
    return True


VARIABLES = {
    "SGLANG_RUST_SERVER": Variable("replaces parts that it patches", _is_on),
    "SGLANG_ENABLE_DELAY_SAMPLE": Variable("replaces parts that it patches", _is_on),
    # SGLang looks for them in its batches, and ends the scheduler.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": Variable(
        "takes slots of withheld requests to be lost", _is_on
    ),
    # In decode steps alone: a verify pass would see them.
    "SGLANG_SANITIZE_NAN_LOGITS": Variable("makes numbers of logits that are none", _is_on),
    "SGLANG_MOE_CONFIG_DIR": Variable("names files that choose the kernels of experts", _is_set),
    # msgspec's decoder raises in the scheduler then.
    "SGLANG_USE_PICKLE_IPC": Variable(
        "lets a request with nested custom_params end the scheduler", _is_off
    ),
}


def refuse_server(args: Any) -> None:
    """Check resolved server arguments. Raises GateError with one sentence."""
    for refusal in SERVER_REFUSALS:
        if refusal.applies(args):
            raise GateError(
                f"--deterministic-gate does not work with {refusal.option}, because "
                f"{refusal.because}: {refusal.instead}."
            )
    for name in settings_table.unseen(args):
        raise GateError(
            f"--deterministic-gate does not work with --{name.replace('_', '-')}, which nobody has "
            f"looked at in SGLang {release.SGLANG_VERSION}: leave it at its default."
        )
    for name, variable in VARIABLES.items():
        value = os.environ.get(name, "")
        if value and variable.refused(value):
            raise GateError(
                f"--deterministic-gate does not work with {name}={value}, which {variable.does}: "
                "unset it."
            )


def refuse_chunks(args: Any, config: GateConfig) -> None:
    """The prefill grid must fit into what one prefill forward may hold. Raises GateError."""
    size, chunk = args.chunked_prefill_size, config.prefill_chunk
    if size is not None and size > 0 and chunk is not None and chunk > size:
        raise GateError(
            f"--gate-prefill-chunk is {chunk}, but --chunked-prefill-size lets a forward hold "
            f"only {size} tokens: lower the first or raise the second."
        )


def refuse_experts(args: Any, config: GateConfig, model: Any) -> None:
    """Where the experts of tokens cannot be returned. `model`: SGLang's ModelConfig.

    Raises GateError.
    """
    if not args.enable_return_routed_experts:
        return
    routes = getattr(model.hf_text_config, "num_experts_per_tok", None)
    if not (routes and quantization.has_experts(model)):
        raise GateError(
            "--enable-return-routed-experts is for mixtures of experts, but this model's "
            "configuration names no experts, or no num_experts_per_tok: drop the option."
        )
    if mxfp4.is_served(model):
        raise GateError(
            "--enable-return-routed-experts is not served with experts in MXFP4, whose runner "
            "chooses them inside a kernel that keeps no ids: drop the option, or serve a "
            "checkpoint in BF16."
        )
    room = args.chunked_prefill_size or -1
    if room <= 0 or (config.rows or 0) > room:
        raise GateError(
            f"--enable-return-routed-experts has room for the rows of one chunk, but "
            f"--chunked-prefill-size is {room} and --gate-rows is {config.rows}: give the first a "
            "number that is at least the second."
        )
    verified = config.guarantee == "exact" or config.policy in ("always", "observe")
    if config.repair != "span" or not (config.invariant or verified):
        raise GateError(
            "--enable-return-routed-experts is not served with --gate-guarantee sparse and "
            "--gate-fast-path stock, nor with --gate-repair column, because the columns of a row "
            "that is not verified have the experts of the fast path, which may depend on the "
            "batch: use --gate-guarantee exact."
        )


def refuse_audit(args: Any, config: GateConfig) -> None:
    """Ranks would have to agree on when an audit gives way. Raises GateError."""
    if config.audit_rate > 0 and args.tp_size > 1:
        raise GateError(
            f"--gate-audit-rate is {config.audit_rate}, but --tp-size is {args.tp_size}, and "
            "replays run on one rank: drop the first, or use --tp-size 1."
        )


def refuse_replicas(args: Any, config: GateConfig) -> None:
    """What several data-parallel replicas cannot share. Raises GateError."""
    if args.dp_size == 1:
        return
    if args.nnodes > 1:
        raise GateError(
            f"--dp-size is {args.dp_size}, but --nnodes is {args.nnodes}, and replicas agree on "
            "one plan by a file of their host: start a server for each host behind a router."
        )
    if config.study:
        raise GateError(
            f"--gate-study compares columns that one process keeps, but --dp-size is "
            f"{args.dp_size}: use --dp-size 1."
        )


def refuse_confidential(args: Any, config: GateConfig) -> None:
    """There a worker thread copies a step's results, whose margins the next step may overwrite.

    Only for arguments that SGLang has resolved. Raises GateError.
    """
    if config.overlap == "on" and args.device == "cuda" and machine.is_confidential():
        raise GateError(
            "--deterministic-gate does not overlap steps on a GPU in confidential computing mode, "
            "where SGLang copies a step's results in another thread: add --gate-overlap off."
        )


def refuse_simulation(args: Any, config: GateConfig) -> None:
    """Simulated verdicts on real weights would be wrong answers. Raises GateError."""
    if config.simulates and args.load_format != "dummy":
        raise GateError(
            "--gate-simulate-trigger-rate and --gate-simulate-flip-rate make verdicts up, which "
            "is for benchmarks: drop them, or serve made-up weights with --load-format dummy."
        )


def refuse_grammars(args: Any) -> None:
    """SGLang pins xgrammar's masks: without a GPU's driver the first grammar ends the scheduler.

    Only for arguments that SGLang has resolved. Raises GateError.
    """
    if args.device == "cpu" and args.grammar_backend == "xgrammar":
        raise GateError(
            "--grammar-backend is xgrammar, whose masks need a GPU's driver, but --device is cpu: "
            "use llguidance."
        )


# An instance of each with a K/V split that depends on the length alone is what verifies.
INVARIANT_ATTENTION = ("torch_native", "triton", "flashinfer")


def refuse_fast_path(server_args: Any, config: GateConfig) -> None:
    """What a fast path needs of device and attention backend. Raises GateError.

    Only for arguments that SGLang has resolved: before that no backend has a name.
    """
    if config.policy == "observe":
        return
    for backend in settings.attention_backends(server_args):
        if backend not in INVARIANT_ATTENTION:
            raise GateError(
                f"--deterministic-gate does not work with --attention-backend {backend}, whose "
                "decode depends on the batch: use triton or flashinfer."
            )
