"""The page of a run: stages, counts, drops, curves, score histograms and examples, of what lies in a recipe's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import atomic_path
from .charts import histogram_bars, number, training_charts
from .errors import AlignError, ConfigError
from .progress import watched
from .records import TOKEN_COLUMNS, Record, check_ids, check_records, row_name
from .report import SIDES, TRACE_COLUMNS, check_pair, column_summary, page_data, render, script_safe, trace_row
from .row_sample import Sampled, sample_rows
from .run_folder import DROPS, Run, Stage, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Rows of a file that histograms and examples are drawn from, at most.
SAMPLE = 2000

#: No vocabulary is larger, and tokenizers cannot be asked about larger ids.
LARGEST_ID = 2**31


def inspect_run(
    folder: str | os.PathLike,
    out_path: str | os.PathLike | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int = 50,
) -> tuple[Path, list[str]]:
    """Writes one HTML page, self-contained and without a request to anywhere, of what a run's folder says.

    A run that is not finished, or whose files are damaged, has a page, too: it says what is missing. Of large files, an even
    sample of 2,000 rows is looked at.

    Args:
        folder: the `--output` of a recipe.
        out_path: the page; `run.html` in the folder by default.
        tokenizer: shows tokens of examples; by default the one that a training left in the folder.
        limit: examples of every file, at most.

    Returns:
        The page's path, and what is missing or damaged, a sentence each.

    Raises:
        RecordFileError: there is no run in the folder, or the page cannot be written.
        ConfigError: `limit` is below 1, or the page would replace a file of the run.
    """
    if limit < 1:
        raise ConfigError(f"limit={limit} would show no example; give at least 1")
    run = read_run(folder)
    out_path = run.folder / "run.html" if out_path is None else Path(out_path)
    _check_page(run, out_path)
    histograms: list[dict[str, Any]] = []
    examples: list[tuple[str, list[Record], tuple[str, ...], list[str], int]] = []
    for name in watched(run.records, "inspect run", unit=" files"):
        sampled = sample_rows(run.folder, name, SAMPLE, run.problems)
        _compare(run, sampled)
        rows, sides, columns = _scored_rows(run, sampled)
        if rows and columns:
            _add_histograms(histograms, sampled, rows, sides, columns)
            examples.append((name, rows, sides, columns, sampled.total))
    # Reference log-probabilities are what other numbers are made of: they come last.
    examples.sort(key=lambda example: example[3] == ["ref_logps"])
    if examples and tokenizer is None:
        tokenizer = _find_tokenizer(run)
    sets = [] if tokenizer is None else [_examples(tokenizer, *each, limit=limit) for each in examples]
    if not examples:
        run.problems.append("no file has token-level numbers, so there are no histograms and no examples")
    metrics = list(dict.fromkeys(metric for row in run.evaluation for metric in row["metrics"]))
    page = render(
        "run.html.jinja", run=run, name=run.folder.resolve().name, stages=[_stage(stage) for stage in run.stages],
        drops=_drops(run.stages), trainings=[(each, *training_charts(each.series)) for each in run.trainings],
        metrics=metrics, histograms=_first_of_each(histograms), data=script_safe(sets) if sets else None, number=number,
        finished=bool(run.stages) and all(stage.finished is not None for stage in run.stages),
    )  # fmt: skip
    with atomic_path(out_path) as temporary:
        # A lone surrogate, as JSON can hold one, is no text that could be written.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return out_path, run.problems


def _check_page(run: Run, out_path: Path) -> None:
    """Refuses a page that would replace what it tells of; another page of the run it may replace."""
    files = {os.path.realpath(run.folder / name) for name in run.files if not name.endswith(".html")}
    if os.path.realpath(out_path) in files:
        raise ConfigError(
            f"{out_path}: a file of the run, which the page would replace; give another name, ending in .html"
        )


def _compare(run: Run, sampled: Sampled) -> None:
    """Names a file that has not the rows that its manifest counted."""
    for stage in run.stages:
        if sampled.path not in stage.outputs or stage.finished is None:
            continue
        # `pair` counts the rows of its files by what is in them.
        rows = stage.counts.get(Path(sampled.path).stem if stage.name == "pair" else "rows")
        if isinstance(rows, int) and rows != sampled.total:
            run.problems.append(f"{sampled.path}: has {sampled.total:,} rows, and its manifest says {_text(rows)}")


def _scored_rows(run: Run, sampled: Sampled) -> tuple[list[Record], tuple[str, ...], list[str]]:
    """Rows of a sample as `align.report` shows them, their sides, and their token-level columns; rows that do not fit are named."""
    there = {column for _, row in sampled.rows for column in row if row[column] is not None}
    columns = [c for c in TOKEN_COLUMNS if any(f"{side}_{c}" in there for side in SIDES)]
    traced = [c for c in TRACE_COLUMNS if c in there]
    rows, refused = [], []
    for index, row in sampled.rows if columns or traced else ():
        if not columns and not any(row.get(column) is not None for column in traced):
            continue  # a demonstration beside traces, as the beginnings are that stand in for problems without a good one
        try:
            if columns:
                check_records([row], "pair", source="it")
                check_pair(row, row_name(row, index), columns)
                for side in SIDES:
                    check_ids(row[f"{side}_ids"], f"{side}_ids", row_name(row, index), LARGEST_ID)
                rows.append(row)
            else:
                check_records([row], "demonstration", source="it")
                check_ids(row["completion_ids"], "completion_ids", row_name(row, index), LARGEST_ID)
                shown = trace_row(row, row_name(row, index), traced)
                rows += [] if shown is None else [shown]
        except (AlignError, OverflowError) as error:
            # Checked alone, the row was the first.
            refused.append(str(error).replace(f"it, {row_name(row, 0)}", row_name(row, index))[:300])
    if refused:
        run.problems.append(
            f"{sampled.path}: {len(refused)} of {len(sampled.rows)} rows looked at cannot be shown, the first: {refused[0]}"
        )
    return rows, SIDES if columns else ("trace",), columns or traced


def _add_histograms(
    histograms: list[dict[str, Any]], sampled: Sampled, rows: list[Record], sides: tuple[str, ...], columns: list[str]
) -> None:
    """A column that a later file only carries on is shown once, with the names of all files."""
    for column in columns:
        summary = column_summary(rows, column, sides)
        if not sum(sum(counts) for counts in summary["histogram"].values()):
            continue
        values = [[row.get(f"{side}_{column}") for side in sides] for row in rows]
        same = next((h for h in histograms if h["name"] == column and h["values"] == values), None)
        if same is not None:
            same["files"].append(sampled.path)
            continue
        drawn = f"{len(rows):,} of {sampled.total:,} rows" if len(rows) < sampled.total else f"{len(rows):,} rows"
        histograms.append(histogram_bars(summary, sides) | {"files": [sampled.path], "values": values, "rows": drawn})


def _first_of_each(histograms: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The first histogram of every column; and those of further files, which are folded away."""
    first = list({h["name"]: h for h in reversed(histograms)}.values())[::-1]
    return [("", first), ("of further files", [h for h in histograms if h not in first])]


