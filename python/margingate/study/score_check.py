"""Whether a server's log-probs of given tokens depend on how and beside what they are computed.

For any SGLang server, gated or not. Prompts are decoded greedily; then prompt and answer are scored
in one go: alone with an empty prefix cache, all at once, and from the cache.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from margingate.errors import CliError
from margingate.harness.chat_client import Pair
from margingate.harness.inputs import in_a_line, refuse_key
from margingate.harness.progress import Bar, progress
from margingate.study.batch_check import CheckOptions, with_session

if TYPE_CHECKING:
    from aiohttp import ClientSession

TOP = 3  # likeliest tokens of each position that are compared too
RUNS = {
    "batched": "all at once, nothing cached",
    "cached": "alone, the prefix cached",
    "together": "all at once, the prefixes cached",
}
_ROOM_S = 20.0  # for a server to become idle, so that its cache can be emptied

Entries = list[tuple[int, float]]  # token id and log-prob, in order


@dataclass
class Difference:
    """Between two readings of the same log-probs."""

    prompts: list[str] = field(default_factory=list)  # those with one that differs
    tokens: int = 0  # log-probs compared
    differ: int = 0  # those of them with other bits
    largest: float = 0.0  # distance of two, in nats
    lists: int = 0  # positions whose likeliest tokens, or their log-probs, differ


@dataclass(frozen=True)
class Scored:
    """What a server said of the tokens from one position on."""

    entries: Entries
    top: list[Entries]
    cached: int  # tokens of the prefix that came from the cache


@dataclass(frozen=True)
class Decoded:
    """A prompt with its answer, and the log-probs of the answer as it was decoded."""

    ids: list[int]  # of the prompt
    answer: Scored

    @property
    def whole(self) -> list[int]:
        return [*self.ids, *(token for token, _ in self.answer.entries)]

    @property
    def start(self) -> int:
        """From here on tokens are scored: half of the prompt, whose other half may be cached."""
        return len(self.ids) // 2


@dataclass(frozen=True)
class Readings:
    """All that a server said of the same tokens, in the order of the prompts."""

    server: dict[str, Any]  # "scores" and "fingerprint" of a gated one, else None
    decoded: list[Decoded]
    alone: list[Scored]  # nothing cached
    runs: dict[str, list[Scored]]  # those of RUNS

    def tails(self, scored: Sequence[Scored]) -> list[Scored]:
        """Of these scores those of the answers' tokens, which were decoded too."""
        lengths = [len(each.answer.entries) for each in self.decoded]
        return [_tail(each, length) for each, length in zip(scored, lengths, strict=True)]


