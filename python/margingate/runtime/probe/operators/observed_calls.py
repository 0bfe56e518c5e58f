"""How a forward calls each module with parameters: what the probe then measures, and nothing else.

A linear layer may add a bias or leave that to others; a norm may add a residual, in another kernel;
the norm of a head sees rows times heads rows. So one made-up decode step is run, and what each
module was given is noted. Modules with parameters that nobody measures end the start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention

from margingate.config import GateError
from margingate.runtime.compat.compute import marlin, mxfp4, quantization
from margingate.runtime.compat.compute.routers import experts, routers
from margingate.runtime.compat.model import vision
from margingate.runtime.probe.operators import fused_gate

logger = logging.getLogger(__name__)

ROWS = 3  # of the step that is observed
# Modules that need no measuring, by class name.
ROW_BY_ROW = {
    "VocabParallelEmbedding": "it copies a row of a table for each token",
    "Embedding": "it copies a row of a table for each token",
    "Gemma3TextScaledWordEmbedding": "it copies a row, and multiplies it by a number",
    "RotaryEmbedding": "it multiplies element by element, by position",
    "RadixAttention": "its parameters are scales of K/V columns, which have to be one",
}
# A number a head, which a module hands to its attention: that is checked with them.
SINKS = "sinks"


@dataclass(frozen=True)
class ObservedCall:
    """What a module was given, for each row of the forward."""

    width: int = 0  # elements; 0: those of its weight
    tail: tuple[int, ...] = ()  # sizes behind the rows, where there are several rows or dimensions
    stride: int = 0  # elements from a row to the next; 0: contiguous
    dtype: torch.dtype | None = None  # None: its weight's
    bias: bool | None = None  # of a linear layer; None: it was not seen
    residual: bool = False  # of a norm

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [rows, width] with the shape and the strides that were seen."""
        if self.stride:
            room = x.new_empty(len(x), self.stride)
            room[:, : x.shape[1]] = x
            x = room[:, : x.shape[1]]
        return x.view(-1, *self.tail) if self.tail else x

    def bias_of(self, module: Any) -> torch.Tensor | None:
        """The bias that its method gets."""
        wanted = self.bias is not False and not getattr(module, "skip_bias_add", False)
        return getattr(module, "bias", None) if wanted else None

    def __str__(self) -> str:
        """What makes it another operator than a plain one; empty where nothing does."""
        said = [f"{self.width} as {list(self.tail)}"] if self.tail else []
        said += [f"stride {self.stride}"] if self.stride else []
        said += [str(self.dtype)] if self.dtype else []
        said += ["with its bias"] if self.bias else []
        said += ["with a residual"] if self.residual else []
        return "".join(f", {each}" for each in said)


AS_WEIGHT = ObservedCall()


@dataclass(frozen=True)
class ObservedRows:
    """What a router or experts were given: tensors with a row axis."""

    parts: tuple[tuple[int, torch.dtype], ...]  # width and dtype of each
    device: torch.device
    # Of experts that are given a table of all rows: the TopK that makes it of the rows' scores.
    router: Any = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return ", ".join(f"{width} of {dtype}" for width, dtype in self.parts)


@dataclass(frozen=True)
class ObservedHead:
    """What logits were made by, whatever the model calls it: Gemma 2 has its embeddings there."""

    module: Any = field(repr=False)
    processor: Any = field(repr=False)  # SGLang's LogitsProcessor


Observed = ObservedCall | ObservedRows | ObservedHead


def observed_rows(name: str, tensors: Sequence[torch.Tensor], rows: int) -> ObservedRows:
    """The call of a module with these tensors, in a forward of `rows` rows.

    Raises:
        GateError: one of them has not a row for each.
    """
    for x in tensors:
        if x.dim() != 2 or x.shape[0] != rows:
            raise GateError(
                f"--deterministic-gate saw {name} called with an input of shape {list(x.shape)} in "
                f"a step of {rows} rows: it cannot be measured; serve this model without the flag."
            )
    return ObservedRows(tuple((x.shape[1], x.dtype) for x in tensors), tensors[0].device)


