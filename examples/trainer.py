"""A small trainer: GRPO on a toy reward. A gated server samples, torch and Transformers learn.

Each step asks the server for a group of answers to each prompt, a seed each, takes as reward the
share of a letter in an answer, and sends the layers that it trained back to the server. Then the
log-probs that the server gave with its samples are held to those that it gives to the same tokens
as a prompt, and to those of Transformers. In the end the first weights are put back and the first
samples are asked for again: same tokens, log-probs and fingerprint, or status 1. Status 2 if there
was no answer. Needs torch, transformers and requests, which come with sglang; minutes on a CPU.

python examples/trainer.py --base-url http://127.0.0.1:30000
"""

import argparse
import base64
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "Name three animals.",
    "What do you see at the sea?",
    "Write a line about the night.",
    "What is in a toolbox?",
)


class Server:
    """What a trainer asks of it."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def post(self, path: str, **body: object) -> dict:
        reply = requests.post(f"{self.base_url}/{path}", json=body, timeout=600)
        reply.raise_for_status()
        return reply.json()

    def generate(self, bodies: list[dict]) -> list[dict]:
        """All at once; answers in the order of the requests."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.post("generate", **body), bodies))

    def update(self, tensors: dict[str, torch.Tensor], version: str) -> None:
        """In one session; here in one part, of a large model in many. Empties the prefix cache."""
        content = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
        self.post("begin_weight_update")
        try:
            self.post(
                "update_weights_from_tensor",
                serialized_named_tensors=[content],
                weight_version=version,
            )
        finally:
            self.post("end_weight_update")


class Sample:
    """One answer, as token ids, with what the server says of it."""

    def __init__(self, prompt: list[int], answer: dict) -> None:
        self.prompt, self.output, self.text = prompt, answer["output_ids"], answer["text"]
        meta = answer["meta_info"]
        self.logprobs = [value for value, *_ in meta["output_token_logprobs"]]
        self.weights = (meta["gate"]["fingerprint"], *meta["gate"]["weight_generations"])

    def is_that_of(self, other: "Sample") -> bool:
        """Tokens, log-probs and fingerprint; the number of the generation may be another."""
        return (self.output, self.logprobs, self.weights[0]) == (
            (other.output, other.logprobs, other.weights[0])
        )


class Trainer:
    """The model as Transformers has it, in float32, of which the last layers are trained."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self.server, self.args = server, args
        folder = model_path(server)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.requires_grad_(False)
        for layer in self.model.model.layers[-args.layers :]:
            layer.mlp.requires_grad_(True)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=args.rate)
        self.prompts = [self._chat(text) for text in PROMPTS]

    def _chat(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        templated = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(templated, add_special_tokens=False)["input_ids"]

    def weights(self) -> dict[str, torch.Tensor]:
        """What the server gets: the trained ones, in its type."""
        return {name: p.detach().to(torch.bfloat16) for name, p in self.trained.items()}

    def sample(self, step: int) -> list[Sample]:
        """A group of answers to each prompt, each drawn with a seed of its own."""
        group = [prompt for prompt in self.prompts for _ in range(self.args.group)]
        params = {"temperature": 1, "max_new_tokens": self.args.tokens}
        bodies = [
            {
                "input_ids": prompt,
                "sampling_params": {**params, "sampling_seed": 1000 * step + i},
                "return_logprob": True,
            }
            for i, prompt in enumerate(group)
        ]
        answers = self.server.generate(bodies)
        return [Sample(prompt, answer) for prompt, answer in zip(group, answers)]

    def learn(self, samples: list[Sample]) -> float:
        """One step of GRPO with advantages within each group; returns the mean reward."""
        shares = [s.text.lower().count(self.args.letter) / max(len(s.text), 1) for s in samples]
        rewards = torch.tensor(shares).reshape(-1, self.args.group)
        spread = rewards.std(dim=1, keepdim=True) + 1e-6
        advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / spread).flatten()
        self.optimizer.zero_grad()
        for sample, advantage in zip(samples, advantages):
            loss = -advantage * logprobs(self.model, sample).mean() / len(samples)
            loss.backward()
        self.optimizer.step()
        return float(rewards.mean())


def model_path(server: Server) -> str:
    """The folder that the server serves; it must be on this machine."""
    reply = requests.get(f"{server.base_url}/model_info", timeout=60)
    reply.raise_for_status()
    return reply.json()["model_path"]


def logprobs(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """[tokens] float32, of the answer's tokens at temperature 1."""
    ids = torch.tensor([sample.prompt + sample.output])
    logits = model(ids).logits[0, len(sample.prompt) - 1 : -1].float()
    chosen = torch.tensor(sample.output)[:, None]
    return torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]