def _find_tokenizer(run: Run) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a training saved beside its model; no code that comes with it is run."""
    from .models import load_tokenizer

    folders = [
        stage.outputs[0] for stage in run.stages if (run.folder / stage.outputs[0] / "tokenizer_config.json").is_file()
    ]
    for folder in folders:
        try:
            return load_tokenizer(str(run.folder / folder))
        except Exception as error:  # damaged tokenizer files raise whatever their parsers do
            run.problems.append(f"{folder}: its tokenizer cannot be loaded ({str(error)[:200]})")
    run.problems.append("examples: no training has left a tokenizer in the folder yet; give --tokenizer to see tokens")
    return None


def _examples(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    rows: list[Record],
    sides: tuple[str, ...],
    columns: list[str],
    total: int,
    limit: int,
) -> dict[str, Any]:
    every = max(1, len(rows) // limit)
    shown = rows[::every][:limit]
    data = page_data(shown, tokenizer, sides, columns, None)
    # Colours and histograms are those of all rows looked at.
    data["columns"] = [column_summary(rows, column, sides) for column in columns]
    return data | {"name": name, "about": f"{len(shown):,} of the {total:,} rows of {name}"}


def _flat(settings: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, str]:
    """Settings by dotted names, as texts of at most 200 characters."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and depth < 4:
            found |= _flat(value, f"{name}.", depth + 1)
        else:
            text = str(value)
            found[name] = text if len(text) <= 200 else f"{text[:200]} … ({len(text):,} characters)"
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)[:200]
    try:
        return f"{value:,}" if isinstance(value, int) else number(value)
    except ValueError:  # an integer of thousands of digits
        return "a number too long to show"


def _stage(stage: Stage) -> dict[str, Any]:
    time = "" if stage.finished is None else datetime.fromtimestamp(stage.finished).strftime("%Y-%m-%d %H:%M:%S")
    counts = {str(name).replace("_", " "): _text(value) for name, value in stage.counts.items()}
    return {
        "name": stage.name, "outputs": stage.outputs, "state": stage.state, "unfinished": stage.finished is None,
        "time": time, "counts": counts, "settings": _flat(stage.settings),
    }  # fmt: skip


def _drops(stages: list[Stage]) -> list[dict[str, Any]]:
    """Counts of rows that a stage left out, by reason; those of 0 as well, since they say that something was looked for."""
    found = []
    for stage in stages:
        for reason, meaning in DROPS.items():
            count = stage.counts.get(reason)
            if isinstance(count, int) and not isinstance(count, bool):
                found.append(
                    {
                        "stage": stage.name,
                        "output": stage.outputs[0],
                        "meaning": meaning,
                        "count": _text(count),
                        "none": not count,
                        "reason": reason,
                    }
                )
    return sorted(found, key=lambda drop: drop["none"])
