"""Updates of the weights that SGLang would fail in after it began to replace them are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.managers import io_struct

from margingate.runtime.client.control import UNFINISHED
from margingate.runtime.compat.compute import quantization, schemes
from margingate.runtime.compat.model import architectures, weights


def refusal(scheduler: Any, received: Any) -> Any:
    """SGLang's answer "not done" with one sentence, or None where the update may go on.

    Nothing has been changed yet.
    """
    kind = _ANSWERS.get(type(received))
    if kind is None:
        return None
    runner = scheduler.tp_worker.model_runner
    because = (
        _shared(scheduler)
        or _recaptured(runner, received)
        or _not_loadable(runner.model)
        or _of_another_folder(runner.model_config, received)
        or _unflushed(scheduler, received)
    )
    if not because:
        return None
    return kind(success=False, message=f"The weights were not updated, because {because}")


def looks_only(received: Any) -> bool:
    """Whether it is SGLang's check_weights, asked to change nothing."""
    return getattr(received, "action", "") in ("snapshot", "compare", "checksum")


def _shared(scheduler: Any) -> str:
    said = weights.shared(scheduler)
    return said and f"{said}: start a server of the new ones, or one without the option."


def _not_loadable(model: Any) -> str:
    """SGLang writes into the model's parameters, wherever weights come from. A session would end by
    repacking what is packed, even if nothing was written.
    """
    found = schemes.fixed(model)
    if found is None:
        return ""
    return (
        f"SGLang keeps those of {found[0]} ({found[1]}) in another form than a checkpoint has, and "
        "cannot load into it: start a server of the new weights, or serve a checkpoint in BF16 or "
        "in FP8 with a weight_block_size."
    )


def _recaptured(runner: Any, received: Any) -> str:
    """The verifier, and what was measured of its graphs, would be of graphs that are replaced."""
    asked = getattr(received, "recapture_cuda_graph", False)
    if not asked or runner.decode_cuda_graph_runner is None:
        return ""
    return (
        "recapture_cuda_graph is true and the gate's verify passes replay the decode graphs that "
        "were captured at start: leave recapture_cuda_graph out, or start a server of the new "
        "weights."
    )


def _of_another_folder(model: Any, received: Any) -> str:
    """What a folder's weights are that SGLang would fail over, or take for what they are not."""
    if getattr(received, "model_path", None) is None:
        return ""
    load_format = received.load_format
    if load_format is not None and load_format.lower() not in [each.value for each in LoadFormat]:
        return (
            f"load_format is {load_format!r}, which SGLang does not know: leave it out, or give "
            "one that --load-format takes."
        )
    config = architectures.folder_config(received.model_path)
    if config is None:
        return ""
    return _of_another_method(model, received.model_path, config) or _of_other_sizes(
        model, received.model_path, config
    )


def _of_other_sizes(model: Any, path: str, config: dict[str, Any]) -> str:
    """SGLang fails over other shapes, and once more as it goes back; what is missing of fewer
    layers it leaves as it was.
    """
    text = model.hf_text_config
    for name, given in architectures.sizes_of(config).items():
        served = getattr(text, f"original_{name}", getattr(text, name, None))
        more = name == "num_hidden_layers" and served is not None and given > served
        if served not in (None, given) and not more:  # a server may leave the last layers out
            return (
                f"{name} of the weights in {path} is {given}, and of those that are served "
                f"{served}: give weights of the same model, or start a server of this one."
            )
    return ""


def _of_another_method(model: Any, path: str, config: dict[str, Any]) -> str:
    """A folder in BF16 would be cast to FP8 without a scale, and serve without a word."""
    new = architectures.quantization_of(config)
    if new is None:
        return ""
    says = partial(quantization.checkpoint_says, model)
    both = [(name, says(name), new.get(name)) for name in METHOD]
    both.append((LEFT_OUT, quantization.left_out(says), quantization.left_out(new.get)))
    for name, served, given in both:
        if served != given:
            return (
                f"{name} of the weights in {path} is {given}, and of those that are served "
                f"{served}: give a checkpoint that is quantized in the same way, or start a server "
                "of this one."
            )
    return ""


def _unflushed(scheduler: Any, received: Any) -> str:
    """SGLang flushes after it has replaced the weights, and answers "not done" where requests hold
    columns, or wait without a pause.
    """
    if not getattr(received, "flush_cache", False) or weights.may_flush(scheduler):
        return ""
    return (
        f"the update flushes the cache and {UNFINISHED}: let them finish, abort them, "
        "retract them by a pause, or send flush_cache false."
    )


# Of a checkpoint's quantization: what SGLang makes the parameters of.
METHOD = (
    *("quant_method", "weight_block_size", "activation_scheme", "format"),
    *("bits", "group_size", "desc_act", "config_groups"),
)
LEFT_OUT = "the list of layers that are not quantized"
_ANSWERS: dict[type, type] = {
    io_struct.BeginWeightUpdateReqInput: io_struct.BeginWeightUpdateReqOutput,
    io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
    io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
}