def scored(server: Server, samples: list[Sample], *, at_once: bool) -> list[list[float]]:
    """The server's own log-probs of the same tokens, read as a prompt."""
    bodies = [
        {
            "input_ids": s.prompt + s.output,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": len(s.prompt) - 1,
        }
        for s in samples
    ]
    answers = server.generate(bodies) if at_once else [server.generate([b])[0] for b in bodies]
    found = [answer["meta_info"]["input_token_logprobs"] for answer in answers]
    return [[value for value, *_ in values[1:]] for values in found]


@torch.no_grad()
def compare(trainer: Trainer, samples: list[Sample]) -> None:
    """Print how far other ways to the same log-probs are from those that came with the samples."""
    server, folder = trainer.server, trainer.model.name_or_path
    sent = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    sent.load_state_dict(trainer.weights(), strict=False)
    ways = {
        "the server, prompt and answer, one by one": scored(server, samples, at_once=False),
        "the server, prompt and answer, all at once": scored(server, samples, at_once=True),
        "Transformers in bfloat16": [logprobs(sent, s).tolist() for s in samples],
        "Transformers in float32, weights as sent": [
            logprobs(sent.float(), s).tolist() for s in samples
        ],
        "Transformers in float32, the trainer's own weights": [
            logprobs(trainer.model, s).tolist() for s in samples
        ],
    }
    print("\n| log-probs of the samples against | tokens | equal | mean distance | largest |")
    print("|---|---|---|---|---|")
    ours = torch.tensor([value for s in samples for value in s.logprobs], dtype=torch.float64)
    for name, found in ways.items():
        other = torch.tensor([value for values in found for value in values], dtype=torch.float64)
        far = (ours - other).abs()
        equal = int((far == 0).sum())
        print(f"| {name} | {len(far)} | {equal} | {far.mean():.2g} | {far.max():.2g} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--group", type=int, default=4, help="answers to each of 4 prompts")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--letter", default="e")
    parser.add_argument("--layers", type=int, default=4, help="how many of the last are trained")
    parser.add_argument("--rate", type=float, default=2e-4, help="of learning")
    args = parser.parse_args()
    try:
        return train(Server(args.base_url), args)
    except requests.ConnectionError:
        why = f"no server answers at {args.base_url}: start one with --deterministic-gate"
    except requests.HTTPError as error:
        why = f"{error}: start a server with --deterministic-gate"
    parser.exit(2, f"{why}, or name another with --base-url.\n")


def train(server: Server, args: argparse.Namespace) -> int:
    trainer = Trainer(server, args)
    before = trainer.weights()
    samples = first = trainer.sample(0)
    wrong = []
    try:
        for step in range(1, args.steps + 1):
            reward = trainer.learn(samples)
            server.update(trainer.weights(), version=f"step {step}")
            old, samples = samples[0].weights, trainer.sample(step)
            seen = {sample.weights for sample in samples}
            if len(seen) != 1 or old in seen:
                wrong.append(f"step {step}: samples of {seen}, before {old}")
            print(f"step {step}: mean reward {reward:.4f}; sampled with {samples[0].weights}")
        compare(trainer, samples)
    finally:
        server.update(before, version="as before")
    again = trainer.sample(0)
    same = sum(one.is_that_of(other) for one, other in zip(again, first))
    print(f"\nthe first weights again: {same} of {len(first)} samples as at first")
    if same < len(first):
        wrong.append("the first samples did not come back")
    print("\n".join(wrong) or "each sample has the fingerprint of its weights")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
