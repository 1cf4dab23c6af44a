"""Problems from a local file or the hub, mapped to `id`, `prompt`, `answer` and, where there are any, `solution`."""

from __future__ import annotations

from decimal import Decimal
from math import isfinite
from typing import Any

from .answers import boxed_answer
from .errors import ConfigError, MissingColumnError, RecordError
from .prompts import PROMPT_COLUMNS, Phrasing, phrase, with_input
from .records import Record, check_records, row_name
from .sources import first_of, load_rows, row_id

#: Names under which public data sets keep what we call `answer` and `solution`; the first one found is used.
ANSWER_COLUMNS = ("answer", "final_answer")
SOLUTION_COLUMNS = ("solution", "completion")
ID_COLUMNS = ("id", "uid", "question_id")


def load_problems(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    prompt_template: str | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    answers: bool = True,
) -> list[Record]:
    """Loads problems and puts them into the words the model will see.

    Args:
        source, split, subset: see `align.sources.load_rows`.
        limit: only the first so many problems.
        prompt_template: text with `{prompt}` in it, e.g. `"Question: {prompt}\\nAnswer:"`, for prompts that are text.
        chat: makes a text prompt a user message, after `system_prompt` if there is one.
        system_prompt: text of a system message, for `chat` and for prompts that are messages.
        chat_template_kwargs: arguments of the chat template, such as `{"enable_thinking": False}`; those of a row's own column
            `chat_template_kwargs` win. What other columns of a row become is the table of `align.prompts`.
        answers: `False` for open-ended prompts, which have nothing to verify: `answer` is then empty, and the text as it
            stood in the source is kept as `instruction`, `dataset` and `category` as they are.

    Raises:
        ConfigError: settings that contradict each other, or that have no place in a row's prompt.
        MissingColumnError, RecordError: a row has no prompt or no answer, or a column that has no place in its prompt.
    """
    how = Phrasing(chat, prompt_template, system_prompt, chat_template_kwargs)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} must be at least 1")
    raw = load_rows(source, split=split, subset=subset)
    count = len(raw) if limit is None else min(limit, len(raw))
    read = _to_problem if answers else _to_open_prompt
    problems = []
    for index in range(count):
        row = dict(raw[index])
        problem, name = read(row, index, source, split), f"{source}, {row_name(row, index)}"
        problems.append(problem | phrase(row, problem["prompt"], name, how, prompt_column(row)))
    check_records(problems, "problem", source=source)
    return problems


def prompt_column(row: Record) -> str:
    """The column that a row's prompt stands in; empty where there is none."""
    return next((column for column in PROMPT_COLUMNS if row.get(column) not in (None, "")), "")


def _prompt(row: Record, name: str) -> Any:
    prompt = first_of(row, PROMPT_COLUMNS)
    if prompt is None:
        raise MissingColumnError(f"{name}: no prompt; one of the columns {', '.join(PROMPT_COLUMNS)} is needed")
    return prompt


def _to_open_prompt(row: Record, index: int, source: str, split: str) -> Record:
    prompt = _prompt(row, f"{source}, {row_name(row, index)}")
    kept = {column: row[column] for column in ("dataset", "category") if row.get(column) is not None}
    asked = with_input(row, prompt, prompt_column(row)) if isinstance(prompt, str) else prompt
    return {"id": row_id(row, index, split, ID_COLUMNS), "prompt": prompt, "answer": "", "instruction": asked, **kept}


def _to_problem(row: Record, index: int, source: str, split: str) -> Record:
    name = f"{source}, {row_name(row, index)}"
    prompt = _prompt(row, name)
    solution = first_of(row, SOLUTION_COLUMNS)
    answer = first_of(row, ANSWER_COLUMNS)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = _in_digits(answer, name)
    if isinstance(answer, str) and "####" in answer:  # openai/gsm8k keeps the solution in its answer column
        solution = solution or answer
        answer = answer.rsplit("####", 1)[1].strip()
    if answer is None and isinstance(solution, str):
        answer = solution.rsplit("####", 1)[1].strip() if "####" in solution else boxed_answer(solution)
    if not answer:
        raise MissingColumnError(
            f"{name}: no answer; one of the columns {', '.join(ANSWER_COLUMNS)}, or a solution ending in "
            "'#### answer' or \\boxed{answer}, is needed"
        )
    problem = {"id": row_id(row, index, split, ID_COLUMNS), "prompt": prompt, "answer": answer}
    return problem | ({"solution": solution} if solution else {})


def _in_digits(number: float, name: str) -> str:
    """A number's digits: 0.00001 and 10000000000000000, where Python writes 1e-05 and 1e+16."""
    if not isfinite(number):
        raise RecordError(f"{name}: answer = {number} must be a finite number or text; fix or remove the row")
    return str(number) if isinstance(number, int) else format(Decimal(repr(number)), "f")
