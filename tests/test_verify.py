"""Finding and comparing answers: each rule, hostile text, and agreement with verdicts of real solutions."""

import json
import os
import random
import threading
from pathlib import Path

import pytest

from align.errors import MissingColumnError
from align.records import read_records, write_records
from align.verify import answers_equal, canonical_answer, extract_answer, verify, verify_completion, verify_records


@pytest.mark.parametrize(
    "text, answer, rule",
    [
        ("so 3+4=7\n#### 7", "7", "hash"),
        ("#### 18 dollars", "18", "hash"),
        ("#### 5 hours and 30 minutes", "5 hours and 30 minutes", "hash"),
        ("#### 3/4 of it", "3/4", "hash"),
        ("#### x^2 + 1", "x^2 + 1", "hash"),
        ("#### 12.50 (per person)", "12.5", "hash"),
        ("#### 12.5kg", "12.5kg", "hash"),
        ("The answer is $2.5\\%$.", "2.5", "answer_is"),
        ("The answer is 1,234.5 (total)", "1234.5", "answer_is"),
        ("#### 2.5\\text{ hours}", "2.5", "hash"),
        ("#### 5\nwait\n#### 1,234.", "1,234", "hash"),
        ("the answer is 4\n#### ", "4", "answer_is"),
        (r"thus \boxed{\frac{1}{2}} holds", r"\frac{1}{2}", "boxed"),
        (r"\boxed{3} no, \boxed{x^{2}+1}", "x^{2}+1", "boxed"),
        (r"the answer is 9, \boxed{oops", "9", "answer_is"),
        ("She makes 26.\nA: 26", "26", "answer_is"),
        ("A: $1,200", "$1,200", "answer_is"),
        ("A: 5 hours", "5", "answer_is"),
        ("A: -3.50", "-3.50", "answer_is"),
        ("A: 1/5", "1/5", "answer_is"),
        ("Final answer: 12%", "12%", "answer_is"),
        ("**Answer:** 18", "18", "answer_is"),
        ("The answer is 14. That was easy, 3 steps", "14", "answer_is"),
        ("Therefore, the final answer is $72$.", "72", "answer_is"),
        ("The answer is x = 5.", "5", "answer_is"),
        ("the answer is (3, 4)", "(3, 4)", "answer_is"),
        ("The answer is 1, 2, 3.", "1, 2, 3", "answer_is"),
        ("The answer is 5, since 2+3=5", "5", "answer_is"),
        ("He has 3 and then 1,050 apples left.", "1,050", "last_number"),
        ("that is 16-3=<<16-3=13>>13", "13", "last_number"),
        ("it costs $-2.5 in all", "-2.5", "last_number"),
        ("A:\n", None, None),
        ("no number here", None, None),
        ("", None, None),
        ("she pays 20170 = <<20170", None, None),
        ("feet * 2 = 65536 feet, then 65536 feet * 2 =", None, None),
    ],
)
def test_rules(text, answer, rule):
    found, found_rule = extract_answer(text)
    assert found_rule == rule
    if answer is None:
        assert found is None
    else:
        assert canonical_answer(found) == canonical_answer(answer)


@pytest.mark.parametrize(
    "left, right, equal",
    [
        ("1,000", "1000", True), ("1000.00", "1000", True), ("$18", "18", True), ("0.5", "1/2", True), ("-7", "−7", True),
        ("26.5", "26", False), ("1.8", "18", False), ("12%", "12", True), ("8.333333333333334", "300", False),
        (r"\frac{1}{2}", "0.5", True), (r"2\sqrt{5}", r"\sqrt{20}", True), (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"x^2+1", r"1+x^2", True), (r"\sqrt{2}", r"\sqrt{3}", False), (r"\text{even}", r"\text{odd}", False),
    ],
)  # fmt: skip
def test_equality_holds_both_ways(left, right, equal):
    assert answers_equal(left, right) is equal
    assert answers_equal(right, left) is equal


def test_reference_may_be_a_gsm8k_solution():
    assert verify_completion("A: 72", "48/2 = 24\n48+24 = 72\n#### 72").correct


def test_canonical_answers_group():
    assert {canonical_answer(a) for a in ("1,000", "1000.0", "$1000", " 1000 ", "2000/2")} == {"1000"}
    assert canonical_answer("  ") is None and canonical_answer(None) is None
    assert canonical_answer("x  +  1") == canonical_answer("x + 1") != canonical_answer("x + 2")


