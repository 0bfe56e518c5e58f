"""How near a router was to other experts: the margin of a row's choice, and its running minimum.

A router takes the k experts of the largest scores. Under another batch shape its logits drift, and
where the k-th score and the next one nearly tie, another expert runs. That moves what comes after
by far more than drift does, so the smallest router margin of a row in a forward is kept beside the
margin of its token.

What a margin means, for the kernel and the oracle alike:

* Without a bias it is in logits, since softmax and sigmoid keep their order: the k-th largest minus
  the next. With a bias it is in what is compared then, the softmax or the sigmoid plus the bias.
* With groups the margin is the lesser of two: from the last chosen group to the next, and from the
  k-th expert to the next among those of the chosen groups. A group stands for its best expert, and
  with a bias for the sum of its two best.
* Equal scores at the edge give 0. Where all experts, or all groups, are chosen nothing was decided:
  +inf.
* As in `softmax_top2`, a NaN anywhere in a row makes its margin NaN, and infinities are values like
  any other: +inf to a finite score, or a finite one to -inf, is +inf; two alike give NaN.
* NaN stays: the minimum of NaN and anything is NaN, until the next reset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from margingate_kernels import router_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS = 1024


class Routing(NamedTuple):
    """How a router chooses."""

    k: int  # experts of a row
    scoring: str = "softmax"  # or "sigmoid": of the scores that a bias is added to
    groups: int = 1  # of experts next to each other, all of one size
    chosen_groups: int = 1


@torch.no_grad()
def router_margin(
    logits: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    reset: bool = False,
) -> torch.Tensor:
    """Fold each row's router margin into `out`: the least of it and what is there.

    On CUDA one Triton launch, elsewhere on the CPU the torch oracle. A row's result depends on that
    row alone. The CUDA path neither allocates nor synchronises and may be captured into a graph,
    once a first call outside the capture has compiled it.

    Args:
        logits: float32, bfloat16 or float16 [R, E], last dim contiguous, any row stride, R >= 0,
            1 <= E <= 1024. Not mutated.
        out: float32 [>= R], contiguous, on the device of logits; the first R are written.
        bias: floating point [E], or [R, E] with a contiguous last dim; added to the scores. Not
            mutated.
        reset: write the margins, whatever is there.

    Returns:
        `out`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride or device, or a routing that does not fit the logits.
    """
    _check(logits, routing, out, bias)
    if logits.device.type != "cpu":
        return launch_router_margin(logits, routing, out, bias, reset=reset)
    margins = router_margin_reference(logits, routing, bias=bias)
    rows = out[: len(logits)]
    # torch.minimum is NaN where either is.
    rows.copy_(margins if reset else torch.minimum(rows, margins))
    return out


def launch_router_margin(
    logits: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    reset: bool,
) -> torch.Tensor:
    """Run the jit body on arguments already checked; `router_margin` is the public way in.

    Also the way in for Triton's interpreter, which runs the body on CPU tensors.
    """
    if len(logits):
        scoring = "logits" if bias is None else routing.scoring
        router_triton.launch(
            logits, bias, out, routing.k, scoring, routing.groups, routing.chosen_groups, reset
        )
    return out


@torch.no_grad()
def router_margin_reference(
    logits: torch.Tensor, routing: Routing, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The torch oracle: the margins of these rows, float32 [R]; no fold. Arguments as above.

    Equal to the kernel's bit for bit. With a bias that rests on float64: exponentials of two
    libraries differ in its last bit, and hardly ever in the float32 that they are rounded to.
    """
    _check(logits, routing, None, bias)
    scores = _scores(logits.float(), routing, bias)
    broken = scores.isnan().any(1)
    margin = torch.full_like(scores[:, 0], torch.inf)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if routing.chosen_groups < routing.groups:
        width = scores.shape[1] // routing.groups
        groups = _group_scores(scores.reshape(len(scores), routing.groups, width), bias is not None)
        broken |= groups.isnan().any(1)
        margin = _gap(groups, torch.ones_like(groups, dtype=torch.bool), routing.chosen_groups)
        last = groups.sort(1, descending=True).values[:, routing.chosen_groups - 1 :][:, :1]
        allowed = (groups >= last).repeat_interleave(width, dim=1)
    margin = torch.minimum(margin, _gap(scores, allowed, routing.k))
    return margin.masked_fill(broken, torch.nan)


