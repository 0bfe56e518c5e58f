"""What clients may send to a gated server and what it says: names and meanings, for docs/api.md.

`margingate reference api` prints them; tests hold the names to what servers take and answer.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One name of the interface, and what it means in Markdown, with its unit."""

    name: str
    meaning: str


PARAMETERS = (
    Entry(
        "deterministic",
        "`true` or `false`: overrides `--gate-default` for this request. It is a sampling "
        "parameter of `/generate` and `sglang.Engine`, and a field beside OpenAI's parameters "
        '(`extra_body={"deterministic": False}` in its client). `custom_params["deterministic"]` '
        "means the same; the first goes before it.",
    ),
    Entry(
        "sampling_seed",
        "A whole number from 0 to 2^63 - 1 (OpenAI: `seed`). A request that samples with a seed is "
        "gated; one that samples without a seed is not. With `n` above 1 [each choice has a seed "
        "of its own](limits.md#several-choices-with-a-seed).",
    ),
    Entry(
        "return_routed_experts",
        "SGLang's own, with `--enable-return-routed-experts`: the experts of each token of a "
        'mixture of experts, in `meta_info["routed_experts"]` of the last output. Of a gated '
        "request they are [those of settled tokens](limits.md#experts-of-tokens), a row for each "
        "token of prompt and answer but the last.",
    ),
    Entry(
        'custom_params["gate_fault_rows"]',
        "For tests, with `--gate-inject-faults`: row numbers whose tokens the fast path corrupts. "
        "A negative number corrupts the row without a flag, and only an audit can tell.",
    ),
    Entry(
        'custom_params["gate_forced_ids"]',
        "For `margingate study`, with `--gate-study` and `--gate-policy observe`: token ids that "
        "are emitted whatever the model chooses.",
    ),
    Entry(
        'custom_params["gate_columns"]',
        'For `margingate study`, with `--gate-study`: `{"keep": KEY}` keeps the K/V columns of the '
        'request, `{"against": KEY}` compares its columns with those kept.',
    ),
)

# Of one request in its record; in /server_info, sums over all gated requests.
COUNTS = (
    Entry(
        "steps",
        "tokens emitted; the first one, which the prefill chooses, is included, and with "
        "`max_new_tokens` 0 it is not sent",
    ),
    Entry("flagged", "rows that the policy wanted verified"),
    Entry(
        "replayed", "rows that were verified only because a later row of the request was flagged"
    ),
    Entry("verified", "rows that verify passes computed"),
    Entry("flips", "verified rows whose token differed and was repaired before it was sent"),
    Entry(
        "missed",
        "verified rows whose token differed after it had been sent: the token stands. Should be 0.",
    ),
    Entry("rolled_back", "tokens dropped by flips; the replaced token is included"),
    Entry("repaired", "K/V columns rewritten in place"),
    Entry("passes", "verify passes; of one request, those that it had rows in"),
    Entry("retractions", "times a request lost its K/V memory and was replayed"),
    Entry(
        "drain_s",
        "seconds from the last token of a request to the verdict on its last rows",
    ),
    Entry("settle_s", "seconds in which a request had a token that was not settled"),
)

RECORD = (
    Entry("gated", "whether the gate served this request; `false` comes with `because`"),
    Entry("because", "only where `gated` is `false`: why the request was not gated"),
    Entry(
        "prompt",
        "16 hexadecimal digits: a hash of the token ids of the prompt, and of its images",
    ),
    Entry(
        "seed",
        "only where tokens were drawn: the seed that they were drawn with. A single request with "
        "this seed gives this choice.",
    ),
    Entry(
        "fingerprint",
        "16 hexadecimal digits: a hash of all that the answer depends on besides the request. "
        "[Equal fingerprints promise equal answers](limits.md#the-fingerprint). `null` where "
        "nothing is promised.",
    ),
    Entry("fingerprint_because", "only where `fingerprint` is `null`: why there is none"),
    Entry(
        "scores",
        "only where log-probs of the prompt's own tokens were asked for: [what they are]"
        "(limits.md#scores). `as_decoded`: bit for bit those that decoding the same tokens gives. "
        "`as_prefilled`: those that a prefill gives, whatever is beside it.",
    ),
    Entry(
        "weight_generations",
        "of the weights that computed it, in order: how often they had been replaced since the "
        "start. More than one where they were replaced meanwhile.",
    ),
    Entry("guarantee", "`--gate-guarantee` of the server"),
    Entry("fast_path", "`--gate-fast-path` of the server"),
    Entry("policy", "`--gate-policy` of the server"),
    Entry("threshold", "`--gate-threshold` of the server, logits"),
    Entry("simulated", "`true` on a server that makes verdicts up, for benchmarks; else absent"),
    Entry("columns", "only with `--gate-study`: how far K/V columns are from those kept"),
    Entry("choices", "only with `--gate-study`, of requests that are not gated: choices by row"),
)

