"""What is fuzzed: every reader of records and settings, and what each must hold whatever it is fed.

A target takes a folder of its own and one input. It ends with an `AlignError`, which is a refusal, or with its invariants
asserted: what came in is there, or is counted as left out. Anything else that it raises is a bug.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import fuzzing as fz
import pyarrow.parquet
from conftest import byte_level_tokenizer
from hypothesis import strategies as st

from align.errors import AlignError
from align.record_file import RecordFile
from align.records import REQUIRED, check_ids, check_records, read_records, write_records

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "data/tiny-arithmetic/model")


@dataclass(frozen=True)
class Target:
    """A strategy of inputs and what is done with one."""

    inputs: st.SearchStrategy
    check: Callable[[Path, Any], None]


TARGETS: dict[str, Target] = {}


def target(inputs: st.SearchStrategy):
    def register(check):
        TARGETS[check.__name__] = Target(inputs, check)
        return check

    return register


def attempt(name: str, value: Any) -> bool:
    """Feeds one input; says whether it was accepted (rather than refused by name)."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, fz.time_limit(), redirect_stderr(io.StringIO()):
        try:
            TARGETS[name].check(Path(folder), value)
        except AlignError as error:
            assert str(error).strip(), "a refusal without a word"
            return False
        finally:
            left = [p.name for p in Path(folder).iterdir() if p.name.endswith(".tmp")]
            assert not left, f"half-written files are left: {left}"
        return True


@cache
def tokenizer(chat: bool = False):
    if chat:
        return byte_level_tokenizer(chat=True)
    from align.models import load_tokenizer

    return load_tokenizer(MODEL)


@cache
def base_model():
    from align.models import load_model

    return load_model(MODEL, dtype="float32")


def put(folder: Path, file: tuple[str, bytes]) -> Path:
    path = folder / file[0]
    path.write_bytes(file[1])
    return path


def rows_in(path: Path) -> int:
    """How many rows a readable record file has, counted without a parser of rows."""
    if path.suffix.lower() == ".parquet":
        # Not its metadata, whose names may be no text; nor as a data set, of which no two columns may have one name.
        return pyarrow.parquet.ParquetFile(path).read().num_rows
    content = path.read_bytes()
    if path.suffix == ".gz":
        path, content = path.with_suffix(""), gzip.decompress(content)
    if path.suffix.lower() == ".csv":
        lines = list(filter(None, csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)))
        return max(0, len(lines) - 1)
    if path.suffix.lower() == ".json" and content.decode("utf-8-sig").lstrip()[:1] == "[":
        return len(json.loads(content.decode("utf-8-sig")))
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return sum(bool(line.decode(errors="replace").strip()) for line in lines)


