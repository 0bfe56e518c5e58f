"""What a study measures besides the walk: K/V columns around flips, and whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from margingate.harness.answers import common_prefix, identical
from margingate.study.journal import Journal
from margingate.study.steps_of_walk import ALONE, flips
from margingate.study.walk import along, ask, groups

if TYPE_CHECKING:
    from margingate.harness.client import Answer, Client, Prompt

STUDIED = ("--deterministic-gate", "--gate-fast-path", "stock", "--gate-study")
COMPARED = 32  # answers of a case whose columns are compared; a server keeps 64
COUNTERS = ("steps", "flagged", "verified", "flips", "missed", "rolled_back")


def cases(
    thresholds: Sequence[float], of_routers: Callable[[float], float | None]
) -> dict[str, tuple[str, ...]]:
    """Server options by case: two repairs at each threshold, and every row verified.

    `of_routers`: the router's threshold beside one of logits; None where there are no routers.
    """
    found: dict[str, tuple[str, ...]] = {}
    for threshold in thresholds:
        at: tuple[str, ...] = (*STUDIED, "--gate-threshold", f"{threshold:g}")
        if (router := of_routers(threshold)) is not None:
            at = (*at, "--gate-router-threshold", f"{router:g}")
        found[f"column {threshold:g}"] = (*at, "--gate-repair", "column")
        found[f"span {threshold:g}"] = at
    found["exact"] = (*STUDIED, "--gate-guarantee", "exact")
    return found


def sequence_key(case: str, prompts: Sequence[Prompt], size: int) -> str:
    """The journal's name for a case's result."""
    return f"sequences {case} {len(prompts)} {size}"


def columns(client: Client, prompts: Sequence[Prompt], journal: Journal, count: int) -> None:
    """Compare up to `count` flipped answers' K/V columns, alone and in their batch.

    Each is walked again, with the same neighbours, in the largest batches that had flips.
    """
    key = f"columns {count}"
    if key in journal.notes or count == 0:
        return
    rows: dict[str, list[int]] = {}
    found = flips(journal.walks)
    size = max((flip["batch_size"] for flip in found), default=0)
    for flip in found:
        if flip["batch_size"] == size:
            rows.setdefault(flip["prompt"], []).append(flip["row"])
    chosen = sorted(rows)[:count]
    answers: list[dict[str, Any]] = []
    for group in groups(prompts, size) if size else ():
        names = {prompt.name for prompt in group} & set(chosen)
        if names:
            drift = _compare(client, group, names, journal)
            answers += [
                {"prompt": name, "batch_size": size, "flips": rows[name], **drift[name]}
                for name in sorted(names)
            ]
    journal.note(key, sorted(answers, key=lambda one: str(one["prompt"])))


def _compare(
    client: Client, group: Sequence[Prompt], names: set[str], journal: Journal
) -> dict[str, dict[str, Any]]:
    """How far the named requests' columns in this batch are from those alone."""
    for prompt in group:
        if prompt.name in names:
            client.flush()
            walk = journal.walks[ALONE, prompt.name]
            ask(client, [prompt], [along(walk, gate_columns={"keep": prompt.name})])
    client.flush()
    params = []
    for prompt in group:
        custom = {"gate_columns": {"against": prompt.name}} if prompt.name in names else {}
        params.append(along(journal.walks[ALONE, prompt.name], **custom))
    answers = {answer.name: answer for answer in ask(client, group, params)}
    return {name: answers[name].meta["gate"]["columns"] for name in names}


def sequences(
    client: Client,
    case: str,
    options: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    size: int,
    journal: Journal,
) -> None:
    """Answer freely, alone and in batches of `size` in two orders; count what is the same."""
    key = sequence_key(case, prompts, size)
    if key in journal.notes:
        return
    before = client.gate_state()
    compared = {prompt.name for prompt in prompts[:COMPARED]}
    alone: dict[str, Answer] = {}
    for prompt in prompts:
        client.flush()
        params = _free(prompt, compared, "keep")
        alone[prompt.name] = ask(client, [prompt], [params])[0]
    plain = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    batched = _answers(client, plain, compared)
    shuffled = _answers(client, list(groups(prompts, size)), set())
    after = client.gate_state()
    result = {
        "case": case,
        "options": list(options),
        "prompts": len(prompts),
        "batch_size": size,
        "identical": {
            "batched": identical(alone.values(), batched.values()),
            "shuffled": identical(alone.values(), shuffled.values()),
        },
        "counters": {name: after[name] - before[name] for name in COUNTERS},
        "drift": drift(alone, batched, compared),
    }
    journal.note(key, result)


def _free(prompt: Prompt, compared: set[str], what: str) -> dict[str, Any]:
    if prompt.name not in compared:
        return {}
    return {"custom_params": {"gate_columns": {what: prompt.name}}}


def _answers(
    client: Client, batches: Sequence[Sequence[Prompt]], compared: set[str]
) -> dict[str, Answer]:
    found = {}
    for batch in batches:
        client.flush()
        params = [_free(prompt, compared, "against") for prompt in batch]
        found.update({answer.name: answer for answer in ask(client, batch, params)})
    return found


def drift(
    alone: Mapping[str, Answer], answers: Mapping[str, Answer], names: set[str]
) -> dict[str, Any]:
    """Of the decoded columns up to where the tokens part: how many, and their distances.

    By layer (first, middle, last): relative L2, ascending at 50 %, 90 % and 100 %.
    """
    layers: list[list[float]] = []
    for name in sorted(names & set(answers)):
        found = answers[name].meta["gate"]["columns"]
        shared = common_prefix(alone[name].tokens, answers[name].tokens)  # row 2 holds token 1
        layers = layers or [[] for _ in found["rows"]]
        for distances, rows in zip(layers, found["rows"], strict=True):
            distances += [relative for _, relative in rows[:shared]]
    return {
        "columns": len(layers[0]) if layers else 0,
        "same_bits": sum(not any(each) for each in zip(*layers, strict=True)),
        "relative_l2": [_quantiles(sorted(distances)) for distances in layers],
    }


def _quantiles(ascending: Sequence[float]) -> list[float]:
    last = len(ascending) - 1
    return [ascending[round(share * last)] for share in (0.5, 0.9, 1.0)] if ascending else []
