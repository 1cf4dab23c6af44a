"""What people look at: the page of pairs with their tokens coloured by score, and tables for the terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import atomic_path
from .errors import ConfigError, MissingColumnError, RecordError
from .locks import locked
from .records import SAID, TOKEN_COLUMNS, Record, check_ids, check_prompt, check_token_columns, row_name
from .token_texts import decoder, texts_by

if TYPE_CHECKING:
    from jinja2 import Environment
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")

#: Token-level columns of a trace, in the order of the page.
TRACE_COLUMNS = ("student_probs", "from_teacher", "teacher_probs")

#: What the page says of each column, and which values its colour brings out.
MEANINGS = {
    "ce_scores": (
        "low",
        "Contrastive probability s in [0, 1]; low = critical. cDPO pushes rejected tokens down with the weight 1 − s, "
        "so the low scores of rejected answers are where it acts.",
    ),
    "weights": ("high", "Weight of the token in the loss; high = counts more."),
    "guidance_logratios": (
        "diverging",
        "Log-ratio of guide and reference in nats; below 0 the guide likes the token less than the reference does.",
    ),
    "rollout_values": (
        "low",
        "Share of the model's continuations after this token that reach the right answer; where it falls, the solution is lost.",
    ),
    "entropies": ("high", "Entropy of the policy before this token, in nats; high = it had a choice."),
    "ref_logps": ("low", "Log-probability under the reference in nats; low = surprising."),
    "student_probs": (
        "low",
        "Probability under the student, before temperature, top-p and top-k; low = surprising to it.",
    ),
    "teacher_probs": (
        "low",
        "Probability under the teacher, before temperature, top-p and top-k; low = surprising to it.",
    ),
    "from_teacher": (
        "low",
        "1 where the teacher proposed the token and the student accepted it, 0 where it is the student's own.",
    ),
}

#: Columns that are shares, whatever values there are.
UNIT = ("ce_scores", "rollout_values", "student_probs", "teacher_probs", "from_teacher")


def histogram(
    values: Sequence[float], bins: int = 20, low: float | None = None, high: float | None = None
) -> list[int]:
    """Counts of values in equal steps.

    Args:
        values: the numbers.
        bins: number of steps.
        low, high: where the first step begins and the last one ends (closed); the values' range by default. A value
            outside counts in the nearest step.
    """
    counts = [0] * bins
    if not values:
        return counts
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    span = high / 2 - low / 2  # halves, since the difference of two floats need not be one
    for value in values:
        place = int((value / 2 - low / 2) / span * bins) if span > 0 else 0
        counts[min(max(place, 0), bins - 1)] += 1
    return counts


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table whose columns line up in a terminal, too.

    Args:
        rows: cells by column name; the columns are those of all rows, in order of first appearance.
    """
    if not rows:
        return ""
    header = list(dict.fromkeys(column for row in rows for column in row))
    cells = [header, *([_cell(row.get(column, "")) for column in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    head, *body = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *body])


def _cell(value: Any) -> str:
    """A bar or a line break inside a cell would break the table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def inspect_pairs(
    pairs: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    out_path: str | os.PathLike,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = 1000,
    title: str = "align: pairs",
    summary: Sequence[Mapping[str, Any]] | None = None,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes one HTML page, self-contained and without a request to anywhere: tokens coloured by a token-level column.

    Args:
        pairs: pair records with at least one token-level column; `first_error` (index into `rejected_ids`), where there
            is one, is marked.
        tokenizer: the one that made the ids; text is decoded, never tokenized.
        out_path: the page; it appears whole or not at all.
        columns: token-level columns to choose from on the page, without their side, the one shown first in front; all
            present ones by default.
        limit: shows the first so many pairs, all with `None`; histograms and shares are over all pairs in any case.
        title: heading of the page.
        summary: rows of a table at the top.
        facts: names and values at the top.

    Returns:
        `out_path`.

    Raises:
        MissingColumnError: no pair has a token-level column, or the one asked for, or a pair lacks its prompt or ids.
        RecordError: there are no pairs, a column's length differs from its ids', or `first_error` is no index.
        ConfigError: `limit` is below 1.
        RecordFileError: the page cannot be written.
    """
    if not pairs:
        raise RecordError("there are no pairs to show; score some first")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} would show no pair; give at least 1, or None for all")
    present = present_columns(pairs, [columns] if isinstance(columns, str) else columns)
    for index, pair in enumerate(pairs):
        check_pair(pair, row_name(pair, index), present)
    return _write_page(pairs, tokenizer, out_path, SIDES, "pairs", present, limit, title, summary, facts)


