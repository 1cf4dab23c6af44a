"""Demonstrations: prompt and completion of problems that come with a solution, tokenized once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, MissingColumnError, RecordError
from .problems import load_problems
from .prompts import Phrasing, template_arguments
from .records import ENDINGS, Record, check_records, file_format, read_records, row_name
from .stages import records_hash, run_in_parts
from .tokens import CompletionRule, encode_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_PART = 1000

#: Options of `load_problems` that change a prompt.
PHRASING = tuple(field.name for field in fields(Phrasing))


def tokenize_demonstrations(
    problems: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    out_path: str | os.PathLike,
    *,
    max_prompt_length: int | None = None,
    trl_completions: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Writes demonstration records of problems with solutions.

    Args:
        problems: problem records, each with `solution`.
        out_path: demonstrations, JSONL or Parquet.
        max_prompt_length: rows whose prompt is longer, in tokens, are left out and counted.
        trl_completions: makes completions as TRL does; see `align.tokens.CompletionRule`.
        settings: what else the ids depend on (the tokenizer's hash), for resuming.

    Returns:
        Counts: `rows`, `source_rows`, `prompt_too_long`.

    Raises:
        MissingColumnError: a problem has no solution.
        RecordError: see `align.tokens.encode_row`; or no row is left.
    """
    for index, problem in enumerate(problems):
        _check_solution(problem, f"problems, {row_name(problem, index)}")
    rule = CompletionRule.of(tokenizer, trl=trl_completions)
    parts = [range(i, min(i + ROWS_PER_PART, len(problems))) for i in range(0, len(problems), ROWS_PER_PART)]

    def compute(_number: int, part: range) -> list[Record]:
        rows = []
        for index in part:
            row = encode_demonstration(
                tokenizer, problems[index], f"problems, {row_name(problems[index], index)}", rule
            )
            too_long = max_prompt_length is not None and len(row["prompt_ids"]) > max_prompt_length
            # A row left out leaves a trace, so that a run that is resumed counts it, too.
            rows.append({"_row": index, **({"_dropped": True} if too_long else row)})
        return rows

    def finish(rows: Sequence[Record]) -> Iterator[Record]:
        kept = 0
        for row in rows:
            if "_dropped" not in row:
                kept += 1
                yield row
        if not kept:
            raise RecordError(
                f"none of the {len(problems)} prompts fits max_prompt_length = {max_prompt_length}; raise it"
            )

    return run_in_parts(
        out_path, parts, compute, stage="demonstrations", order=lambda row: row.pop("_row"), finish=finish,
        settings={
            "problems": records_hash(problems), "max_prompt_length": max_prompt_length,
            **({"trl_completions": True} if trl_completions else {}), **(settings or {}),
        },
        count=lambda rows: {"source_rows": len(problems), "prompt_too_long": len(problems) - len(rows)},
    )  # fmt: skip


def load_demonstrations(
    source: str, tokenizer: PreTrainedTokenizerBase, *, trl_completions: bool = False, **options: Any
) -> list[Record]:
    """Demonstration records of a file that has ids, or of problems with solutions, a file or a hub data set.

    Args:
        trl_completions: see `tokenize_demonstrations`.
        options: of `load_problems`, for problems.

    Raises:
        MissingColumnError, RecordError: a row has no solution, or ids that cannot be.
        ConfigError: an option that phrases prompts, for rows that have ids.
    """
    rule = CompletionRule.of(tokenizer, trl=trl_completions)
    if file_format(source)[0] in ENDINGS and os.path.isfile(source):
        rows = read_records(source)
        if rows and "completion_ids" in rows[0]:
            if (limit := options.get("limit")) is not None and limit < 1:
                raise ConfigError(f"limit = {limit} must be at least 1")
            if given := [option for option in ("subset", *PHRASING) if options.get(option)]:
                raise ConfigError(f"{source}: {given[0]} changes nothing, since its rows have ids; leave it out")
            check_records(rows, "demonstration", source=source)
            rule.check_unused(source)
            return rows[:limit]
    problems = load_problems(source, **options)
    return [encode_demonstration(tokenizer, p, f"{source}, {row_name(p, i)}", rule) for i, p in enumerate(problems)]


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, problem: Record, name: str, rule: CompletionRule | None = None
) -> Record:
    """One problem with a solution as a demonstration record; `name` is how an error names it."""
    _check_solution(problem, name)
    solution = problem["solution"]
    template = template_arguments(problem, name)
    prompt_ids, ids = encode_row(tokenizer, problem["prompt"], {"solution": solution}, name, template, rule)
    known = {key: problem[key] for key in ("id", "prompt", "answer")}
    return {**known, "completion": solution, "prompt_ids": prompt_ids, "completion_ids": ids["solution"]}


def _check_solution(problem: Record, name: str) -> None:
    if not problem.get("solution"):
        raise MissingColumnError(f"{name}: no solution to learn from; give a column solution or completion")