def check_scores(options: CheckOptions, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Every run against the server; raises CliError where it does not answer as expected."""
    read = read_scores(options, pairs)
    names = [name for name, _ in pairs]
    runs = {
        run: asdict(differences(names, read.alone, said)) | {"hits": hits(said)}
        for run, said in read.runs.items()
    }
    answers = [each.answer for each in read.decoded]
    decoded = asdict(differences(names, answers, read.tails(read.alone)))
    about = {"base_url": options.base_url, "tokens": options.tokens, "prompts": len(pairs)}
    return {"schema": 1, **about, **read.server, "decoded": decoded, "runs": runs}


def read_scores(
    options: CheckOptions, pairs: Sequence[Pair], decoded: list[Decoded] | None = None
) -> Readings:
    """Ask the server for the same scores in every way; raises CliError as `check_scores` does.

    Args:
        decoded: what another server answered to `pairs`, to be scored; None: this one decodes.
    """

    async def work(session: ClientSession, root: str) -> Readings:
        return await _Check(session, root, options.tokens).run(pairs, decoded)

    return asyncio.run(with_session(options, work))


class _Check:
    """The runs against one server, through its `/generate`."""

    def __init__(self, session: ClientSession, root: str, tokens: int) -> None:
        self._session, self._root, self._tokens = session, root, tokens

    async def run(self, pairs: Sequence[Pair], decoded: list[Decoded] | None) -> Readings:
        server = await self._server()
        with progress(((decoded is None) + 1 + len(RUNS)) * len(pairs)) as bar:
            if decoded is None:
                bar.say("decoding")
                decoded = [await self._decode(text, bar) for _, text in pairs]
            bar.say("alone")
            alone = [await self._score_cold(each, bar) for each in decoded]
            runs = {}
            for run, words in RUNS.items():
                bar.say(words)
                runs[run] = await self._again(run, decoded, bar)
        return Readings(server, decoded, alone, runs)

    async def _again(self, run: str, decoded: Sequence[Decoded], bar: Bar) -> list[Scored]:
        if run == "cached":
            return [await self._score_cached(each, bar) for each in decoded]
        if run == "batched":
            await self._flush()
        return await asyncio.gather(*(self._score(each, bar) for each in decoded))

    async def _score_cold(self, decoded: Decoded, bar: Bar) -> Scored:
        await self._flush()
        return await self._score(decoded, bar)

    async def _score_cached(self, decoded: Decoded, bar: Bar) -> Scored:
        await self._score(decoded, None)
        return await self._score(decoded, bar)

    async def _decode(self, text: str, bar: Bar) -> Decoded:
        reply = await self._generate(
            bar,
            text=text,
            sampling_params={"temperature": 0, "max_new_tokens": self._tokens},
            return_prompt_token_ids=True,
        )
        ids = reply.get("prompt_token_ids")
        if ids is None:
            raise CliError(
                f"{self._root}/generate answered without prompt_token_ids, which --scores needs "
                "and SGLang's router does not hand on: check each server by itself."
            )
        return Decoded(list(ids), _scored(reply["meta_info"], "output", 0))

    async def _score(self, decoded: Decoded, bar: Bar | None) -> Scored:
        reply = await self._generate(
            bar,
            input_ids=decoded.whole,
            sampling_params={"temperature": 0, "max_new_tokens": 0},
            logprob_start_len=decoded.start,
        )
        return _scored(reply["meta_info"], "input", 1)  # the first has none before it

    async def _generate(self, bar: Bar | None, **body: Any) -> Any:
        asked = {"return_logprob": True, "top_logprobs_num": TOP, **body}
        url = f"{self._root}/generate"
        async with self._session.post(url, json=asked) as response:
            refuse_key(self._root, response.status)
            said = await response.text(errors="replace")
        if response.status != 200:
            raise CliError(
                f"{url} answered {response.status} ({in_a_line(said)}): name an SGLang server, or "
                "see its log."
            )
        if bar is not None:
            bar.tick()
        return _with_logprobs(url, said)

    async def _flush(self) -> None:
        """Empty the prefix cache, which a server does when it is idle."""
        url, clock = f"{self._root}/flush_cache", asyncio.get_running_loop().time
        deadline = clock() + _ROOM_S
        while True:
            async with self._session.post(url) as response:
                refuse_key(self._root, response.status)
            if response.status == 200:
                return
            if clock() > deadline:
                raise CliError(
                    f"{url} answered {response.status} for {_ROOM_S:.0f} seconds: let nothing else "
                    "use the server meanwhile."
                )
            await asyncio.sleep(0.1)

    async def _server(self) -> dict[str, Any]:
        """What a gated server says of its scores, and its fingerprint; None of any other."""
        async with self._session.get(f"{self._root}/server_info") as response:
            refuse_key(self._root, response.status)
            try:
                state = json.loads(await response.text())["internal_states"][0]["margingate"]
                return {name: state[name] for name in ("scores", "fingerprint")}
            except (ValueError, KeyError, IndexError, TypeError):
                return dict.fromkeys(("scores", "fingerprint"))


def _with_logprobs(url: str, said: str) -> Any:
    try:
        reply = json.loads(said)
        reply["meta_info"]["output_token_logprobs"]
    except (ValueError, KeyError, TypeError):
        raise CliError(
            f"{url} answered without log-probs ({in_a_line(said)}): name an SGLang server."
        ) from None
    return reply


def _scored(meta: dict[str, Any], side: str, first: int) -> Scored:
    """Of the prompt (`input`) or the answer (`output`), from its entry `first` on."""
    entries = meta[f"{side}_token_logprobs"][first:]
    lists = meta[f"{side}_top_logprobs"][first:]
    return Scored(_pairs(entries), [_pairs(each or ()) for each in lists], meta["cached_tokens"])


def _pairs(entries: Sequence[Sequence[Any]]) -> Entries:
    return [(token, logprob) for logprob, token, *_ in entries]


def _tail(scored: Scored, count: int) -> Scored:
    """Of its last `count` tokens."""
    at = len(scored.entries) - count
    return Scored(scored.entries[at:], scored.top[at:], scored.cached)


def hits(said: Sequence[Scored]) -> int:
    """Prompts with tokens from the cache."""
    return sum(each.cached > 0 for each in said)


def differences(names: Sequence[str], one: Sequence[Scored], other: Sequence[Scored]) -> Difference:
    """Of readings in the order of `names`, each of the same tokens in the same order."""
    found = Difference()
    for name, a, b in zip(names, one, other, strict=True):
        before = (found.differ, found.lists)
        for mine, theirs in zip(a.entries, b.entries, strict=True):
            found.tokens += 1
            found.differ += mine != theirs
            found.largest = max(found.largest, abs(mine[1] - theirs[1]))
        found.lists += sum(x != y for x, y in zip(a.top, b.top, strict=True))
        if (found.differ, found.lists) != before:
            found.prompts.append(name)
    return found


def changed_names(result: dict[str, Any]) -> set[str]:
    """Prompts whose scores changed in any run, or are not those of decoding.

    The second counts unless the server says that its scores are those of a prefill.
    """
    found = [each["prompts"] for each in result["runs"].values()]
    if result["scores"] != "as_prefilled":
        found.append(result["decoded"]["prompts"])
    return set().union(*found)
