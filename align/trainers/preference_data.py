"""Preference data sets as the token DPO trainers read them: tokenized once, checked row by row, drops counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import pyarrow
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import prepare_multimodal_messages

from ..errors import ConfigError, MissingColumnError, RecordError
from ..prompts import check_used
from ..records import (
    LARGEST_WEIGHT,
    PAIR_WEIGHT,
    PROBABILITIES,
    TOKEN_COLUMNS,
    check_pair_weight,
    check_token_columns,
    row_name,
)
from ..tokens import CompletionRule, check_pair_ids, encode_pair, truncate_completion
from ..trl_versions import global_then_local_main_first
from .row_data import lengths_of, numbers_of, plain_rows, tables_of

logger = get_logger(__name__)

SIDES = ("chosen", "rejected")

#: Why a row is dropped. Each is looked for behind tokenization and truncation, the last changes of a row.
DROPPED = {
    "prompt_fills_max_length": "the prompt fills max_length",
    "equal": "chosen and rejected are equal",
    "equal_after_truncation": "chosen and rejected are equal after truncation to max_length",
}


def column_names(dataset: Dataset | IterableDataset | None) -> list[str]:
    """Names of the columns that a data set's rows have; see `plain_rows`.

    A stream or a transform may not declare them. Then they are those of its first row.
    """
    if dataset is None:
        return []
    seen = dataset.format if isinstance(dataset, Dataset) else {"type": None, "columns": dataset.column_names}
    return (seen["type"] != "custom" and seen["columns"]) or list(next(iter(dataset), {}))


def has_reference(dataset: Any) -> bool:
    """Whether a data set has both sides' reference log-probabilities."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return False
    names = column_names(dataset)
    return all(f"{side}_ref_logps" in names for side in SIDES)


def check_precomputable(dataset: Any, name: str) -> None:
    """Raises a ConfigError where the reference's numbers of a stream are to be computed beforehand."""
    if isinstance(dataset, IterableDataset) and not has_reference(dataset):
        raise ConfigError(
            f"{name} data set: precompute_ref_log_probs=True is not supported with IterableDataset, whose rows are not kept; give a "
            "datasets.Dataset, or unset it, and leave the training data's reference columns out"
        )


def prepare_preference_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer,
    args,
    name: str,
    vocabulary: int,
    columns: Sequence[str],
    required: Sequence[str],
    rule: CompletionRule,
    parts: bool = False,
) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """Tokenizes text rows, checks all rows, and drops those that have nothing to train on: whose prompt leaves no room for a
    completion, or whose completions are equal, before or after truncation. Their loss would be ln 2 forever.

    Args:
        dataset: rows of text, or of ids with token-level columns. Rows of a stream are checked as they come.
        args: a TRL DPO configuration: `max_length`, `truncation_mode`, `dataset_num_proc`.
        name: `train`, `eval`, …, for messages.
        vocabulary: ids lie below it: what tokenizer and model both know.
        columns: token-level columns, without their side, that the trainer reads.
        required: prefixed columns that must be there.
        rule: what completions of text and messages end with.
        parts: whether the chat template takes messages in parts, as a processor's does.

    Returns:
        The data set with ids and the columns that are read, and counts: `rows`, `truncated`, and of those dropped
        `prompt_fills_max_length`, `equal` and `equal_after_truncation`. A stream's drops are counted as they come, again in
        every epoch.

    Raises:
        MissingColumnError, RecordError: naming the row, the value and the remedy.
    """
    dataset = plain_rows(dataset)
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
            if row.get(column) is None:
                raise MissingColumnError(
                    f"{name} data set, {row_name(row, index)}: {column} is empty; score the row or remove it"
                )
        for side in SIDES:
            for column in columns:
                if (row.get(f"{side}_{column}") is None) == (
                    f"{side}_{column}" in names
                ):  # rows of a stream may differ
                    empty = "empty, other rows have it" if f"{side}_{column}" in names else "not in the first row"
                    raise RecordError(
                        f"{name} data set, {row_name(row, index)}: {side}_{column} is {empty}; fill or remove it"
                    )
        check_token_columns(row, f"{name} data set, {row_name(row, index)}", columns)
        check_pair_weight(row, f"{name} data set, {row_name(row, index)}", PAIR_WEIGHT in names)

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        # A stream's rows are as its generator makes them, with numbers of NumPy, say; an Arrow table has Python's.
        plain = {column: value.tolist() for column, value in row.items() if hasattr(value, "tolist")}
        row, ids, where = {**row, **plain}, {}, f"{name} data set, {row_name(row, index)}"
        if not has_ids:
            ids = encode_pair(tokenizer, _in_parts(row) if parts else row, where, rule)
            check_used(row, row.get("prompt") or row["chosen"], where)
        check({**row, **ids}, index)
        return plain | ids

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
        if stream:
            return _usable(dataset, name, args)
        lengths = lengths_of(dataset, _IDS)
        reasons = _reasons(dataset, args)
        counts = _count(lengths, reasons, args.max_length)
        _report(name, counts, args)
        if any(counts[reason] for reason in DROPPED):
            dataset = dataset.select(numpy.flatnonzero(reasons == 0))
    check_weighs(dataset, name)
    return dataset, counts