SERVER = (
    Entry("replica", "the data-parallel rank of the replica that says this; 0 where there is one"),
    Entry("trigger_rate", "`flagged` / `steps`"),
    Entry("reasons", "rows by why they were flagged or left alone ([reasons](metrics.md))"),
    Entry("canonical_steps", "decode forwards that needed no verification"),
    Entry(
        "canonical_rows",
        "a sentence: the row counts at which the check at start found decode steps canonical; "
        "`None` on the stock fast path",
    ),
    Entry("margins", "histograms of the margins of all steps and of the flips: edges in logits"),
    Entry("passes_by_reason", "verify passes by why they were due ([reasons](metrics.md))"),
    Entry("merged_passes", "verify passes that shared a forward with a decode step"),
    Entry("max_delay", "decode steps that flagged rows wait at most, at present"),
    Entry("open", "gated requests now that have a token and no end"),
    Entry("held", "gated requests now whose end waits for verification"),
    Entry("largest_batch", "most requests that one decode step had"),
    Entry("tally", "sums over decode steps and waits, below"),
    Entry("audit", "what `--gate-audit-rate` found, below"),
    Entry(
        "integrity",
        '`"ok"`, or the first invariant that does not hold; checked as this is asked, of a server '
        "that is not idle once a minute at most",
    ),
    Entry(
        "hooks_fired", "calls of each patch in the scheduler so far, by target ([list](hooks.md))"
    ),
    Entry("hooks_failed", "those of them that raised; each ended at most what the list says"),
    Entry("fingerprint", "that of a request that would be admitted now"),
    Entry("fingerprint_because", "only where `fingerprint` is `null`: why there is none"),
    Entry("fingerprint_of", "the parts of the fingerprint, by which two servers can be compared"),
    Entry("weight_generation", "how often the weights were replaced since the start"),
    Entry("guarantee", "`--gate-guarantee`"),
    Entry("policy", "`--gate-policy`"),
    Entry("fast_path", "`--gate-fast-path`"),
    Entry("overlap", "whether overlap scheduling is on"),
    Entry(
        "prefill",
        "`together`: gated prompts share prefill forwards. `as_decoded`: a prefill gives the bits "
        "of decode steps, and answers enter the prefix cache.",
    ),
    Entry(
        "images",
        "`canonical`: gated requests with images are served. Else why they are "
        "[not](limits.md#images), in words.",
    ),
    Entry("scores", "what the log-probs of prompts are: `as_decoded` or `as_prefilled`, as above"),
    Entry("machine", "device, types, attention backends and versions that margins depend on"),
    Entry("probe", "what was measured of each operator and of whole decode steps at start"),
)

# With --dp-size above 1.
REPLICAS = (
    Entry("count", "replicas"),
    *(Entry(name, "the sum") for name in ("canonical_steps", "merged_passes", "open", "held")),
    *(
        Entry(name, "the sums, by name")
        for name in ("reasons", "passes_by_reason", "hooks_fired", "hooks_failed")
    ),
    Entry("trigger_rate", "of the sums"),
    Entry("largest_batch", "of the replica with the largest"),
    Entry("integrity", '`"ok"`, or that of the first replica where it is not, with its number'),
    Entry("fingerprint", "that of all replicas; `null` where one has none, or they differ"),
    Entry("fingerprint_because", "only where `fingerprint` is `null`: of which replica, or which"),
)

TALLY = (
    Entry("exact", "whether the guarantee is `exact`"),
    Entry("decode_steps", "decode forwards with gated requests in them"),
    Entry("quiet_steps", "those of them that asked for no verification"),
    Entry("pass_rows", "rows of verify passes, padding not counted"),
    Entry("waits", "times a request had tokens that were not settled"),
    Entry("waited_s", "seconds in that state, summed over the waits"),
)

AUDIT = (
    Entry("rate", "`--gate-audit-rate`"),
    Entry("waiting", "requests that wait to be replayed"),
    Entry("audited", "requests that were replayed and compared"),
    Entry("tokens", "output tokens compared"),
    Entry("mismatches", "requests with a token that differs. Should be 0."),
    Entry("margins", "margins compared"),
    Entry("logprobs", "log-probs compared"),
    Entry("columns", "K/V columns compared"),
    Entry("bits", "bits of margins, log-probs and K/V columns compared"),
    Entry("bit_mismatches", "requests with the same tokens and other bits. Should be 0."),
    Entry("bit_mismatches_by_kind", "requests by what differed, whatever their tokens"),
    Entry("dropped", "requests that were chosen and not compared"),
    Entry("mismatch_bound", "upper bound on the share of requests with a token that differs"),
    Entry("confidence", "of this bound"),
)
