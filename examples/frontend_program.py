"""A program in SGLang's frontend language, with fork and join, alone and in a batch.

Needs a server with --deterministic-gate. Status 1 if the answers differ, 2 if there were none.

python examples/frontend_program.py --base-url http://127.0.0.1:30000
"""

import argparse
import sys

import sglang as sgl

from margingate.frontend import Endpoint

TOPICS = ("sleeping well", "learning to cook", "growing tomatoes")
VIEWS = ("a reason to try it", "a common mistake")


@sgl.function
def advise(s, topic, tokens):
    s += sgl.user(f"Give advice on {topic}.")
    forks = s.fork(len(VIEWS))
    for fork, view in zip(forks, VIEWS):
        fork += sgl.assistant_begin() + f"Here is {view}: " + sgl.gen("part", max_tokens=tokens)
    forks.join()
    parts = " ".join(fork["part"] for fork in forks)
    s += sgl.assistant(parts)
    s += sgl.user("Sum it up.")
    s += sgl.assistant(sgl.gen("summary", max_tokens=tokens))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    try:
        sgl.set_default_backend(sgl.RuntimeEndpoint(args.base_url))
    except OSError as error:
        parser.exit(
            2,
            f"no SGLang server answers at {args.base_url} ({error}): start one with "
            "--deterministic-gate, or name another with --base-url.\n",
        )
    jobs = [{"topic": topic, "tokens": args.tokens} for topic in TOPICS]

    alone = [advise.run(**job, temperature=0) for job in jobs]
    batch = advise.run_batch(jobs, temperature=0, num_threads=len(jobs))

    same = [one["summary"] == other["summary"] for one, other in zip(alone, batch)]
    for topic, state, agrees in zip(TOPICS, batch, same):
        print(f"{topic}: {'the same' if agrees else 'CHANGED'}: {state['summary']!r}")
        print("   ", state.get_meta_info("summary")["gate"]["fingerprint"])

    # sgl.gen has no such argument, so the switch is the backend's, for whole programs.
    ungated = Endpoint(args.base_url, deterministic=False)
    state = advise.run(**jobs[0], temperature=0, backend=ungated)
    print("opted out:", state.get_meta_info("summary")["gate"])
    return int(not all(same))


if __name__ == "__main__":
    sys.exit(main())
