"""Selection of pairs and the accuracy figures, against small cases counted by hand and by enumeration."""

from itertools import combinations

import pytest

from align.errors import ConfigError, RecordError
from align.evaluate import evaluate_verdicts, interval, majority_at_k, pass_at_k
from align.pair import PairConfig, pair, select_pairs
from align.records import read_records, write_records


def verdicts(answers: str, problem: str = "a", right: str = "r"):
    """One letter per draw: `r` is right, `-` no answer, `~` cut off; every other letter a wrong answer."""
    return [
        {
            "id": problem, "prompt": "q", "answer": right, "sample": i, "prompt_ids": [1], "completion_ids": [i + 2],
            "completion": f"{problem}{i}", "finish_reason": "length" if letter == "~" else "stop",
            "extracted": None if letter == "-" else letter, "correct": letter == right,
        }
        for i, letter in enumerate(answers)
    ]  # fmt: skip


def test_selection_of_the_paper():
    # wrong: x 4, y 2, z 1, w 1 of 8; half of them is covered by x alone
    result = select_pairs(verdicts("xrxyxryzxw-~"))
    assert [row["completion"] for row in result.positive] == ["a1"]
    assert [row["completion"] for row in result.negative] == ["a0"]
    assert [(p["chosen"], p["rejected"], p["rejected_answer"]) for p in result.pairs] == [("a1", "a0", "x")]
    more = select_pairs(verdicts("xrxyxryzxw-~"), PairConfig(negative_coverage=0.6, pairs_per_problem=3))
    assert [row["completion"] for row in more.negative] == ["a0", "a3"]
    assert [(p["id"], p["chosen"], p["rejected"]) for p in more.pairs] == [("a", "a1", "a0"), ("a#1", "a5", "a3")]


def test_every_drop_is_counted():
    rows = (
        verdicts("rr", "only right")
        + verdicts("xy", "only wrong")
        + verdicts("-~", "neither")
        + verdicts("rx-~", "both")
    )
    rows[0]["completion_ids"] = []
    counts = select_pairs(rows).counts
    assert counts == {
        "completions": 10, "completions_no_answer": 2, "completions_truncated": 2, "completions_empty": 1, "problems": 4,
        "problems_without_correct": 1, "problems_without_wrong": 1, "problems_without_either": 1,
        "positive": 2, "negative": 2, "pairs": 1,
    }  # fmt: skip


def test_equal_answers_are_one_group():
    rows = verdicts("xxryy")
    for row, answer in zip(rows, ("1,000", "1000.0", "r", "7", "7.0"), strict=True):
        row["extracted"] = answer
    rows.append({**rows[3], "sample": 5, "extracted": "7.00", "completion": "a5"})
    assert select_pairs(rows).pairs[0]["rejected_answer"] == "7"  # three sevens against two thousands


def test_no_pair_at_all_is_an_error_that_says_why(tmp_path):
    write_records(tmp_path / "v.jsonl", verdicts("rrr-"))
    paths = [tmp_path / f"{name}.jsonl" for name in ("pairs", "positive", "negative")]
    with pytest.raises(RecordError, match="problems_without_wrong: 1"):
        pair(tmp_path / "v.jsonl", *paths)
    write_records(tmp_path / "v.jsonl", verdicts("rrx"))
    assert pair(tmp_path / "v.jsonl", *paths)["pairs"] == 1
    assert len(read_records(paths[0], "pair")) == len(read_records(paths[1], "demonstration")) == 1


@pytest.mark.parametrize("n, correct, k", [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 6), (7, 3, 4)])
def test_pass_at_k_is_the_share_of_lucky_subsets(n, correct, k):
    subsets = list(combinations(range(n), k))
    lucky = sum(any(i < correct for i in subset) for subset in subsets)
    assert pass_at_k(n, correct, k) == pytest.approx(lucky / len(subsets))


@pytest.mark.parametrize(
    "answers, k, value",
    [
        ("rxr", 3, 1.0),
        ("xxr", 3, 0.0),
        ("rx", 2, 0.5),
        ("r-", 2, 1.0),
        ("--", 2, 0.0),
        ("rxx", 1, 1.0),
        ("xyr", 3, 1 / 3),
    ],
)
def test_majority(answers, k, value):
    assert majority_at_k(verdicts(answers), k) == pytest.approx(value)


def test_evaluate():
    rows = verdicts("rx", "a") + verdicts("rr", "b") + verdicts("x-", "c")
    result = evaluate_verdicts(rows, ks=[2])
    assert (result["n"], result["samples"], result["no_answer"]) == (3, 2, pytest.approx(1 / 6))
    assert result["pass@1"]["value"] == pytest.approx(0.5)
    assert result["pass@2"]["value"] == pytest.approx(2 / 3)
    assert result["maj@2"]["value"] == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="pass@3"):
        evaluate_verdicts(rows, ks=[3])
    with pytest.raises(RecordError, match="no verdicts"):
        evaluate_verdicts([])


def test_intervals():
    # Wilson's interval for 8 of 10, from the roots of (p̂ − p)² = z² p (1 − p) / n
    low, high = interval([1.0] * 8 + [0.0] * 2)
    for root in (low, high):
        assert (0.8 - root) ** 2 == pytest.approx(1.959963985**2 * root * (1 - root) / 10)
    assert low < 0.8 < high
    assert interval([1.0] * 50)[1] == 1.0 and interval([1.0] * 50)[0] > 0.9
    low, high = interval([0.5, 0.25, 0.75, 0.5])
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(
        2 * 1.959963985 * (0.125 / 3) ** 0.5 / 2
    )
    assert interval([0.3]) == (0.0, 1.0)


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("correct", "false", "correct 'false' must be true or false"),
        ("correct", None, "correct None must be true or false"),
        ("extracted", 5, "extracted 5 must be text"),
        ("sample", "x", "sample 'x' must be an integer"),
        ("sample", 0, "sample 0 of this problem occurs twice"),
    ],
)
def test_bad_verdicts_are_named(column, value, words):
    rows = verdicts("rxy")
    rows[2][column] = value
    for stage in (select_pairs, evaluate_verdicts):
        with pytest.raises(RecordError, match=f"row 2.*{words}"):
            stage(rows)


def test_two_prompts_of_one_problem_make_no_pair():
    rows = verdicts("rx")
    rows[1]["prompt_ids"] = [1, 1]
    with pytest.raises(RecordError, match="problem 'a': sample 1 has other prompt_ids"):
        select_pairs(rows)


def test_equal_fractions_still_have_an_interval():
    low, high = interval([0.5] * 20)
    assert low == pytest.approx(0.299, abs=1e-3) and high == pytest.approx(0.701, abs=1e-3)  # Wilson's, 10 of 20