def observed(x: torch.Tensor, weight: torch.Tensor, rows: int, **more: bool) -> ObservedCall:
    """The call of a module with input `x`, in a forward of `rows` rows.

    Raises:
        GateError: the input has not a whole number of rows for each.
    """
    if x.dim() == 0 or x.shape[0] % rows:
        raise GateError(
            f"--deterministic-gate saw a layer called with an input of shape {list(x.shape)} in a "
            f"step of {rows} rows: it cannot be measured; serve this model without the flag."
        )
    width = x.numel() // rows
    plain = x.dim() == 2 and x.shape[0] == rows
    distance = x.stride(0) * (x.shape[0] // rows)
    inner = torch.empty(x.shape[1:]).stride() == x.stride()[1:]
    return ObservedCall(
        width=width,
        tail=() if plain else tuple(x.shape[1:]),
        stride=distance if inner and distance != width and x.shape[0] == rows else 0,
        dtype=None if x.dtype == weight.dtype else x.dtype,
        **more,
    )


@contextmanager
def observing(model: Any, rows: int) -> Iterator[dict[int, Observed]]:
    """Fills the result, by id of a module, while forwards of `rows` rows run. Slow: only at start.

    Linear layers are seen where SGLang's method is applied, so that the bias is known; others where
    they are called.
    """
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    seen: dict[int, Observed] = {}

    def before(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        if tensors and isinstance(module.weight, torch.Tensor):
            several = len(tensors) > 1
            seen[id(module)] = observed(tensors[0], module.weight, rows, residual=several)

    with ExitStack() as stack:
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            rounded = quantization.is_fp8_layer(module) or marlin.is_layer(module)
            if isinstance(method, UnquantizedLinearMethod) or rounded:
                stack.enter_context(_noting(method, seen, rows))
            elif isinstance(module, LogitsProcessor):
                stack.enter_context(_noting_head(module, seen))
            elif hasattr(module, "weight") and not any(module.children()):
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        tables: list[Table] = []
        for name, module in (*routers(model), *experts(model)):
            routed = partial(_routed, seen, (name, rows), tables)
            stack.callback(module.register_forward_pre_hook(routed, with_kwargs=True).remove)
        for _, module in routers(model):
            made = partial(_note_table, tables)
            stack.callback(module.register_forward_hook(made, with_kwargs=True).remove)
        if gates := fused_gate.gates(model):
            stack.enter_context(fused_gate.replaced(_gated(seen, gates, rows)))
        yield seen


def _noting(method: Any, seen: dict[int, Observed], rows: int) -> AbstractContextManager[None]:
    """Fills `seen` for linear layers, where their method is applied to them."""
    apply = method.apply

    def applied(called: Any, x: torch.Tensor, bias: Any = None) -> Any:
        if not isinstance(x, torch.Tensor):
            raise GateError(
                f"--deterministic-gate saw a {type(called).__name__} called with inputs that were "
                "rounded elsewhere: it cannot be measured; serve this model without the flag."
            )
        weight = marlin.scales(called) if marlin.is_layer(called) else called.weight
        seen[id(called)] = observed(x, weight, rows, bias=bias is not None)
        return apply(called, x, bias)

    return _replaced(method, "apply", applied)


def _noting_head(processor: Any, seen: dict[int, Observed]) -> AbstractContextManager[None]:
    """Fills `seen` for what logits are made by; as embeddings it may have been called before."""
    compute = processor._compute_lm_head

    def noted(hidden: torch.Tensor, head: Any, *args: Any, **kwargs: Any) -> Any:
        seen[id(head)] = ObservedHead(head, processor)
        return compute(hidden, head, *args, **kwargs)

    return _replaced(processor, "_compute_lm_head", noted)


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Has the object call this, and then what it called before: layers share a method."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


class Table(NamedTuple):
    """A choice of experts that has no row axis, and what it was made of."""

    chosen: Any
    router: Any
    scores: torch.Tensor


def _note_table(tables: list[Table], module: Any, args: Any, kwargs: Any, chosen: Any) -> None:
    """After a call of a router (hidden states, logits)."""
    if mxfp4.is_table(chosen):
        tables.append(Table(chosen, module, [*args, *kwargs.values()][1]))


def _routed(  # noqa: PLR0917  a hook's parameters
    seen: dict[int, Observed],
    named: tuple[str, int],
    tables: Sequence[Table],
    module: Any,
    args: Any,
    kwargs: Any,
) -> None:
    """Before a call of a router (hidden states, logits) or of experts (hidden states, choice)."""
    name, rows = named
    given = [*args, *kwargs.values()][:2]
    made = [table for table in tables if table.chosen is given[1]]
    if made:
        found = observed_rows(name, (given[0], made[0].scores), rows)
        seen[id(module)] = replace(found, router=made[0].router)
        return
    tensors = given if isinstance(given[1], torch.Tensor) else routing_tensors(name, *given)
    seen[id(module)] = observed_rows(name, tensors, rows)


def _gated(seen: dict[int, Observed], gates: Mapping[int, Any], rows: int) -> fused_gate.Kernel:
    """SGLang's kernel, which notes what it is given for each gate."""
    kernel = fused_gate.kernel()

    def noted(
        hidden: torch.Tensor, weight: torch.Tensor, shared: torch.Tensor, result: torch.Tensor
    ) -> None:
        tensors = (hidden, shared, result)
        seen[id(gates[weight.data_ptr()])] = observed_rows("a shared expert's gate", tensors, rows)
        kernel(hidden, weight, shared, result)

    return noted


def routing_tensors(name: str, hidden: torch.Tensor, chosen: Any) -> list[torch.Tensor]:
    """What experts are given, each with a row axis: rows, weights and ids of their choice, logits.

    Raises:
        GateError: SGLang's record of the choice has another format.
    """
    logits = getattr(chosen, "router_logits", None)
    if mxfp4.is_table(chosen):
        raise _unreadable(name, chosen)
    found = [hidden, *choice_of(name, chosen)]
    return found if logits is None else [*found, logits]


def choice_of(name: str, chosen: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [rows, k] of a router's result. Raises GateError where it has none."""
    if mxfp4.is_table(chosen):
        return mxfp4.rows_of(chosen)
    if not (hasattr(chosen, "topk_weights") and hasattr(chosen, "topk_ids")):
        raise _unreadable(name, chosen)
    return chosen.topk_weights, chosen.topk_ids


def _unreadable(name: str, chosen: Any) -> GateError:
    return GateError(
        f"--deterministic-gate cannot measure {name}, where a choice of experts is a "
        f"{type(chosen).__name__}: use --moe-runner-backend triton."
    )


def refuse_bypassed(members: Iterable[tuple[str, Any]], seen: Mapping[int, Observed]) -> None:
    """Raises GateError for a module that the observed step did not call.

    Another kernel may read its weight, as fused ones do: no plan for the layer would hold for it.

    Args:
        members: those that plans are made for, by name.
        seen: of `observing`.
    """
    for name, module in members:
        if id(module) not in seen:
            raise GateError(
                f"--deterministic-gate cannot measure {name}, a {type(module).__name__}: a decode "
                "step does not call it, and a kernel that the gate does not know may read its "
                "weight; serve this model without the flag, or use --gate-fast-path stock."
            )


def refuse_unmeasured(model: Any, measured: set[int]) -> None:
    """Raises GateError for a module with parameters that is neither measured nor row by row.

    A vision tower is left out: no gated request gets there.

    Args:
        measured: ids of the modules that the probe knows.
    """
    for name, module in vision.text_modules(model):
        own = dict(module.named_parameters(recurse=False))
        if any(isinstance(each, RadixAttention) for each in module.children()):
            own.pop(SINKS, None)
        if own and id(module) not in measured and type(module).__name__ not in ROW_BY_ROW:
            raise GateError(
                f"--deterministic-gate cannot measure {name or 'the model'}, a "
                f"{type(module).__name__} with {', '.join(own)}: serve this model without the "
                "flag, or use --gate-fast-path stock with --gate-policy observe to study it."
            )
