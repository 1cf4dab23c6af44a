"""What people look at: the page of pairs with their tokens coloured by score, and tables for the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MissingColumnError, RecordError
from .records import TOKEN_COLUMNS, Record, atomic_path, check_token_columns, row_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")

#: What the page says of each column.
MEANINGS = {
    "ce_scores": "contrastive probability s in [0, 1]: low = critical; cDPO weighs rejected tokens with 1 − s",
    "weights": "weight of the token in the loss",
    "guidance_logratios": "log-ratio of guide and reference, nats",
    "ref_logps": "log-probability under the reference, nats",
}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Text of each token, such that together they are the decoded text.

    A character spread over several tokens stands at the last of them; the others are empty. Special tokens show by name.
    """
    texts, done = [], 0
    for end in range(1, len(ids) + 1):
        # A few ids back are enough context, and keep the cost linear.
        start = max(0, done - 8)
        before = _decode(tokenizer, ids[start:done])
        text = _decode(tokenizer, ids[start:end])
        if text.endswith("\ufffd") and end < len(ids) and end - done < 8:
            texts.append("")
            continue
        texts.append(text[len(before) :] if text.startswith(before) else _decode(tokenizer, ids[done:end]))
        done = end
    return texts


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def histogram(values: Sequence[float], bins: int = 20, low: float | None = None, high: float | None = None) -> list[int]:
    """Counts of values in `bins` equal steps from `low` to `high` (their range by default); the last step is closed."""
    if not values:
        return [0] * bins
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    counts = [0] * bins
    for value in values:
        place = int((value - low) / (high - low) * bins) if high > low else 0
        counts[min(max(place, 0), bins - 1)] += 1
    return counts


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table whose columns line up in a terminal, too."""
    if not rows:
        return ""
    header = list(rows[0])
    cells = [header, *([str(row.get(column, "")) for column in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def inspect_pairs(
    pairs: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    out_path: str | os.PathLike,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = 1000,
    title: str = "align: pairs",
    summary: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes one HTML page, self-contained and without a request to anywhere: tokens coloured by a token-level column.

    Args:
        pairs: pair records with at least one token-level column; `first_error` (index into `rejected_ids`), where there
            is one, is marked.
        tokenizer: the one that made the ids; text is decoded, never tokenized.
        out_path: the page; it appears whole or not at all.
        columns: token-level columns to choose from on the page, without their side; all present ones by default.
        limit: at most so many pairs.
        summary: rows of a table at the top.
        facts: names and values at the top.

    Raises:
        MissingColumnError: no pair has a token-level column.
        RecordError: there are no pairs, or a column's length differs from its ids'.
    """
    if not pairs:
        raise RecordError("there are no pairs to show; score some first")
    wanted = list(columns or TOKEN_COLUMNS)
    present = [c for c in wanted if any(pair.get(f"{side}_{c}") is not None for pair in pairs for side in SIDES)]
    if not present:
        raise MissingColumnError(
            f"none of the columns {', '.join(f'chosen_{c} / rejected_{c}' for c in wanted)} is there; make one with `align score`"
        )
    for index, pair in enumerate(pairs):
        check_token_columns(pair, row_name(pair, index), present)
    shown = list(pairs[:limit])
    data = {
        "columns": [_column(pairs, column) for column in present],
        "pairs": [_page_row(pair, tokenizer, present) for pair in shown],
        "total": len(pairs),
    }
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("align"), autoescape=True).get_template("inspect.html.jinja")
    page = template.render(title=title, data=_script_safe(data), summary=list(summary), facts=dict(facts or {}))
    out_path = Path(out_path)
    with atomic_path(out_path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out_path


def _script_safe(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")


def _column(pairs: Sequence[Record], column: str) -> dict[str, Any]:
    values = {side: [v for pair in pairs for v in pair.get(f"{side}_{column}") or ()] for side in SIDES}
    everything = sorted(values["chosen"] + values["rejected"])
    if column == "ce_scores":
        low, high = 0.0, 1.0
    else:  # a few extreme tokens would leave the rest without contrast
        low, high = everything[len(everything) // 100], everything[-1 - len(everything) // 100]
    return {
        "name": column,
        "meaning": MEANINGS.get(column, ""),
        "low": low,
        "high": high,
        "diverging": column == "guidance_logratios",
        "histogram": {side: histogram(values[side], 20, low, high) for side in SIDES},
    }


def _page_row(pair: Record, tokenizer, columns: Sequence[str]) -> dict[str, Any]:
    prompt = pair["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    row: dict[str, Any] = {"id": pair["id"], "prompt": prompt, "first_error": pair.get("first_error")}
    for side in SIDES:
        ids = pair[f"{side}_ids"]
        row[side] = {"ids": list(ids), "texts": token_texts(tokenizer, ids)} | {
            column: [round(v, 5) for v in pair[f"{side}_{column}"]] for column in columns if pair.get(f"{side}_{column}") is not None
        }
    return row
