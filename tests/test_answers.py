"""Finding and comparing answers: verdicts by kind of writing, forms times answers, and mutations."""

import json
import os
import random
import re
import time
from pathlib import Path

import pytest

from align.answers import LONGEST_EXPRESSION, answers_equal, boxed_answer, canonical_answer, extract_answer
from align.problems import load_problems
from align.verify import verify_completion

#: `kind` is `completion` (`model` is a whole completion) or `equal` (`model` is an extracted answer); made by hand.
CASES = [
    json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
]


def named(kind):
    return [pytest.param(*(c[k] for k in ("model", "reference", "correct")), id=str(i)) for i, c in enumerate(CASES) if c["kind"] == kind]  # fmt: skip


@pytest.mark.parametrize("completion, reference, correct", named("completion"))
def test_verdicts_of_completions(completion, reference, correct):
    verdict = verify_completion(completion, reference)
    assert verdict.correct is correct, verdict


@pytest.mark.parametrize("one, other, equal", named("equal"))
def test_equality_both_ways(one, other, equal):
    assert answers_equal(one, other) is equal
    assert answers_equal(other, one) is equal


@pytest.mark.parametrize(
    "text, answer, rule",
    [
        ("#### Step 1\n3\n#### 12 apples", "12", "hash"),
        ("#### Final answer\n\\boxed{20}", "20", "boxed"),
        ("## Final answer\n$$\nx+1\n$$", "x+1", "answer_is"),
        ("The answer is 5. Wait, the answer is 6.", "6", "answer_is"),
        ("The answer is below.\nShe has **73 apples**", "73", "last_number"),
        ("The answer is 5 hours and 30 minutes.", "5 hours and 30 minutes", "answer_is"),
        ("It weighs 3 kg.", "3 kg", "last_number"),
        ("\\boxed{3} or \\boxed{5}", "3, 5", "boxed"),
        ("<think>\\boxed{3}</think> Five.", None, None),
        ("<think>so \\boxed{3}", None, None),
        ("<think>" + "x" * 30_000 + " 7", None, None),
    ],
)
def test_what_is_extracted_by_which_rule(text, answer, rule):
    assert extract_answer(text) == (answer, rule)


#: Answers of the kinds that mathematics problems have.
ANSWERS = [
    "7", "-3", "58,500", "1.25", "0.0000672", r"\frac{3}{2}", r"-\frac{24}{25}", r"\frac{270}7", r"1\frac{4}{5}", r"2\sqrt{5}", r"\sqrt{51}",
    r"\frac{\sqrt{3}}{3}", r"16\sqrt{3}", r"12\pi", r"\frac{20000}{\pi}", r"18+2\pi", "1-12i", "-2+7i", "(2,4)", r"(3,\frac{\pi}{2})",
    r"(-\sqrt{3},\sqrt{3})", "(5,\\infty)", "(-\\infty,0]", r"(-\infty,2)\cup(3,\infty)", "3,5,7", "1,-2", r"3\pm2\sqrt{2}", r"\{1\pm\sqrt{5},-2\}",
    "2k", "p-q", "3R^2", "5r^5", "2x+3", "x^3+3x-6", "(a+5)(b+2)", "5x-7y+11z+4=0", r"x\in[-2,7]", r"\frac{11+9a}{20}", "204_5", "4210_{5}",
    "864^2", "C", r"\text{(C)}", r"\text{east}", r"\text{Evelyn}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
    r"\begin{pmatrix} 16/49 \\ 48/49 \end{pmatrix}", r"90^\circ", r"35\%", r"\frac{1}{2^{99}}", "2^{2005}+1", r"\cot x",
]  # fmt: skip
FORMS = [
    "#### Step 1\n3+4=7.\n#### Step 2: finish\nSo.\n#### Final answer\n\\boxed{@}", "#### 1. Set up\n$$x=3$$\n### Final Answer\nThe final answer is $\\boxed{@}$",
    "The answer is $!$. Wait, that is wrong. The answer is $@$.", "The answer is !. Wait, that is wrong. The answer is @.",
    "The answer is $!$? No, the answer is $@$!", "The answer is not $!$, but $@$.", "\\boxed{!} Wait, no. \\boxed{@}",
    "We add.\n\n## Final answer\n$$@$$", "We add.\n\n**Final Answer**\n\n\\[\n@\n\\]", "We add.\n\n### Answer:\n\n$$\n@\n$$\n", "The answer is\n$$@.$$",
    "We add. So $x=\\boxed{@}$.", "The final answer is $\\boxed{@}$. I hope it is correct.", "We add.\n\nThe answer is **$@$**.", "**Answer: $@$**",
    "The answer is \\(@\\).", "Therefore, the final answer is $@$.", "Therefore, the final answer is @.", "The answer is $@$, since 1+1=2.", "so 3\n#### @",
    "so 3\n#### $@$", "The answer is `@`.", "Final answer: `@`", "答案是 $@$。", "所以答案是@。", "因此，最终答案为 \\boxed{@}。", "The answer is *@*.", "The answer is **@**.",
    "<think>Maybe \\boxed{!}? The answer is !.</think>\nThe answer is $@$.", "<think>x = 1</think><answer>@</answer>", 'The final answer is "@".',
    "Answer: @", "So we finally get $@$.",
]  # fmt: skip


