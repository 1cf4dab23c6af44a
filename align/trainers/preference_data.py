"""Preference data sets as the token DPO trainers read them: tokenized once, checked row by row, drops counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.trainer.utils import global_then_local_main_first

from ..errors import MissingColumnError, RecordError
from ..records import TOKEN_COLUMNS, check_token_columns, row_name
from ..tokens import check_pair_ids, encode_pair

logger = get_logger(__name__)

SIDES = ("chosen", "rejected")


def column_names(dataset: Dataset | IterableDataset | None) -> list[str]:
    """Names of a data set's columns; a stream that does not declare them is asked for its first row."""
    if dataset is None:
        return []
    return dataset.column_names or list(next(iter(dataset), {}))


def has_reference(dataset: Any) -> bool:
    """Whether a data set has both sides' reference log-probabilities."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return False
    names = column_names(dataset)
    return all(f"{side}_ref_logps" in names for side in SIDES)


def prepare_preference_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer,
    args,
    name: str,
    vocabulary: int,
    columns: Sequence[str],
    required: Sequence[str],
) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """Tokenizes text rows, checks all rows, and drops those whose prompt leaves no room for a completion.

    Args:
        dataset: rows of text, or of ids with token-level columns. Rows of a stream are checked as they come.
        args: a TRL DPO configuration: `max_length`, `truncation_mode`, `dataset_num_proc`.
        name: `train`, `eval`, …, for messages.
        vocabulary: ids lie below it: what tokenizer and model both know.
        columns: token-level columns, without their side, that the trainer reads.
        required: prefixed columns that must be there.

    Returns:
        The data set with ids and the columns that are read, and counts: `rows`, `prompt_fills_max_length` (dropped),
        `truncated`. A stream's counts are not known in advance and stay empty.

    Raises:
        MissingColumnError, RecordError: naming the row, the value and the remedy.
    """
    names = column_names(dataset)
    stream = isinstance(dataset, IterableDataset)
    token_level = [f"{side}_{column}" for side in SIDES for column in TOKEN_COLUMNS if f"{side}_{column}" in names]
    has_ids = "chosen_ids" in names or "rejected_ids" in names
    _check_columns(name, names, token_level, has_ids, required)

    def check(row: dict[str, Any], index: int) -> None:
        check_pair_ids(row, index, vocabulary)
        for column in required:
            if row[column] is None:
                raise MissingColumnError(
                    f"{name} data set, {row_name(row, index)}: {column} is empty; score the row or remove it"
                )
        for side in SIDES:
            for column in columns:
                if f"{side}_{column}" in names and row[f"{side}_{column}"] is None:
                    raise RecordError(
                        f"{name} data set, {row_name(row, index)}: {side}_{column} is empty, other rows have it; fill or remove it"
                    )
        check_token_columns(row, f"{name} data set, {row_name(row, index)}", columns)

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        ids = {} if has_ids else encode_pair(tokenizer, row, f"{name} data set, {row_name(row, index)}")
        check({**row, **ids}, index)
        return ids

    options: dict[str, Any] = {} if stream else {"num_proc": args.dataset_num_proc}
    with global_then_local_main_first():
        if has_ids and not stream:
            for index, row in enumerate(dataset):
                check(row, index)
        else:
            desc = {} if stream else {"desc": f"Tokenizing {name} dataset"}
            dataset = dataset.map(prepare, with_indices=True, **options, **desc)
        counts: dict[str, int] = {}
        if not stream:
            counts = _count_lengths(dataset, args.max_length, args.truncation_mode)
            _report(name, counts, args)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length, **options)
    return dataset, counts


def _check_columns(name: str, names: list[str], token_level: list[str], has_ids: bool, required: Sequence[str]) -> None:
    missing = [column for column in required if column not in names]
    if missing:
        raise MissingColumnError(
            f"{name} data set: {', '.join(missing)} missing; its columns are {', '.join(names)}. "
            "Make them with `align score`, beside the ids they belong to"
        )
    if token_level and not has_ids:
        raise MissingColumnError(
            f"{name} data set: {', '.join(token_level)} without ids; text would be tokenized again, and the numbers "
            "could fall on other tokens. Give prompt_ids, chosen_ids and rejected_ids beside them"
        )
    for side, other in (SIDES, SIDES[::-1]):
        if f"{side}_ref_logps" in names and f"{other}_ref_logps" not in names:
            raise MissingColumnError(
                f"{name} data set: {side}_ref_logps without {other}_ref_logps; give both or neither"
            )


def _count_lengths(dataset: Dataset, max_length: int | None, truncation_mode: str) -> dict[str, int]:
    counts = {"rows": len(dataset), "prompt_fills_max_length": 0, "truncated": 0}
    if max_length is not None:
        for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
            prompt = len(row["prompt_ids"])
            if prompt >= max_length and truncation_mode == "keep_start":
                counts["prompt_fills_max_length"] += 1
            elif prompt + max(len(row["chosen_ids"]), len(row["rejected_ids"])) > max_length:
                counts["truncated"] += 1
    return counts


def _report(name: str, counts: dict[str, int], args) -> None:
    if counts["rows"] == counts["prompt_fills_max_length"]:
        raise RecordError(
            f"{name} data set: the prompt of each of its {counts['rows']} rows fills max_length = {args.max_length} "
            "tokens, which leaves no completion to train on; raise max_length"
        )
    if counts["prompt_fills_max_length"]:
        logger.warning(
            f"{name} data set: {counts['prompt_fills_max_length']} of {counts['rows']} rows dropped: their prompts fill "
            f"max_length = {args.max_length}"
        )
    if counts["truncated"]:
        logger.warning(
            f"{name} data set: {counts['truncated']} of {counts['rows']} rows truncated to {args.max_length} tokens"
        )


def pad_columns(dataset: Dataset, rows: dict[str, list[list[float]]], column: str, truncation_mode: str) -> Dataset:
    """Adds token-level columns computed on truncated rows: what the truncation cut off gets 0 and is never read.

    Args:
        rows: per side, one list of numbers per row, no longer than the row's completion.
        truncation_mode: the end that was kept, as in TRL.
    """
    for side in SIDES:
        filled = []
        for ids, values in zip(dataset[f"{side}_ids"], rows[side], strict=True):
            rest = [0.0] * (len(ids) - len(values))
            filled.append(values + rest if truncation_mode == "keep_start" else rest + values)
        dataset = dataset.add_column(f"{side}_{column}", filled)
    return dataset
