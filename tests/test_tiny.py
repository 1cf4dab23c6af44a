"""The embedded task: what it promises about its problems, its model and its errors."""

import random

import pytest

from align.models import load_model, load_tokenizer
from align.records import read_records
from align.sample import SampleConfig, generate
from align.tiny import build_tokenizer, draw_demonstration, first_error, make_problems, miscalculations
from align.tokens import add_eos
from align.verify import verify_completion

DATA = "data/tiny-arithmetic"


@pytest.fixture(autouse=True)
def at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def follow(problem: dict) -> int:
    """Solves a story by reading its sentences, without the generator."""
    sentences = problem["prompt"].split("How many")[0].strip().rstrip(".").split(". ")
    name, _, count, thing = sentences[0].split()
    count = int(count)
    for words in (sentence.split() for sentence in sentences[1:]):
        who, verb = words[:2]
        if who != name:
            continue
        if verb == "doubles":
            count *= 2
        else:
            assert words[3] == thing
            count += int(words[2]) if verb in ("buys", "finds") else -int(words[2])
    return count


def test_shipped_problems_are_right_and_disjoint():
    train, test = (read_records(f"{DATA}/{split}.jsonl", "problem") for split in ("train", "test"))
    assert len(train) == 3000 and len(test) == 1000
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in test}
    for problem in train + test:
        assert follow(problem) == int(problem["answer"])
        assert verify_completion(problem["solution"], problem["answer"]).correct
        assert miscalculations(problem["solution"]) == 0
    assert test[:50] == make_problems(50, 0, "test")  # the script's, still


def test_demonstrations_err_in_decisions_only():
    rng = random.Random(5)
    wrong = 0
    for _ in range(2000):
        prompt, solution = draw_demonstration(rng)
        assert miscalculations(solution) == 0
        wrong += not verify_completion(solution, str(follow({"prompt": prompt}))).correct
    assert 0.45 < wrong / 2000 < 0.6
    assert miscalculations(" buys: 3+4=8; loses: 8-1=7; #### 7") == 1
    assert miscalculations(" buys: 3+=8; #### 7") == 1


def test_tokenizer_keeps_text_and_boundary():
    shipped, built = load_tokenizer(f"{DATA}/model"), build_tokenizer()
    for text in (
        "Tom has 12 apples. naïve 🦆\n  x",
        *(p["prompt"] + p["solution"] for p in make_problems(20, 3, "train")),
    ):
        ids = shipped(text)["input_ids"]
        assert shipped.decode(ids) == text
        assert built(text)["input_ids"] == ids
    problem = make_problems(1, 9, "train")[0]
    apart = shipped(problem["prompt"])["input_ids"] + shipped(problem["solution"])["input_ids"]
    assert apart == shipped(problem["prompt"] + problem["solution"])["input_ids"]


def test_the_base_can_calculate_and_decides_wrongly():
    model, tokenizer = load_model(f"{DATA}/model", dtype="float32"), load_tokenizer(f"{DATA}/model")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    problems = read_records(f"{DATA}/test.jsonl")[:300]
    drawn = generate(
        model, tokenizer, [tokenizer(p["prompt"])["input_ids"] for p in problems], SampleConfig(max_new_tokens=80), 0
    )
    right = miscalculated = 0
    for problem, [(ids, reason)] in zip(problems, drawn, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        solution = add_eos(tokenizer(problem["solution"])["input_ids"], tokenizer.eos_token_id)
        exact = first_error(ids, solution) is None
        assert not exact or verify_completion(text, problem["answer"]).correct
        right += exact
        miscalculated += miscalculations(text) > 0
        assert reason == "stop"
    assert 0.3 < right / 300 < 0.6
    assert miscalculated / 300 < 0.05


@pytest.mark.parametrize(
    "given, right, place",
    [([1, 2, 3], [1, 2, 3], None), ([1, 9, 3], [1, 2, 3], 1), ([1, 9], [1, 2, 3], 1), ([1, 2], [1, 2, 3], 1), ([1, 2, 3, 4], [1, 2, 3], 3)],
)  # fmt: skip
def test_first_error(given, right, place):
    assert first_error(given, right) == place