def same(one: Any, other: Any) -> bool:
    """Equality of values after a round trip: NaN equals NaN; a bool is no number; what Parquet fills with null may be missing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(same(one.get(key), other.get(key)) for key in one.keys() | other.keys())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, datetime) and isinstance(other, datetime):
        # Python's own times end at microseconds; pandas', which a Parquet file of nanoseconds is read as, are written as those.
        one, other = (getattr(time, "to_pydatetime", lambda time=time: time)() for time in (one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


kinds = st.sampled_from([None, *REQUIRED])


@target(st.tuples(fz.record_files() | fz.csv_files(), kinds, st.sampled_from(["out.jsonl", "out.parquet"])))
def records(folder, value):
    """Reading keeps every row, be it at once or row by row; writing what was read gives it back."""
    file, kind, out = value
    path = put(folder, file)
    rows = read_records(path, kind)
    assert len(rows) == rows_in(path) and same(list(RecordFile(path, kind)), rows)
    assert all(isinstance(row, dict) for row in rows)
    write_records(folder / out, rows)
    assert same(read_records(folder / out), rows)


@target(st.tuples(st.lists(fz.json_values, max_size=3), kinds.filter(bool), fz.json_values))
def records_api(folder, value):
    """The checks of records take rows of a notebook, too: any mapping, and any value for ids."""
    rows, kind, ids = value
    with suppress(AlignError):
        check_records([row for row in rows if isinstance(row, dict)], kind)
    check_ids(ids, "prompt_ids", "row 0", 400)
    assert all(type(i) is int and 0 <= i < 400 for i in ids)


@target(
    st.tuples(
        fz.record_files(("problem", "solved", "demonstration", "preference")) | fz.csv_files(),
        st.booleans(),
        st.sampled_from([None, None, "Q: {prompt}\nA:", "no place", "{prompt}{prompt}{x}"]),
        st.booleans(),
        st.sampled_from([None, None, 1, 2, 0, -1]),
    )
)
def problems(folder, value):
    from align.problems import load_problems

    file, answers, template, chat, limit = value
    path = put(folder, file)
    found = load_problems(str(path), answers=answers, prompt_template=template, chat=chat, limit=limit)
    assert len(found) == min(rows_in(path), limit or 10**9)


@target(
    st.tuples(
        fz.record_files(("preference", "pair", "preference")) | fz.csv_files(),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, None, 3, 0]),
        st.sampled_from(["out.jsonl", "out.parquet"]),
    )
)
def preferences(folder, value):
    from align.preferences import tokenize_pairs

    file, chat_model, chat, longest, out = value
    path = put(folder, file)
    counts = tokenize_pairs(
        str(path), tokenizer(chat_model), folder / out, chat=chat and chat_model, max_prompt_length=longest
    )
    assert counts["source_rows"] == rows_in(path)
    assert counts["source_rows"] == counts["rows"] + sum(counts[r] for r in ("prompt_too_long", "equal", "empty"))
    assert len(read_records(folder / out, "pair")) == counts["rows"]


@target(
    st.tuples(
        fz.record_files(("solved", "demonstration", "problem")), st.booleans(), st.sampled_from([None, None, 1, 0, -2])
    )
)
def demonstrations(folder, value):
    from align.demonstrations import load_demonstrations, tokenize_demonstrations
    from align.problems import load_problems

    file, chat, limit = value
    path = put(folder, file)
    found = load_demonstrations(str(path), tokenizer(chat), limit=limit)
    check_records(found, "demonstration")
    assert len(found) == min(rows_in(path), limit or 10**9)
    counts = tokenize_demonstrations(
        load_problems(str(path)), tokenizer(chat), folder / "out.jsonl", max_prompt_length=limit
    )
    assert counts["source_rows"] == counts["rows"] + counts["prompt_too_long"]
    assert len(read_records(folder / "out.jsonl", "demonstration")) == counts["rows"]


@target(
    st.tuples(fz.record_files(("sample", "sample", "verdict", "trace")), st.sampled_from(["out.jsonl", "out.parquet"]))
)
def verify(folder, value):
    from align.verify import verify as stage

    file, out = value
    path = put(folder, file)
    counts = stage(path, folder / out)
    verdicts, samples = read_records(folder / out, "verdict"), read_records(path)
    assert counts["rows"] == counts["correct"] + counts["incorrect"] == len(verdicts) == rows_in(path)
    added = {"extracted", "rule", "correct"}
    for verdict, sample in zip(verdicts, samples, strict=True):
        assert same(
            {k: v for k, v in sample.items() if k not in added}, {k: v for k, v in verdict.items() if k not in added}
        )


@target(st.tuples(fz.solutions, st.one_of(fz.expressions, fz.solutions)))
def answers(folder, value):
    """Whatever a model writes, and whatever the reference is, there is a verdict in bounded time."""
    from align.verify import canonical_answer, verify_completion

    verdict = verify_completion(*value)
    assert (verdict.extracted is None) == (verdict.rule is None)
    assert not (verdict.correct and verdict.extracted is None)
    canonical_answer(value[1])


@target(
    st.tuples(
        fz.record_files(("verdict", "verdict", "sample", "trace")),
        st.sampled_from([0.5, 1.0]),
        st.sampled_from([1, 2]),
        st.booleans(),
        st.sampled_from(["pairs.jsonl", "pairs.parquet"]),
    )
)
def pair(folder, value):
    from align.pair import PairConfig
    from align.pair import pair as stage
    from align.verify import canonical_answer

    file, coverage, per_problem, truncated, out = value
    path = put(folder, file)
    outs = [folder / out, folder / "positive.jsonl", folder / "negative.jsonl"]
    counts = stage(path, *outs, PairConfig(coverage, per_problem, truncated))
    pairs, positive, negative = read_records(outs[0], "pair"), *(read_records(p, "demonstration") for p in outs[1:])
    assert (len(pairs), len(positive), len(negative)) == (counts["pairs"], counts["positive"], counts["negative"])
    rows = read_records(path, "verdict")
    usable = [
        r
        for r in rows
        if r["completion_ids"] and canonical_answer(r["extracted"]) and (truncated or r["finish_reason"] != "length")
    ]
    dropped = sum(counts[f"completions_{r}"] for r in ("no_answer", "truncated", "empty"))
    assert counts["completions"] == len(rows) == len(usable) + dropped
    # Of every problem, the answers of its right completions and of its wrong ones.
    right, wrong = ({r["id"]: [] for r in rows} for _ in range(2))
    for row in usable:
        (right if row["correct"] else wrong)[row["id"]].append(canonical_answer(row["extracted"]))
    made = {name: min(len(right[name]), len(set(wrong[name])), per_problem) for name in right}
    assert counts["problems"] == len(right) and counts["pairs"] == sum(made.values())
    without = sum(counts[f"problems_without_{side}"] for side in ("correct", "wrong", "either"))
    assert without == sum(not pairs for pairs in made.values())
    for found, answers in ((positive, right), (negative, wrong)):
        assert {row["id"] for row in found} == {name for name in answers if answers[name]}


@target(
    st.tuples(
        fz.record_files(("verdict", "verdict", "pair", "trace")), st.lists(st.integers(-1, 3), max_size=2), fz.texts
    )
)
def evaluate(folder, value):
    from align.evaluate import evaluate_verdicts, format_interval, preference_accuracy
    from align.rac import correction_report

    file, ks, cue = value
    rows = read_records(put(folder, file))
    if rows and "chosen_ids" in rows[0]:
        assert preference_accuracy(rows)["n"] == len(rows)
        return
    result = evaluate_verdicts(rows, ks)
    of_problem = {row["id"]: [other["correct"] for other in rows if other["id"] == row["id"]] for row in rows}
    assert result["n"] == len(of_problem)
    assert math.isclose(result["pass@1"]["value"], fmean(map(fmean, of_problem.values())), abs_tol=1e-9)
    metrics = {name: m for name, m in result.items() if isinstance(m, dict)}
    assert all(
        0 <= m["low"] <= m["value"] + 1e-9 and m["value"] <= m["high"] + 1e-9 <= 1 + 1e-9 for m in metrics.values()
    )
    assert {f"pass@{k}" for k in ks if k > 1} <= metrics.keys()
    assert all(map(format_interval, metrics.values()))
    assert correction_report(rows, cue)["n"] == len(rows)


@target(
    st.tuples(
        fz.record_files(("sample", "sample", "verdict")), st.sampled_from(["alpaca-eval", "arena-hard", "x"]), fz.texts
    )
)
def export(folder, value):
    from align.export import export_completions

    file, format_, name = value
    path = put(folder, file)
    counts = export_completions(read_records(path, "sample"), folder / "out.json", format_, name)
    text = (folder / "out.json").read_text(encoding="utf-8")
    found = json.loads(text) if format_ == "alpaca-eval" else [json.loads(line) for line in text.split("\n") if line]
    assert len(found) == counts["rows"] == rows_in(path)
    assert "NaN" not in json.dumps(found, allow_nan=False)


@target(
    st.tuples(
        fz.record_files(("pair", "pair", "trace", "trace")),
        st.one_of(st.none(), st.lists(st.sampled_from(["ce_scores", "weights", "student_probs", "from_teacher", "ids", ""]), max_size=2)),
        st.sampled_from([None, 1, 0]),
        fz.texts,
    )
)  # fmt: skip
def inspect(folder, value):
    """The page's data are JSON that a browser parses, whatever the pairs and traces are."""
    from align.report import inspect_pairs, inspect_traces

    file, columns, limit, title = value
    rows = read_records(put(folder, file))
    show = inspect_traces if rows and "from_teacher" in rows[0] else inspect_pairs
    page = show(rows, tokenizer(), folder / "page.html", columns=columns, limit=limit, title=title).read_text("utf-8")
    data = page.split('type="application/json" id="data">', 1)[1].split("</script>", 1)[0]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(data, parse_constant=refuse)
    shown = [row for row in rows if row.get("completion_ids")] if show is inspect_traces else rows
    assert found["total"] == len(shown) and len(found["pairs"]) == min(len(shown), limit or 10**9)


@target(st.tuples(st.booleans(), fz.spoilt_rows("preference"), fz.spoilt_rows("pair")))
def tokens(folder, value):
    """Rows of a notebook: text or messages to ids, and ids to be checked."""
    from align.tokens import check_pair_ids, encode_pair

    chat, texts, pairs = value
    for row in pairs:
        if isinstance(row, dict):
            check_pair_ids(row, 0, 400)
    for row in texts:
        if isinstance(row, dict):
            ids = encode_pair(tokenizer(chat), row, "row 0")
            assert all(ids[column] for column in ("prompt_ids", "chosen_ids", "rejected_ids"))
