"""Rows of the ledger of patches for requests of who runs the server: weights, memory, profiles."""

from __future__ import annotations

from margingate.runtime.hooks import handlers
from margingate.runtime.hooks.registry import AROUND, Hook
from margingate.runtime.schedule import profiling, sent_weights

_COMPONENTS = "managers.scheduler_components."
_PROFILER = _COMPONENTS + "profiler_manager.SchedulerProfilerManager."
_WEIGHTS = _COMPONENTS + "weight_updater.SchedulerWeightUpdaterManager."
_ENDS = "SGLang's scheduler does not end over it"

# Applied in gated schedulers, with the other rows of theirs.
ADMIN_HOOKS = (
    *(
        Hook(
            _WEIGHTS + name,
            AROUND,
            handlers.weights_change,
            "self recv_req",
            "no row waits across a change of the weights; fingerprint and columns follow them",
            "SGLang counts changes of weights, and keys its tree by them",
        )
        for name in (
            *("begin_weight_update", "update_weights_from_disk"),
            "update_weights_from_distributed",
            *("update_weights_from_tensor", "update_weights_from_ipc"),
            *("end_weight_update", "resume_memory_occupation", "check_weights"),
        )
    ),
    Hook(
        "managers.tp_worker.TpModelWorker.deserialize_own_rank",
        AROUND,
        sent_weights.deserialize,
        "self serialized_named_tensors",
        "tensors of an update that cannot be read are none",
        _ENDS,
    ),
    Hook(
        "model_executor.model_runner_components.weight_updater.WeightUpdater."
        "update_weights_from_tensor",
        AROUND,
        sent_weights.load,
        "self named_tensors load_format",
        "tensors that cannot be loaded are answered",
        "SGLang answers as it does of weights from another process",
    ),
    *(
        Hook(
            "model_executor.model_runner_components." + name,
            AROUND,
            sent_weights.meet,
            parameters,
            "what is asked for of groups that are not there, or with other ports, is answered",
            _ENDS,
        )
        for name, parameters in (
            (
                "weight_updater.WeightUpdater.init_weights_update_group",
                "self master_address master_port rank_offset world_size group_name backend",
            ),
            (
                "weight_exporter.WeightExporter.init_weights_send_group_for_remote_instance",
                "self master_address ports group_rank world_size group_name backend",
            ),
            (
                "weight_exporter.WeightExporter.send_weights_to_remote_instance",
                "self master_address ports group_name",
            ),
        )
    ),
    Hook(
        "managers.scheduler.Scheduler.expert_distribution_handle",
        AROUND,
        handlers.record_experts,
        "self recv_req",
        "a scheduler without a recorder of experts refuses and goes on",
        _ENDS,
    ),
    Hook(
        _PROFILER + "_profile",
        AROUND,
        profiling.ask,
        "self recv_req",
        "stages without a number of steps, over which a scheduler ends at its next step",
        _ENDS,
    ),
    *(
        Hook(
            _PROFILER + name,
            AROUND,
            profiling.contain,
            "self stage",
            "a profile that cannot be taken or written is given up",
            _ENDS,
        )
        for name in ("_start_profile", "_stop_profile")
    ),
    Hook(
        _WEIGHTS + "release_memory_occupation",
        AROUND,
        handlers.release_memory,
        "self recv_req",
        "a scheduler whose requests are not finished refuses and goes on; what is away stays so",
        _ENDS,
    ),
)