def inspect_traces(
    traces: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    out_path: str | os.PathLike,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = 1000,
    title: str = "align: traces",
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes the same page for traces of `align trace`: tokens coloured by what the student makes of them, and by source.

    Args:
        traces: records with `completion_ids` and, one number per id, `student_probs`, `teacher_probs` and `from_teacher`.
            Traces without a token are left out, and counted among the facts.
        columns: those to choose from, the one shown first in front.
        tokenizer, out_path, limit, title, facts: see `inspect_pairs`.

    Raises:
        MissingColumnError, RecordError, ConfigError, RecordFileError: see `inspect_pairs`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} would show no trace; give at least 1, or None for all")
    columns = list(TRACE_COLUMNS) if columns is None else [columns] if isinstance(columns, str) else list(columns)
    if unknown := sorted(set(columns) - set(TRACE_COLUMNS)):
        raise MissingColumnError(f"traces have no column {', '.join(unknown)}; there are {', '.join(TRACE_COLUMNS)}")
    rows = []
    for index, trace in enumerate(traces):
        row = trace_row(trace, row_name(trace, index), columns)
        if row is not None:
            rows.append(row)
    if not rows:
        raise RecordError(f"none of {len(traces)} traces has a token to show")
    if left_out := len(traces) - len(rows):
        facts = {**(facts or {}), "traces without a token, left out": str(left_out)}
    return _write_page(rows, tokenizer, out_path, ("trace",), "traces", columns, limit, title, None, facts)


def trace_row(trace: Mapping[str, Any], name: str, columns: Sequence[str]) -> Record | None:
    """A trace as the page's rows are, `trace_ids` and `trace_<column>`; `None` for one without a token.

    Raises:
        MissingColumnError, RecordError: the trace, called `name`, cannot be shown.
    """
    for column in ("id", "prompt", "completion_ids", *columns):
        if trace.get(column) is None:
            raise MissingColumnError(f"{name}: column {column!r} is missing; give traces as `align trace` writes them")
    check_ids(trace["completion_ids"], "completion_ids", name)
    if not trace["completion_ids"]:
        return None
    check_prompt(trace["prompt"], name)
    row = {"id": str(trace["id"]), "prompt": trace["prompt"], "trace_ids": trace["completion_ids"]}
    if "sample" in trace:
        row["id"] = f"{trace['id']}, sample {trace['sample']}"
    if "correct" in trace:
        row["id"] += ", right" if trace["correct"] else ", wrong"
    for column in columns:
        values = trace[column]
        if not isinstance(values, list) or len(values) != len(trace["completion_ids"]):
            raise RecordError(f"{name}: {column} needs one number for each of {len(trace['completion_ids'])} ids")
        if not all(isinstance(v, (bool, int, float)) and 0 <= v <= 1 for v in values):
            raise RecordError(f"{name}: {column} has a value that is no number in [0, 1]")
        row[f"trace_{column}"] = [float(v) for v in values]
    return row