def _in_parts(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages have parts in place of text, as TRL gives them to a processor."""
    columns = [column for column in ("prompt", *SIDES) if isinstance(row.get(column), list)]
    return {**row, **{column: prepare_multimodal_messages(row[column]) for column in columns}}


_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")

#: What a row's check reads, besides token-level columns.
_CHECKED = ("id", *_IDS, PAIR_WEIGHT)


def _is_plain(table: pyarrow.Table, vocabulary: int, columns: Sequence[str]) -> bool:
    """Whether nothing can be wrong with any of these rows, seen at once; where that is not so, each is looked at."""
    if PAIR_WEIGHT in table.column_names and not _are_weights(table[PAIR_WEIGHT]):
        return False
    lengths = {}
    for name in _IDS:
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


def _are_weights(column: pyarrow.ChunkedArray) -> bool:
    number = pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)
    if not number or column.null_count:
        return False
    values = column.to_numpy()
    return bool(((values >= 0) & (values <= LARGEST_WEIGHT)).all())  # False for NaN


def check_weighs(dataset: Dataset, name: str) -> None:
    """Raises a RecordError where each pair of a data set has weight 0."""
    if PAIR_WEIGHT not in dataset.column_names:
        return
    for table in tables_of(dataset, (PAIR_WEIGHT,)):
        if table[PAIR_WEIGHT].to_numpy().astype(numpy.float32).any():
            return
    raise RecordError(
        f"{name} data set: {PAIR_WEIGHT} = 0 in all of its {len(dataset)} pairs that can be trained on, so that nothing can be "
        "learned; give some of them a positive weight, or remove the column"
    )


def _check_columns(name: str, names: list[str], token_level: list[str], has_ids: bool, required: Sequence[str]) -> None:
    missing = [column for column in required if column not in names]
    if missing:
        raise MissingColumnError(
            f"{name} data set: {', '.join(missing)} missing; its columns are {', '.join(names)}. "
            "Make them with `align score`, beside the ids they belong to"
        )
    if sideless := [column for column in TOKEN_COLUMNS if column in names]:
        raise MissingColumnError(
            f"{name} data set: column {sideless[0]} has no side, so nothing reads it; name it chosen_{sideless[0]} or "
            f"rejected_{sideless[0]}, or remove it (the weight of a whole pair is in {PAIR_WEIGHT})"
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


#: Reasons of `_reason_to_drop` by the number that stands for them in `_reasons`; 0 is a row that is kept.
_CODES = ("", *DROPPED)


def _reason_to_drop(prompt_length: int, chosen: Sequence, rejected: Sequence, args) -> str:
    """A key of `DROPPED`; empty for a row that can be trained on."""
    if args.max_length is not None and args.truncation_mode == "keep_start" and prompt_length >= args.max_length:
        return "prompt_fills_max_length"
    if numpy.array_equal(chosen, rejected):
        return "equal"
    kept = [
        truncate_completion(prompt_length, ids, args.max_length, args.truncation_mode) for ids in (chosen, rejected)
    ]
    return "equal_after_truncation" if numpy.array_equal(*kept) else ""


def _reasons(dataset: Dataset, args) -> numpy.ndarray:
    """Per row the place of its `_reason_to_drop` in `_CODES`: a byte, since there may be millions."""
    found = bytearray()
    for table in tables_of(dataset, _IDS):
        columns = [numbers_of(table[name]) for name in _IDS]
        prompts, *sides = [numpy.split(ids, lengths.cumsum()[:-1]) for lengths, ids in columns]
        rows = zip(prompts, *sides, strict=True)
        found += bytes(_CODES.index(_reason_to_drop(len(prompt), *pair, args)) for prompt, *pair in rows)
    return numpy.frombuffer(found, dtype=numpy.uint8)


def _usable(stream: IterableDataset, name: str, args) -> tuple[IterableDataset, dict[str, int]]:
    """Rows of a stream that can be trained on, and the counts of the others as they come.

    Raises:
        RecordError: there is none.
    """
    counts = dict.fromkeys(DROPPED, 0)

    def is_usable(row: dict[str, Any]) -> bool:
        reason = _reason_to_drop(len(row["prompt_ids"]), row["chosen_ids"], row["rejected_ids"], args)
        if reason:
            if not counts[reason]:
                logger.warning(f"{name} data set: rows are dropped because {DROPPED[reason]}")
            counts[reason] += 1
        return not reason

    usable = stream.filter(is_usable)
    if next(iter(usable), None) is None:
        _refuse(name, counts, args)
    counts.update(dict.fromkeys(DROPPED, 0))  # training begins at the first row again
    return usable, counts


def _count(lengths: dict[str, numpy.ndarray], reasons: numpy.ndarray, max_length: int | None) -> dict[str, int]:
    found = numpy.bincount(reasons, minlength=len(_CODES)).tolist()
    counts = {"rows": len(reasons), **dict(zip(DROPPED, found[1:], strict=True)), "truncated": 0}
    if max_length is not None:
        longest = lengths["prompt_ids"] + numpy.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        counts["truncated"] = int(((longest > max_length) & (reasons == 0)).sum())
    return counts


def _report(name: str, counts: dict[str, int], args) -> None:
    if counts["rows"] == sum(counts[reason] for reason in DROPPED):
        _refuse(name, counts, args)
    for reason, words in DROPPED.items():
        if counts[reason]:
            limit = f" = {args.max_length}" if words.endswith("max_length") else ""
            logger.warning(f"{name} data set: {counts[reason]} of {counts['rows']} rows dropped: {words}{limit}")
    if counts["truncated"]:
        logger.warning(
            f"{name} data set: {counts['truncated']} of {counts['rows']} rows truncated to {args.max_length} tokens"
        )


def _refuse(name: str, counts: dict[str, int], args) -> None:
    """Raises a RecordError with the reasons why no row is left."""
    total = sum(counts[reason] for reason in DROPPED)
    if not total:
        raise RecordError(f"{name} data set: there are no rows in it; give some")
    if counts["prompt_fills_max_length"] == total:
        raise RecordError(
            f"{name} data set: the prompt of each of its {total} rows fills max_length = {args.max_length} "
            "tokens, which leaves no completion to train on; raise max_length"
        )
    found = ", ".join(f"{words}: {counts[reason]}" for reason, words in DROPPED.items() if counts[reason])
    limit = "" if args.max_length is None else f", or raise max_length = {args.max_length}"
    raise RecordError(
        f"{name} data set: none of its {total} rows can be trained on ({found}); give pairs that differ{limit}"
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
