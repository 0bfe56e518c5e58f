"""The verifier's own decode on a GPU, for `--gate-fast-path stock`.

SGLang's attention stays as it is; verify passes run on a second instance of the same backend whose
K/V split depends on the sequence length alone, with a CUDA graph of exactly V rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from margingate.config import GateError
from margingate.runtime.attention import fix_split


def build(runner: Any, rows: int) -> tuple[Any, Any]:
    """A second attention backend with a fixed split, and its graph runner for `rows` rows.

    The runner is None where decode graphs are switched off.

    Raises:
        GateError: the pool has room for fewer requests than `rows`.
    """
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    _, decode_name = runner.server_args.get_attention_backends()
    before = runner.init_new_workspace
    try:
        backend = attention_backend_setup._build_full_attention_backend_from_str(
            model_runner=runner, backend_str=decode_name, init_new_workspace=True
        )
    finally:
        runner.init_new_workspace = before
    fix_split(backend, runner)
    if runner.decode_cuda_graph_runner is None:
        return backend, None
    if rows > runner.req_to_token_pool.size:
        raise GateError(
            f"--gate-rows is {rows}, but the server holds {runner.req_to_token_pool.size} requests "
            "at most, so no graph of as many rows can be made: lower --gate-rows."
        )
    with _captures(runner, rows):
        return backend, DecodeCudaGraphRunner(runner, attn_backend=backend)


@contextmanager
def _captures(runner: Any, rows: int) -> Iterator[None]:
    """Graph runners made meanwhile capture this one row count, and have logits of their own."""
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput

    phase = runner.server_args.cuda_graph_config.decode
    sizes, shared = phase.bs, runner.graph_shared_output
    phase.bs = [rows]
    runner.graph_shared_output = GraphSharedOutput(device=runner.device, max_rows=rows)
    try:
        yield
    finally:
        phase.bs, runner.graph_shared_output = sizes, shared
