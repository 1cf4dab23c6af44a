"""The stage `align verify`: verdicts on samples. `align.answers` finds and compares the answers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .answers import answers_equal, canonical_answer, extract_answer
from .checks import check_apart
from .errors import RecordError
from .record_file import RecordFile
from .records import Record, check_records, row_name
from .stages import file_hash, is_complete, parts_of, read_manifest, run_in_parts

__all__ = [
    "Verdict", "answers_equal", "canonical_answer", "extract_answer", "verify", "verify_completion", "verify_records",
]  # fmt: skip

#: Completions per part: what at most is verified again after an interruption.
PART = 512


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
