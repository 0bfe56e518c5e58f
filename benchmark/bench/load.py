"""Requests for servers with dummy weights, sent and measured by SGLang's own serving benchmark.

That is a library function here (`sglang.benchmark.serving.benchmark`), which takes parameters per
request. It wants a tokenizer and text; one is made up, of as many words as the model has token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

BACKEND = "margingate"  # a name of our own for SGLang's /generate client
LONGEST = 1024  # tokens of a ShareGPT-like prompt or answer
SLOWEST = 8  # requests of a run that are told one by one
# What SGLang's benchmark reads from its command line; its own defaults where it has some.
SETTINGS = {
    **{"backend": BACKEND, "dataset_name": "random-ids", "output_file": os.devnull},
    **{"temperature": 0.0, "top_p": 1.0, "disable_stream": False, "disable_ignore_eos": False},
    **{"return_logprob": False, "top_logprobs_num": 0, "token_ids_logprob": None},
    **{"logprob_start_len": -1, "return_routed_experts": False, "cache_report": False},
    **{"warmup_requests": 0, "plot_throughput": False, "output_details": False},
    **{"sharegpt_output_len": None, "random_input_len": 0, "random_output_len": 0},
    **{"random_range_ratio": 1.0, "header": None, "goodput": None},
}
FIGURES = (
    *("duration", "completed", "total_input_tokens", "total_output_tokens", "output_throughput"),
    *("total_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"),
    *("median_e2e_latency_ms", "concurrency", "max_concurrent_requests"),
)


def lengths(mix: str, count: int, seed: int) -> list[tuple[int, int]]:
    """Tokens in and out of so many requests.

    "sharegpt": log-normal with means of about 200, long tails as ShareGPT's first turns have,
    cut off at LONGEST. "1k-1k", "4k-1k", "32-16" and the like: all the same. ValueError for else.
    """
    if mix == "sharegpt":
        rng = random.Random(seed)
        draws = [
            (rng.lognormvariate(4.6, 1.25), rng.lognormvariate(4.9, 0.95)) for _ in range(count)
        ]
        return [(_clip(tokens_in), _clip(tokens_out)) for tokens_in, tokens_out in draws]
    found = re.fullmatch(r"(\d+)(k?)-(\d+)(k?)", mix)
    if found is None:
        raise ValueError(f"{mix!r} is no length mix: give sharegpt, or lengths such as 4k-1k.")
    tokens_in, tokens_out = (int(found[i]) * (1024 if found[i + 1] else 1) for i in (1, 3))
    return [(tokens_in, tokens_out)] * count


def _clip(length: float) -> int:
    return max(4, min(LONGEST, int(length)))


def requests(mix: str, count: int, seed: int, share: float) -> list[Any]:
    """DatasetRows of random token ids; a `share` of them, spread at random, stays gated."""
    from sglang.benchmark.datasets.common import DatasetRow

    rng = random.Random(seed)
    ungated = set(rng.sample(range(count), count - round(share * count)))
    rows = []
    for i, (tokens_in, tokens_out) in enumerate(lengths(mix, count, seed)):
        prompt = [rng.randrange(10, 30000) for _ in range(tokens_in)]
        params = {"temperature": 0, "max_new_tokens": tokens_out, "ignore_eos": True}
        params |= {"custom_params": {"deterministic": False}} if i in ungated else {}
        extra = {"sampling_params": params}
        rows.append(DatasetRow(prompt, tokens_in, tokens_out, extra_request_body=extra))
    return rows


class Load:
    """SGLang's serving benchmark, ready to be run against one server after another."""

    def __init__(self, folder: Path, vocabulary: int, log: Path) -> None:
        """
        Args:
            folder: where a tokenizer of `vocabulary` words is made, for the servers too.
            log: what SGLang's benchmark prints is added to it.
        """
        from sglang.benchmark import serving

        self._serving = serving
        self._log = log
        self.folder = folder
        self.tokenizer = make_tokenizer(folder, vocabulary)
        self._outputs: list[Any] = []
        serving.set_global_args(argparse.Namespace(**SETTINGS))
        # Under "sglang" it would ask for /server_info before it stops its clock.
        serving.ASYNC_REQUEST_FUNCS[BACKEND] = self._send

    async def _send(self, *args: Any, **kwargs: Any) -> Any:
        output = await self._serving.async_request_sglang_generate(*args, **kwargs)
        self._outputs.append(output)
        return output

    def run(self, base_url: str, rows: list[Any], rate: float, seed: int) -> dict[str, Any]:
        """Send the requests, `rate` a second in a Poisson process, or all at once (inf).

        Returns FIGURES, and as `slowest_ttft` milliseconds and prompt tokens of the SLOWEST first
        tokens with the second at which each request was sent.

        Raises RuntimeError naming the first request that failed.
        """
        self._outputs.clear()
        np.random.seed(seed)  # the times between requests
        with self._log.open("a") as log, contextlib.redirect_stdout(log):
            result = asyncio.run(self._benchmark(base_url, rows, rate))
        if failed := [output.error for output in self._outputs if not output.success]:
            raise RuntimeError(f"{len(failed)} of {len(rows)} requests failed: {failed[0]}")
        figures: dict[str, Any] = {name: float(result[name]) for name in FIGURES}
        begun = min(output.start_time for output in self._outputs)
        slowest = sorted(self._outputs, key=lambda output: output.ttft, reverse=True)[:SLOWEST]
        figures["slowest_ttft"] = [
            (round(1e3 * each.ttft, 1), each.prompt_len, round(each.start_time - begun, 3))
            for each in slowest
        ]
        return figures

    async def _benchmark(self, base_url: str, rows: list[Any], rate: float) -> dict[str, Any]:
        result: dict[str, Any] = await self._serving.benchmark(
            backend=BACKEND,
            api_url=f"{base_url}/generate",
            base_url=base_url,
            model_id="dummy",
            tokenizer=self.tokenizer,
            input_requests=rows,
            request_rate=rate,
            max_concurrency=None,
            disable_tqdm=True,
            lora_names=[],
            lora_request_distribution=None,
            lora_zipf_alpha=None,
            extra_request_body={},
            profile=False,
            warmup_requests=0,
        )
        return result


def make_tokenizer(folder: Path, vocabulary: int) -> Any:
    """A tokenizer whose token i is the word "ti", saved in `folder`: every token has a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # no token is special
    made.save_pretrained(folder)
    return made


def vocabulary(model: Path | str) -> int:
    """Token ids of a model folder."""
    config: dict[str, int] = json.loads((Path(model) / "config.json").read_text())
    return config["vocab_size"]
