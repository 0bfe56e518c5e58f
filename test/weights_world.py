"""As much of a scheduler and of the gate as an update of weights asks for."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.managers.scheduler import Scheduler

from margingate.config import GateConfig
from margingate.runtime.observe.fingerprint import Fingerprint
from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.schedule.weight_changes import WeightChanges


def runner(model: Any = None, **quantization: Any) -> Any:
    """SGLang's ModelRunner, as far as an update looks at it; by default of nothing quantized."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
    text = SimpleNamespace(**sizes, original_num_attention_heads=6, head_dim=None)
    config = SimpleNamespace(quantization_config=quantization or None)
    of = model or torch.nn.Module()
    model_config = SimpleNamespace(hf_config=config, hf_text_config=text)
    return SimpleNamespace(model=of, model_config=model_config)


def scheduler(*, waiting: int = 0, running: int = 0, paused: bool = False) -> Any:
    """As much of one as SGLang's own flush looks at; with requests that wait or run."""
    made: Any = SimpleNamespace(
        weight_updater=SimpleNamespace(_session=None),
        running_batch=SimpleNamespace(is_empty=lambda: not running, reqs=[]),
        last_batch=None,
        chunked_req=None,
        enable_overlap=False,
        enable_hisparse=False,
        enable_hierarchical_cache=False,
        enable_lmcache=False,
        waiting_queue=[SimpleNamespace(kv=ReqKvInfo())] * waiting,
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        dllm_manager=SimpleNamespace(any_staging_reqs=lambda: False),
        disaggregation_mode=DisaggregationMode.NULL,
        _pp_microbatches_drained=lambda: True,
        _engine_paused=paused,
        tp_worker=SimpleNamespace(model_runner=runner()),
        server_args=SimpleNamespace(weight_cache_mode="off"),
    )
    made.is_fully_idle = lambda **named: Scheduler.is_fully_idle(made, **named)
    return made


class Gate:
    """As much of the controller as an update asks for; each digest is another."""

    def __init__(self, of: Any, guarantee: str = "sparse") -> None:
        config = GateConfig(rows=8, guarantee=guarantee)
        self.scheduler, self.requests = of, OpenRequests(config)
        of.tree_cache = None
        self.in_flight = SimpleNamespace(batches=list)
        self.forwards, self.digests = 1, 0
        self.fingerprint = Fingerprint({"a": 1}, self._digest, lambda: self.forwards)
        self.settled: list[int] = []  # generations that were in memory then
        self.forwards += 1
        holders = ColumnHolders(of, self.requests, cast(Any, self.in_flight))
        self.weights = WeightChanges(
            of, self.requests, holders, self.fingerprint, self.verify_everything
        )

    def _digest(self) -> str:
        self.digests += 1
        return f"weights {self.digests}"

    def verify_everything(self) -> None:
        self.settled.append(self.fingerprint.generation)
