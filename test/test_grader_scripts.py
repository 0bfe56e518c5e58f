"""What the scripts for graders count: a digit, a letter or a token that differs is found."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.sameness import choices, evaluation_harness, scores
from margingate.study.score_check import Decoded, Readings, Scored, differences

TEXTS = ("One is here. It is the first one.", "Two are here. They are the second.") * 3


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return file


def test_documents_have_their_own_last_sentence_among_the_choices(prompts):
    made = evaluation_harness.documents(prompts, 6)
    assert [doc["choices"][doc["gold"]] for doc in made] == [doc["last"] for doc in made]
    assert [f"{doc['text']} {doc['last']}" for doc in made] == list(TEXTS)
    assert {doc["gold"] for doc in made} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="has 6 texts of two sentences"):
        evaluation_harness.documents(prompts, 7)


def written(folder: Path, loglik: str = "-1.5", answer: str = "a", acc: float = 0.5) -> Path:
    """Files as lm_eval writes them, of two documents a task, the second first."""
    folder.mkdir()
    results = {"gate_choice": {"acc,none": acc}, "gate_generate": {"chrf,none": 1.25}}
    table = {"results": results, "total_evaluation_time_seconds": "2.5"}
    (folder / "results_2026.json").write_text(json.dumps(table))
    said = {
        "gate_choice": [[[[loglik, "False"]], [["-9.0", "False"]]], [[["-2.0", "True"]]]],
        "gate_generate": [[[answer]], [["b"]]],
    }
    for task, (first, second) in said.items():
        lines = [{"doc_id": 1, "resps": second}, {"doc_id": 0, "resps": first}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"samples_{task}_2026.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changed", "differ"),
    [
        ({}, (0, 0, 0, "same")),
        ({"loglik": "-1.5000000000000002"}, (1, 0, 1, "same")),
        ({"answer": "c"}, (0, 1, 1, "same")),
        ({"acc": 0.75}, (0, 0, 0, "differ")),
    ],
)
def test_a_digit_or_a_letter_of_the_results_files_is_found(tmp_path, changed, differ):
    first = evaluation_harness.read(written(tmp_path / "a"))
    found = evaluation_harness.compare(
        first, evaluation_harness.read(written(tmp_path / "b", **changed))
    )
    counts = ("log-likelihoods", "answers", "lines of samples")
    assert (*(int(found[name].split()[0]) for name in counts), found["results"]) == differ
    assert evaluation_harness.same(found) is (not changed)


def test_prompts_are_joined_up_to_the_length_that_was_asked_for(prompts):
    made = scores.joined([prompts, prompts], 8, 3)
    assert len({name for name, _ in made}) == 8
    assert [text.count("here") for _, text in made] == [1, 2, 3, 1, 2, 3, 1, 2]


def readings(value: float) -> tuple[Scored, Readings]:
    """The scores of one prompt, and of one that was decoded with -1."""
    one = Scored([(5, -2.0), (6, value)], [[], []], 0)
    decoded = [Decoded([4, 5], Scored([(6, -1.0)], [[]], 0))]
    return one, Readings({"scores": "as_decoded"}, decoded, [one], {})


@pytest.mark.parametrize("value", [-1.0, -1.0000001])
def test_a_score_that_is_not_the_one_of_decoding_is_found(value):
    one, said = readings(value)
    tails = said.tails([one])
    found = differences(["a"], [said.decoded[0].answer], tails)
    counted = scores.counted({"prompts": found.prompts})
    clean = {"prompts": 0}
    runs = {"alone": {"first": clean, "decoded": counted}}
    server = {"scores": "as_decoded", "runs": runs}
    assert scores.sound({"64": server}, 1) is (value == -1.0)
    assert scores.sound({"64": {**server, "scores": "as_prefilled"}}, 1)
    assert not scores.sound({"64": server}, 2)


def output(tokens: list[int]) -> dict[str, Any]:
    gate = {"seed": 7, "fingerprint": "f"}
    entries = [[-0.5, token, None] for token in tokens]
    meta = {"gate": gate, "output_token_logprobs": entries}
    return {"output_ids": tokens, "text": "", "meta_info": meta}


def test_choices_of_a_stream_are_told_apart_and_compared():
    events = [{**output([1]), "index": 1}, {**output([2, 3]), "index": 0}]
    events.append({**output([1, 4]), "index": 1})
    said = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    found = [choices._choice(each) for each in choices._last_of_each(said)]
    assert [choice.tokens for choice in found] == [(2, 3), (1, 4)]
    other = copy.copy(found)
    other[1] = found[1]._replace(seed=8)
    assert choices.compare([found], [other]) == {"of": 2, "tokens": 2, "same": 1}
    assert choices.compare([found], [found]) == {"of": 2, "tokens": 2, "same": 2}
