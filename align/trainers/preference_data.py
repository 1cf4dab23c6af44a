"""Preference data sets as the token DPO trainers read them: tokenized once, checked row by row, drops counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import pyarrow
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.trainer.utils import global_then_local_main_first

from ..errors import MissingColumnError, RecordError
from ..records import PROBABILITIES, TOKEN_COLUMNS, check_token_columns, row_name
from ..tokens import CompletionRule, check_pair_ids, encode_pair
from .row_data import lengths_of, numbers_of, tables_of

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
    rule: CompletionRule,
) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """Tokenizes text rows, checks all rows, and drops those whose prompt leaves no room for a completion.

    Args:
        dataset: rows of text, or of ids with token-level columns. Rows of a stream are checked as they come.
        args: a TRL DPO configuration: `max_length`, `truncation_mode`, `dataset_num_proc`.
        name: `train`, `eval`, …, for messages.
        vocabulary: ids lie below it: what tokenizer and model both know.
        columns: token-level columns, without their side, that the trainer reads.
        required: prefixed columns that must be there.
        rule: what completions of text and messages end with.

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
    if has_ids:
        rule.check_unused(f"{name} data set")
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
        ids = {} if has_ids else encode_pair(tokenizer, row, f"{name} data set, {row_name(row, index)}", rule)
        check({**row, **ids}, index)
        return ids

    options: dict[str, Any] = {} if stream else {"num_proc": args.dataset_num_proc}
    with global_then_local_main_first():
        if has_ids and not stream:
            index = 0
            for table in tables_of(dataset, [column for column in _CHECKED if column in names] + token_level):
                if not _is_plain(table, vocabulary, columns):
                    for place, row in enumerate(table.to_pylist()):
                        check(row, index + place)
                index += len(table)
        else:
            desc = {} if stream else {"desc": f"Tokenizing {name} dataset"}
            dataset = dataset.map(prepare, with_indices=True, **options, **desc)
        drops = args.max_length is not None and args.truncation_mode == "keep_start"
        if stream:
            if drops:
                dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
            return dataset, {}
        lengths = lengths_of(dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
        counts = _count_lengths(lengths, args.max_length, drops)
        _report(name, counts, args)
        if drops and counts["prompt_fills_max_length"]:
            dataset = dataset.select(numpy.flatnonzero(lengths["prompt_ids"] < args.max_length))
    return dataset, counts


#: What a row's check reads, besides token-level columns.
_CHECKED = ("id", "prompt_ids", "chosen_ids", "rejected_ids")


def _is_plain(table: pyarrow.Table, vocabulary: int, columns: Sequence[str]) -> bool:
    """Whether nothing can be wrong with any of these rows, seen at once; where that is not so, each is looked at."""
    lengths = {}
    for name in _CHECKED[1:]:
        found = numbers_of(table[name]) if name in table.column_names else None
        if found is None or found[1].dtype.kind not in "iu" or not len(found[1]) or found[0].min() == 0:
            return False
        if found[1].min() < 0 or found[1].max() >= vocabulary:
            return False
        lengths[name] = found[0]
    for side in SIDES:
        for column in columns:
            if f"{side}_{column}" in table.column_names:
                found = numbers_of(table[f"{side}_{column}"])
                if found is None or not numpy.array_equal(found[0], lengths[f"{side}_ids"]):
                    return False
                if not numpy.isfinite(found[1]).all():
                    return False
                if column in PROBABILITIES and (found[1].min() < 0 or found[1].max() > 1):
                    return False
    return True


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


def _count_lengths(lengths: dict[str, numpy.ndarray], max_length: int | None, drops: bool) -> dict[str, int]:
    counts = {"rows": len(lengths["prompt_ids"]), "prompt_fills_max_length": 0, "truncated": 0}
    if max_length is not None:
        filled = (lengths["prompt_ids"] >= max_length) & drops
        longest = lengths["prompt_ids"] + numpy.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        counts["prompt_fills_max_length"] = int(filled.sum())
        counts["truncated"] = int(((longest > max_length) & ~filled).sum())
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