def _scores(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> torch.Tensor:
    """What decides, float32 [R, E]."""
    if bias is None:
        return logits
    wide = logits.double()
    if routing.scoring == "sigmoid":
        score = 1.0 / (1.0 + torch.exp(-wide))
    else:
        score = torch.softmax(wide, 1)
    return score.float() + bias.float()


def _group_scores(scores: torch.Tensor, biased: bool) -> torch.Tensor:
    """Of [R, groups, width]: [R, groups]."""
    best = scores.sort(2, descending=True).values
    return best[..., 0] + best[..., 1] if biased else best[..., 0]


def _gap(values: torch.Tensor, allowed: torch.Tensor, k: int) -> torch.Tensor:
    """From the k-th largest of those allowed to the next; +inf where there is no next. [R]."""
    best = values.masked_fill(~allowed, -torch.inf).sort(1, descending=True).values
    after = best[:, k] if k < best.shape[1] else torch.full_like(best[:, 0], -torch.inf)
    gap = best[:, k - 1] - after + 0.0  # turns the -0.0 of -0.0 - 0.0 into 0.0
    return torch.where(allowed.sum(1) > k, gap, torch.inf)


def _check(
    logits: torch.Tensor, routing: Routing, out: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    """Raises on anything that the kernel cannot read."""
    _check_logits(logits)
    _check_routing(routing, logits.shape[1], biased=bias is not None)
    if out is not None:
        _check_out(out, logits)
    if bias is not None:
        _check_bias(bias, logits)


def _check_logits(logits: torch.Tensor) -> None:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}; pass a torch.Tensor.")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits has dtype {logits.dtype}; cast to float32, bfloat16 or float16.")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MOST_EXPERTS:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; pass [rows, experts], 1 to {MOST_EXPERTS} "
            "experts."
        )
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"logits has stride {logits.stride(1)} along the experts; pass logits.contiguous()."
        )
    if logits.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits is on {logits.device}; move it to a CUDA device or the CPU.")


def _check_routing(routing: Routing, experts: int, *, biased: bool) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is a {type(routing).__name__}; pass a Routing.")
    k, scoring, groups, chosen = routing
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"routing.scoring is {scoring!r}; pass 'softmax' or 'sigmoid'.")
    if groups < 1 or experts % groups:
        raise ValueError(f"routing.groups is {groups}; pass a divisor of {experts} experts.")
    if not 1 <= chosen <= groups:
        raise ValueError(f"routing.chosen_groups is {chosen}; pass 1 to {groups}.")
    if not 1 <= k <= chosen * (experts // groups):
        most = chosen * (experts // groups)
        raise ValueError(f"routing.k is {k}; pass 1 to {most}, the experts of the chosen groups.")
    if biased and chosen < groups and groups == experts:
        raise ValueError(
            f"routing.groups is {groups}, one expert each, but with a bias a group stands for its "
            "two best; pass fewer groups."
        )


def _check_out(out: torch.Tensor, logits: torch.Tensor) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is a {type(out).__name__}; pass a torch.Tensor.")
    if out.dtype != torch.float32:
        raise TypeError(f"out has dtype {out.dtype}; pass float32.")
    if out.device != logits.device:
        raise ValueError(f"out is on {out.device}, logits on {logits.device}; pass one device.")
    if out.dim() != 1 or len(out) < len(logits) or not out.is_contiguous():
        raise ValueError(
            f"out has shape {list(out.shape)} and strides {out.stride()}; pass a contiguous "
            f"[{len(logits)}] or more."
        )


def _check_bias(bias: torch.Tensor, logits: torch.Tensor) -> None:
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias is a {type(bias).__name__}; pass a torch.Tensor or None.")
    if not bias.is_floating_point() or bias.dtype == torch.float64:
        raise TypeError(f"bias has dtype {bias.dtype}; cast to float32, bfloat16 or float16.")
    if bias.device != logits.device:
        raise ValueError(f"bias is on {bias.device}, logits on {logits.device}; pass one device.")
    if bias.shape not in (logits.shape[1:], logits.shape):
        raise ValueError(
            f"bias has shape {list(bias.shape)}; pass [{logits.shape[1]}], or {list(logits.shape)}."
        )
    if bias.stride(-1) != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"bias has stride {bias.stride(-1)} along the experts; pass bias.contiguous()."
        )