def _write_page(
    rows: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    out_path: str | os.PathLike,
    sides: Sequence[str],
    noun: str,
    columns: Sequence[str],
    limit: int | None,
    title: str,
    summary: Sequence[Mapping[str, Any]] | None,
    facts: Mapping[str, str] | None,
) -> Path:
    """Rows with `<side>_ids` and `<side>_<column>` for each of `sides`."""
    data = page_data(rows, tokenizer, sides, columns, limit)
    page = render(
        "inspect.html.jinja", title=title, data=script_safe(data), shown=len(data["pairs"]), total=len(rows), noun=noun,
        facts=dict(facts or {}), summary=list(summary or ()), header=list(dict.fromkeys(name for row in summary or () for name in row)),
    )  # fmt: skip
    out_path = Path(out_path)
    with locked(out_path), atomic_path(out_path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out_path


def page_data(
    rows: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    sides: Sequence[str],
    columns: Sequence[str],
    limit: int | None,
) -> dict[str, Any]:
    """What the script of a page reads: rows with `<side>_ids` and `<side>_<column>` for each of `sides`, checked before.

    Histograms are over all rows, the first `limit` of which are shown.
    """
    decode, vocabulary = decoder(tokenizer), {}
    data = {
        "sides": list(sides),
        "columns": [column_summary(rows, column, sides) for column in columns],
        "pairs": [_page_row(row, decode, vocabulary, columns, sides) for row in rows[:limit]],
        "total": len(rows),
    }
    special = set(tokenizer.all_special_ids)
    data["vocabulary"] = [[token_id, text, int(token_id in special)] for token_id, text in vocabulary]
    return data


def present_columns(pairs: Sequence[Record], columns: Sequence[str] | None) -> list[str]:
    def is_there(column: str) -> bool:
        return any(pair.get(f"{side}_{column}") is not None for pair in pairs for side in SIDES)

    there = list(filter(is_there, TOKEN_COLUMNS))
    remedy = f"there are {', '.join(there)}" if there else "make one with `align score`"
    if columns is None:
        if not there:
            raise MissingColumnError(f"no pair has a token-level column; {remedy}")
        return there
    for column in columns:
        if not is_there(column):
            raise MissingColumnError(f"no pair has chosen_{column} or rejected_{column}; {remedy}")
    return list(columns)


def check_pair(pair: Mapping[str, Any], name: str, columns: Sequence[str]) -> None:
    for column in ("id", "prompt", "chosen_ids", "rejected_ids"):
        if pair.get(column) is None:
            raise MissingColumnError(f"{name}: column {column!r} is missing; give pairs as `align pair` writes them")
    check_prompt(pair["prompt"], name)
    for side in SIDES:
        check_ids(pair[f"{side}_ids"], f"{side}_ids", name)
    check_token_columns(pair, name, columns)
    error = pair.get("first_error")
    if error is not None and not (isinstance(error, int) and 0 <= error < len(pair["rejected_ids"])):
        raise RecordError(
            f"{name}: first_error {error!r} is no index into the {len(pair['rejected_ids'])} rejected_ids; "
            "count from 0, and leave it out where it is unknown"
        )


def column_summary(pairs: Sequence[Record], column: str, sides: Sequence[str]) -> dict[str, Any]:
    """What the header of the page says of a column."""
    values = {side: [v for pair in pairs for v in pair.get(f"{side}_{column}") or ()] for side in sides}
    everything = sorted(v for those in values.values() for v in those) or [0.0]
    scale, meaning = MEANINGS.get(column, ("low", ""))
    if column in UNIT:
        low, high = 0.0, 1.0
    else:  # a few extreme tokens would leave the rest without contrast
        low, high = everything[len(everything) // 100], everything[-1 - len(everything) // 100]
    if scale == "diverging":  # 0 is the middle of the scale, whatever the values
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    known = [(pair.get(f"rejected_{column}"), pair.get("first_error")) for pair in pairs]
    known = [(scores, error) for scores, error in known if scores and error is not None]
    return {
        "name": column,
        "meaning": meaning,
        "scale": scale,
        "low": low,
        "high": high,
        "clipped": everything[0] < low or everything[-1] > high,
        "histogram": {side: histogram(values[side], 24, low, high) for side in sides},
        "first_error": [sum(scores.index(min(scores)) == error for scores, error in known), len(known)],
    }


def _page_row(
    pair: Record, decode, vocabulary: dict[tuple[int, str], int], columns: Sequence[str], sides: Sequence[str]
) -> dict[str, Any]:
    """A pair as the page has it. A token is its place in `vocabulary`, which grows: ids and texts recur."""
    prompt = pair["prompt"]
    if not isinstance(prompt, str):
        prompt = [[str(message["role"]), _said(message)] for message in prompt]
    row: dict[str, Any] = {"id": str(pair["id"]), "prompt": prompt}
    if pair.get("first_error") is not None:
        row["first_error"] = pair["first_error"]
    for side in sides:
        ids = pair[f"{side}_ids"]
        tokens = zip(ids, texts_by(decode, ids), strict=True)
        row[side] = {"tokens": [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]}
        for column in columns:
            values = pair.get(f"{side}_{column}")
            if values:
                # Found before the digits are cut, or it would not be the token that the share above counts.
                row[side][column] = {"values": [_short(v) for v in values], "lowest": values.index(min(values))}
    return row


def _short(value: float) -> float:
    """Five digits; the value itself where they would be rounded beyond the floats, which JSON has no word for."""
    rounded = float(f"{value:.5g}")
    return rounded if math.isfinite(rounded) else float(value)


def _said(message: Mapping[str, Any]) -> str:
    """A message's text, and its tool calls and reasoning as JSON."""
    others = {key: message[key] for key in SAID[1:] if message.get(key)}
    content = message.get("content")
    return "\n".join(_content(part) for part in (content, others) if part)


def _content(content: Any) -> str:
    if isinstance(content, list):  # of parts, as multimodal chat templates have them
        return "\n".join(_content(part.get("text", part) if isinstance(part, dict) else part) for part in content)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def script_safe(data: Any) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment there."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace").decode()
    for character in "&<>\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def render(template: str, **values: Any) -> str:
    """One of `align/templates`, filled in; whatever is put in is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader

    return Environment(loader=PackageLoader("align"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
