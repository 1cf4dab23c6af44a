"""Finding the final answer in a solution, and comparing it with the reference answer.

Finding is ours, by four rules; comparing anything that is no plain number is math-verify's.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .checks import check_apart
from .errors import RecordError
from .record_file import RecordFile
from .records import Record, check_records, row_name
from .stages import file_hash, is_complete, parts_of, read_manifest, run_in_parts

#: Longest answer that is compared as mathematics; longer ones are compared as text.
LONGEST_EXPRESSION = 300
#: How much of the end of a solution is searched: an answer stands at the end, and no input may cost unbounded time.
SEARCHED_TAIL = 20_000

#: Completions per part: what at most is verified again after an interruption.
PART = 512

_NUMBER = r"[-+−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:\s*/\s*\d+)?%?"
_NUMBER_AT_END = re.compile(rf"(?<![\w.]){_NUMBER}|(?<=[=>*+/(]){_NUMBER}")
_HASH = re.compile(r"####[ \t]*([^\n]*)")
# A marker opens a line ("A: 26") or ends a sentence's beginning ("so the final answer is 26.").
_ANSWER_LINE = re.compile(r"^[ \t*#]*(?:final answer|answer|A)[ \t*]*[:=][ \t*]*([^\n]*)", re.IGNORECASE | re.MULTILINE)
_ANSWER_IS = re.compile(r"\banswer\b[^\n.:]{0,40}?(?:\bis\b|\bequals\b|:|=)[ \t]*:?[ \t]*([^\n]*)", re.IGNORECASE)
_UNFINISHED = re.compile(r"(?:[-+*/×÷=(]|<<[^>]*)\s*$")


@dataclass(frozen=True)
class Verdict:
    """What was found in a solution and whether it is right.

    Args:
        extracted: the answer as text; `None` where there is none.
        rule: `hash`, `boxed`, `answer_is` or `last_number`; `None` with `extracted`.
        correct: whether it equals the reference answer.
    """

    extracted: str | None
    rule: str | None
    correct: bool


def extract_answer(text: str) -> tuple[str | None, str | None]:
    """Finds the final answer: `#### 42`, else `\\boxed{42}`, else "the answer is 42" or `A: 42`, else the last number.

    Of several matches of a rule the last one counts; a marker with nothing behind it counts as absent. A text that
    breaks off in the middle of a calculation has no last number: what stands there is no result.

    Returns:
        The answer and the name of the rule; both `None` where nothing is found. Never raises, whatever the text.
    """
    text = text[-SEARCHED_TAIL:]
    for rule, find in (
        ("hash", _find_hash),
        ("boxed", _find_boxed),
        ("answer_is", _find_answer_is),
        ("last_number", _find_number),
    ):
        answer = find(text)
        if answer:
            return answer, rule
    return None, None


def _find_hash(text: str) -> str | None:
    return next((found for match in reversed(_HASH.findall(text)) if (found := _leading_answer(match))), None)


def _find_boxed(text: str) -> str | None:
    """The last box that is closed and holds something, braces balanced; found in one pass, however many boxes are left open."""
    boxes = {match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*{", text)}
    opened: list[int] = []
    last, found = -1, None
    for brace in re.finditer(r"[{}]", text) if boxes else ():
        if brace.group() == "{":
            opened.append(brace.end())
        elif (
            opened
            and (start := opened.pop()) in boxes
            and start > last
            and (inside := text[start : brace.start()].strip())
        ):
            last, found = start, inside
    return found


def _find_answer_is(text: str) -> str | None:
    found = [(m.start(1), m.group(1)) for pattern in (_ANSWER_LINE, _ANSWER_IS) for m in pattern.finditer(text)]
    return next((answer for _, rest in sorted(found, reverse=True) if (answer := _leading_answer(rest))), None)


def _leading_answer(rest: str) -> str | None:
    """The answer that a line behind a marker begins with: "5 hours", "5, since …" and "x = 5" mean 5; an expression, a
    list or a pair stands as it is."""
    rest = _trim(rest)
    if number := re.match(
        rf"[A-Za-z =:$]{{0,20}}?({_NUMBER})(?!\s*[-+*/^={{]|\\(?!%|text)|\s*\((?!\s*[A-Za-z])|\w|\.\d|\s*,\s*[-\d])",
        rest,
    ):
        return _trim(number.group(1))
    return re.split(r"(?<=[^\d])\.(?:\s|$)|\.\s", rest)[0].strip() or None


def _find_number(text: str) -> str | None:
    if _UNFINISHED.search(text[-200:]):
        return None
    numbers = _NUMBER_AT_END.findall(text)
    return _trim(numbers[-1]) if numbers else None


def _trim(answer: str) -> str:
    """An answer without what surrounds it: spaces, emphasis, dollar signs of LaTeX in pairs, a closing full stop."""
    answer = answer.strip().strip("*").strip()
    answer = re.sub(r"(?<=[\w)}\]%$])[.;,]+$", "", answer)
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$").strip()
    return answer


def _as_number(answer: str) -> Fraction | None:
    """A plain number exactly: signs, thousands separators, decimals, simple fractions, currency and per cent signs."""
    text = answer.strip().replace("−", "-").replace("\\$", "").replace("$", "").replace("\\%", "").rstrip("%").strip()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).replace("\\!", "")
    if len(text) > 1000 or not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:\s*/\s*\d+)?", text):
        return None
    top, _, bottom = text.partition("/")
    try:
        return Fraction(top.strip()) / Fraction(bottom.strip() or 1)
    except ZeroDivisionError:
        return None


def canonical_answer(extracted: str | None) -> str | None:
    """A key that is equal for plainly equal answers: `1,000`, `$1000` and `1000.0` all give `1000`.

    Returns:
        `None` for `None` and for nothing but spaces.
    """
    if extracted is None or not extracted.strip():
        return None
    number = _as_number(extracted)
    if number is None:
        return re.sub(r"\s+", " ", _trim(extracted)) or None
    return str(number)


def answers_equal(extracted: str, reference: str) -> bool:
    """Whether two answers are the same: as exact numbers, else as equal text, else by math-verify.

    Args:
        extracted: the solution's answer.
        reference: the right answer; of a GSM8K solution, what follows `####`.
    """
    if "####" in reference:
        reference = reference.rsplit("####", 1)[1].strip()
    left, right = _as_number(extracted), _as_number(reference)
    if left is not None and right is not None:
        return left == right
    if canonical_answer(extracted) == canonical_answer(reference):
        return True
    if max(len(extracted), len(reference)) > LONGEST_EXPRESSION or _explodes(extracted) or _explodes(reference):
        return False
    return _math_verify(extracted, reference)


def _explodes(expression: str) -> bool:
    """Whether evaluating the expression could take forever: towers of powers, huge exponents, factorials of factorials."""
    powers = re.findall(r"(?:\^|\*\*)\s*[{(]?\s*(-?\d*)", expression)
    towers = re.search(r"(?:\^|\*\*)\s*[{(]?\s*[\w.]+\s*(?:\^|\*\*)", expression) is not None
    return (
        towers
        or any(len(power) > 3 for power in powers)
        or expression.count("!") > 1
        or bool(re.search(r"\d{3,}\s*!", expression))
    )


def _math_verify(extracted: str, reference: str) -> bool:
    from math_verify import parse, verify

    # The library's time limits are signals, which only the main thread can receive.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    try:
        gold = parse(f"${reference}$", parsing_timeout=limit)
        found = parse(f"${extracted}$", parsing_timeout=limit)
        return bool(gold and found) and bool(verify(gold, found, timeout_seconds=limit))
    except Exception:  # noqa: BLE001 - whatever a parser makes of arbitrary text, the answer is just not equal
        return False


def verify_completion(completion: str, answer: str) -> Verdict:
    """Verdict on one solution. No answer found is incorrect, never an exception."""
    extracted, rule = extract_answer(completion)
    return Verdict(extracted, rule, extracted is not None and answers_equal(extracted, answer))


def verify_records(samples: Sequence[Record]) -> tuple[list[Record], dict[str, int]]:
    """Adds `extracted`, `rule` and `correct` to sample records.

    Returns:
        Verdict records, and counts: `rows`, `correct`, `incorrect`, `no_answer`, `truncated`, and one `rule_…` each.

    Raises:
        RecordError, MissingColumnError: a sample does not fit the schema.
    """
    check_records(samples, "sample", source="samples")
    verdicts = _verdicts(samples)
    return verdicts, {"rows": len(verdicts), **_count(verdicts)}


def _verdicts(samples: Sequence[Record], first: int = 0) -> list[Record]:
    """Verdict records of samples, of which the first is number `first` of its file."""
    known: dict[tuple[str, str], Verdict] = {}  # many draws of a problem are the same text
    rows = []
    for index, row in enumerate(samples, start=first):
        if not row["answer"]:
            raise RecordError(
                f"samples, {row_name(row, index)}: there is no reference answer to compare with; open-ended prompts are judged "
                "by others: `align evaluate --export`"
            )
        key = (row["completion"], row["answer"])
        verdict = known.get(key) or known.setdefault(key, verify_completion(*key))
        rows.append({**row, "extracted": verdict.extracted, "rule": verdict.rule, "correct": verdict.correct})
    return rows


def _count(verdicts: Sequence[Record]) -> dict[str, int]:
    counts: Counter[str] = Counter(dict.fromkeys(("correct", "incorrect", "no_answer", "truncated"), 0))
    for row in verdicts:
        counts["correct" if row["correct"] else "incorrect"] += 1
        counts["truncated"] += row["finish_reason"] == "length"
        counts["no_answer" if row["rule"] is None else f"rule_{row['rule']}"] += 1
    return dict(counts)


def verify(samples_path: str | os.PathLike, out_path: str | os.PathLike) -> dict[str, int]:
    """The stage `align verify`: sample records -> verdict records; shared among processes, resumed, skipped where its
    output is complete.

    Returns:
        The counts of `verify_records`.
    """
    check_apart(samples_path, out_path)
    settings = {"samples": file_hash(samples_path) if os.path.exists(samples_path) else None}
    if is_complete(out_path, "verify", settings):
        return read_manifest(out_path)["counts"]
    samples = RecordFile(samples_path, "sample")
    return run_in_parts(
        out_path,
        parts_of(samples, PART),
        lambda _, part: [
            row | {"_row": number}
            for number, row in zip(part, _verdicts(samples[part.start : part.stop], part.start), strict=True)
        ],
        stage="verify",
        settings=settings,
        order=lambda row: row.pop("_row"),
        count=_count,
    )
