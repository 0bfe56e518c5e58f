"""The verifier's own decode on a GPU, for `--gate-fast-path stock`.

SGLang's attention stays as it is. Verify passes run on a backend of their own, with a CUDA graph of
exactly V rows: the gate's kernels, beside SGLang's FlashInfer too, or where these do not serve the
model a second instance of SGLang's backend whose K/V split depends on the sequence length alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from margingate.runtime.attention import layer_rules
from margingate.runtime.attention.fixed_split import fix_split
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.compute.forward import captures

logger = logging.getLogger(__name__)

CARRIER = "triton"  # SGLang's backend inside which the gate's kernels run


def build(runner: Any, rows: int) -> tuple[Any, Any]:
    """A second attention backend with a fixed split, and its graph runner for `rows` rows.

    The runner is None where decode graphs are switched off.
    """
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    backend = _attention(runner)
    fix_split(backend, runner)
    if runner.decode_cuda_graph_runner is None:
        return backend, None
    with _captures(runner, rows):
        return backend, DecodeCudaGraphRunner(runner, attn_backend=backend)


def _attention(runner: Any) -> Any:
    """What verify passes attend with: what carries the gate's kernels, if they serve the model."""
    _, decode_name = settings.attention_backends(runner.server_args)
    if decode_name == CARRIER:
        layer_rules.refuse_short_windows(runner)
    backend = _instance(runner, CARRIER)
    reason = layer_rules.unfit(backend, runner)
    if not reason or decode_name == CARRIER:
        return backend
    logger.info("margingate: verify passes use %s's attention: %s.", decode_name, reason)
    return _instance(runner, decode_name)


def _instance(runner: Any, name: str | None) -> Any:
    """One more attention backend of SGLang's, with a workspace of its own."""
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup

    before = runner.init_new_workspace
    try:
        return attention_backend_setup._build_full_attention_backend_from_str(
            model_runner=runner, backend_str=name, init_new_workspace=True
        )
    finally:
        runner.init_new_workspace = before


@contextmanager
def _captures(runner: Any, rows: int) -> Iterator[None]:
    """Graph runners made meanwhile capture this one row count, and have logits of their own."""
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput

    shared = runner.graph_shared_output
    runner.graph_shared_output = GraphSharedOutput(device=runner.device, max_rows=rows)
    try:
        with captures([rows]):
            yield
    finally:
        runner.graph_shared_output = shared