HOSTILE = [
    "#### " * 5000, "\\boxed{" * 5000, "{" * 100_000, "A: " * 50_000, "9" * 200_000, "1," * 50_000, "-" * 50_000, "\x00\ud800",
    "answer is " * 20_000, "#### 9^9^9^9", "#### 10**10**10", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{99999!}", "#### " + "(" * 5000,
    "the answer is 1e999999999", "#### 1/0", "<<" * 30_000, "\\boxed{\\frac{1}{0}}", "#### \\int_0^\\infty x^x dx",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_incorrect_never_an_exception(text):
    assert verify_completion(text, "42").correct is False


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = [
        "####",
        "\\boxed{",
        "}",
        "A:",
        "answer is",
        "\n",
        " ",
        "$",
        "%",
        ",",
        ".",
        "/",
        "-",
        "1",
        "23",
        "=",
        "\\frac",
        "é",
        "\x85",
    ]
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))
        extracted, rule = extract_answer(text)
        assert (extracted is None) == (rule is None)
        canonical_answer(extracted)


def test_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(answers_equal(r"2\sqrt{5}", r"\sqrt{20}")))
    thread.start()
    thread.join()
    assert found == [True]


def sample_row(**kwargs):
    return {
        "id": "a", "prompt": "q", "answer": "7", "sample": 0, "prompt_ids": [1], "completion_ids": [2],
        "completion": "#### 7", "finish_reason": "stop",
    } | kwargs  # fmt: skip


def test_stage_counts_and_skips(tmp_path):
    rows = [
        sample_row(),
        sample_row(sample=1, completion="A: 8"),
        sample_row(sample=2, completion="hm", finish_reason="length"),
    ]
    write_records(tmp_path / "samples.jsonl", rows)
    counts = verify(tmp_path / "samples.jsonl", tmp_path / "verdicts.jsonl")
    assert counts == {
        "rows": 3, "correct": 1, "incorrect": 2, "no_answer": 1, "truncated": 1, "rule_hash": 1, "rule_answer_is": 1
    }  # fmt: skip
    verdicts = read_records(tmp_path / "verdicts.jsonl", "verdict")
    assert [(v["extracted"], v["rule"], v["correct"]) for v in verdicts] == [
        ("7", "hash", True), ("8", "answer_is", False), (None, None, False)
    ]  # fmt: skip
    written = (tmp_path / "verdicts.jsonl").stat().st_mtime_ns
    assert verify(tmp_path / "samples.jsonl", tmp_path / "verdicts.jsonl") == counts
    assert (tmp_path / "verdicts.jsonl").stat().st_mtime_ns == written
    write_records(tmp_path / "samples.jsonl", rows[:1])
    assert verify(tmp_path / "samples.jsonl", tmp_path / "verdicts.jsonl")["rows"] == 1
    with pytest.raises(MissingColumnError, match="finish_reason"):
        verify_records([{k: v for k, v in sample_row().items() if k != "finish_reason"}])


STYLE = [  # solutions in the manner of calculator-annotated models, made up
    ("Each box holds 6*4=<<6*4=24>>24 eggs\nSo 3 boxes hold 24*3=<<24*3=72>>72 eggs\nA: 72", "72", True),
    ("She earns 12*40=$<<12*40=480>>480 a week\nA: 480", "1,920", False),
    ("He keeps 10-2.5=<<10-2.5=7.5>>7.5 liters\nA: 7.5", "7", False),
    ("The debt is 5-9=<<5-9=-4>>-4\nA: -4", "-4", True),
    ("They need 1200/12=<<1200/12=100>>100 crates\nA: 100.0", "100", True),
    ("It grows 2*2*2*2=<<2*2*2*2=16>>16 times, 16 * 3 = <<16*3=48>>48, so", "16", False),
    ("The total cost is 45+55 = <<45+55=100>>100 dollars for", "45", False),
    ("It takes 3/4 of the time, 4*3/4 =<<4*3/4=", "3", False),
    ("A: 12\nA: 13", "13", True),
    ("Population: 1500000\nA: 1500000", "1,500,000", True),
]


@pytest.mark.parametrize("completion, answer, correct", STYLE)
def test_calculator_annotated_solutions(completion, answer, correct):
    assert verify_completion(completion, answer).correct is correct


def test_agrees_with_given_verdicts():
    """Reads a JSONL file of `completion`, `answer`, `is_correct`, such as GSM8K's published model solutions."""
    path = os.environ.get("ALIGN_GSM8K_SOLUTIONS")
    if not path:
        pytest.skip("set ALIGN_GSM8K_SOLUTIONS to a JSONL file of completion, answer, is_correct")
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 100
    wrong = [
        r["completion"] for r in rows if verify_completion(r["completion"], r["answer"]).correct != r["is_correct"]
    ]
    assert wrong == []