def check_forms(answers, forms=FORMS):
    wrong = []
    for index, answer in enumerate(answers):
        other = next(a for a in (*answers[index + 1 :], *answers) if not answers_equal(a, answer))
        for form in forms:
            text = form.replace("!", other, form.count("$!$") + form.count("{!}") + form.count(" !.")).replace(
                "@", answer
            )
            if not verify_completion(text, answer).correct or ("!" in form and verify_completion(text, other).correct):
                wrong.append((form, answer, extract_answer(text)))
    return wrong


def test_every_answer_in_every_form():
    assert check_forms(ANSWERS) == []


ALPHABET = "0123456789+-*/^_(){}[],.\\xyabcpi ="


def mutations(answers, seed, each):
    rng = random.Random(seed)
    for answer in answers:
        for _ in range(each):
            place, kind, char = rng.randrange(len(answer)), rng.randrange(3), rng.choice(ALPHABET)
            mutated = answer[:place] + ("" if kind == 0 else char) + answer[place + (kind < 2) :]
            if mutated.strip() and mutated != answer:
                yield mutated, answer


def without_what_means_nothing(text):
    return re.sub(r"^[=+*]|(?<![\d.])0(?=[\d.])| ", "", text)


#: Mutations that keep the value: a factor of 1 or 0, another order of factors, a bound less, another name of a command.
EQUAL = {
    ('(-infty,0]', '(-\\infty,0]'),
    ('0-2+7i', '-2+7i'),
    ('0-3', '-3'),
    ('1,0-2', '1,-2'),
    ('18+2pi', '18+2\\pi'),
    ('35%', '35\\%'),
    ('35\\', '35\\%'),
    ('58500', '58,500'),
    ('\\cfrac{11+9a}{20}', '\\frac{11+9a}{20}'),
    ('\\cfrac{20000}{\\pi}', '\\frac{20000}{\\pi}'),
    ('\\frac{sqrt{3}}{3}', '\\frac{\\sqrt{3}}{3}'),
}  # fmt: skip


def test_one_character_more_or_less_is_another_answer():
    accepted = {(m, a) for m, a in mutations(ANSWERS, 0, 12) if answers_equal(m, a)}
    trivial = {(m, a) for m, a in accepted if without_what_means_nothing(m) == without_what_means_nothing(a)}
    assert accepted - trivial == EQUAL


def test_all_forms_of_given_answers():
    """Reads a JSONL file of `answer`, such as MATH-500."""
    path = os.environ.get("ALIGN_MATH_ANSWERS")
    if not path:
        pytest.skip("set ALIGN_MATH_ANSWERS to a JSONL file of answers")
    answers = [json.loads(line)["answer"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert check_forms(answers) == []


def test_canonical_answers_group_what_is_written_differently():
    ways = ["1,000", "1000.0", "$1000", "x = 1000", "1e3", r"1\,000", "1000 dollars", "**1000**", r"10^3", "１０００"]
    assert {canonical_answer(way) for way in ways} == {"1000"}
    assert canonical_answer("5 hours and 30 minutes") != canonical_answer("5") != canonical_answer("5x")


def test_boxes():
    assert boxed_answer(r"\boxed{1} \boxed{2} {\boxed{3") == "2"
    assert boxed_answer(r"\boxed{} and \boxed{?} after \boxed{7}, \boxed{\text{answer}}") == "7"
    assert boxed_answer(r"$x=\boxed{3}$ and $y=\boxed{5}$") == "3, 5"
    assert boxed_answer("no box") is None


@pytest.mark.parametrize(
    "one, other",
    [
        ("½" * 60, "1"), ("[" * 200, "1"), (r"\boxed{5} and " * 20, "1"), ("9" * 900 + "x", "1"), ("1/" * 100 + "1", "2"),
        ("2^{2^{2^{2}}}", "3"), ("9^{9999999}", "1"), ("(" * 100 + ")" * 100, "1"), ("1e999999999", "1"), ("a," * 140, "b," * 140), ("\\pm " * 50 + "3", "3"),
    ],
)  # fmt: skip
def test_hostile_answers_take_bounded_time(one, other):
    start = time.monotonic()
    assert answers_equal(one, other) is False
    assert time.monotonic() - start < 30  # math-verify has 5 s


def test_longer_answers_are_compared_as_text():
    long = "+".join(f"x^{{{i}}}" for i in range(99))
    assert len(long) > LONGEST_EXPRESSION
    assert answers_equal(long, long.replace("+", " + ")) and not answers_equal(long, long + "+1")


def test_numbers_of_json_are_answers_by_their_digits(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        '{"question": "a", "answer": 0.00001}\n{"question": "b", "answer": 1e16}\n{"question": "c", "answer": 12345678901234567890}\n'
        '{"question": "d", "answer": 2.50}\n',
        encoding="utf-8",
    )
    answers = [row["answer"] for row in load_problems(str(path))]
    assert answers == ["0.00001", "10000000000000000", "12345678901234567890", "2.5"]
    assert verify_completion("The answer is 0.00001.", answers[0]).correct
    assert verify_completion("#### 10000000000000000", answers[1]).correct


def test_a_solution_alone_has_its_answer(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": "a", "solution": "3+4=7\n#### 7"}, {"question": "b", "solution": r"so \boxed{\frac{1}{2}} {"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [row["answer"] for row in load_problems(str(path))] == ["7", r"\frac{1}{2}"]
