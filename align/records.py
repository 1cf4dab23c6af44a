"""The records that pass between stages: schema, reading, checking and writing.

A record is a plain dict; a file of records is JSONL or Parquet, by its ending. Every per-token number stands in the
same row as the token ids it belongs to, one number per id, EOS included (`TOKEN_COLUMNS`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from .atomic import atomic_path
from .errors import MissingColumnError, RecordError, RecordFileError

Record = dict[str, Any]

#: Columns every kind of record must have, in the order they are written.
REQUIRED = {
    "problem": ("id", "prompt", "answer"),
    "sample": ("id", "prompt", "answer", "sample", "prompt_ids", "completion_ids", "completion", "finish_reason"),
    "verdict": (
        *("id", "prompt", "answer", "sample", "prompt_ids", "completion_ids", "completion", "finish_reason"),
        *("extracted", "correct"),
    ),
    "pair": ("id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"),
    "demonstration": ("id", "prompt", "completion", "prompt_ids", "completion_ids"),
}

#: Token-level columns, without their `chosen_` / `rejected_` prefix.
TOKEN_COLUMNS = ("ce_scores", "guidance_logratios", "ref_logps", "weights", "entropies", "rollout_values")

#: Those of them that lie in [0, 1].
PROBABILITIES = ("ce_scores", "rollout_values")

#: The column of a pair that scales the pair's loss: one number of at most `LARGEST_WEIGHT`, which float32 holds.
PAIR_WEIGHT = "weight"
LARGEST_WEIGHT = 3.4e38

#: Endings of files of rows that are read, in any case; each may have an ending of `COMPRESSIONS` behind it.
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

#: Endings of compressed files, and what fsspec calls their codec.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}

#: `ENDINGS` and `COMPRESSIONS` for messages and help pages.
READABLE = f"{', '.join(ENDINGS)}, or one of these with {', '.join(COMPRESSIONS)} behind it"
#: Keys under which a message holds reasoning, and under which it holds what it says at all.
REASONING = ("reasoning_content", "reasoning", "thinking")
SAID = ("content", "tool_calls", *REASONING)

_ID_COLUMNS = ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")
_TEXT_COLUMNS = ("answer", "completion", "finish_reason")

#: Rows of a group of a Parquet file.
ROWS_PER_GROUP = 10_000

#: Deepest nesting of lists and objects in a line; far deeper ones would exhaust the stack of whoever walks them later.
DEEPEST = 64
#: Token ids below this fit every tokenizer's and tensor's integers.
_MOST_IDS = 2**31
_MOST = sys.float_info.max


def row_name(row: Mapping[str, Any], index: int) -> str:
    """How an error message names a row: its place in the file and, where it has one, its id."""
    return f"row {index} (id {row['id']!r})" if row.get("id") is not None else f"row {index}"


def read_records(path: str | os.PathLike, kind: str | None = None) -> list[Record]:
    """Reads a file of records.

    Args:
        path: file with one of `ENDINGS`; stages write JSONL and Parquet.
        kind: a key of `REQUIRED`; every row is then checked with `check_records`.

    Raises:
        RecordFileError: the file is missing, unreadable, or of another ending.
        RecordError: a line is not a JSON object, or a row does not fit `kind`.
        MissingColumnError: a required column is not there.
    """
    path = Path(path)
    check_file(path)
    ending, compression = file_format(path)
    if ending in (".jsonl", ".ndjson") and compression is None:
        rows = list(read_jsonl(path))
    elif ending == ".parquet" and compression is None:
        rows = _read_parquet(path)
    else:
        from .record_file import RecordFile

        rows = list(RecordFile(path))
    if kind is not None:
        check_records(rows, kind, source=str(path))
    return rows


def file_format(path: str | os.PathLike) -> tuple[str, str | None]:
    """The ending of a file of rows, in lower case and without that of a compression, and the compression's codec."""
    path = Path(path)
    codec = COMPRESSIONS.get(path.suffix.lower())
    return (path.suffix if codec is None else path.with_suffix("").suffix).lower(), codec


def check_file(path: Path) -> None:
    """Raises a RecordFileError where a file is missing, or its ending is not one of `ENDINGS`."""
    if file_format(path)[0] not in ENDINGS:
        raise RecordFileError(f"{path}: cannot tell the format from the ending {path.suffix!r}; use {READABLE}")
    if not os.path.isfile(path):
        raise RecordFileError(f"{path}: no such file; run the stage that writes it first, or check the path")


def read_jsonl(path: Path, name: str | os.PathLike | None = None) -> Iterator[Record]:
    """The rows of a JSONL file, one after the other; errors as in `read_records`, which call the file `name`."""
    name = path if name is None else name
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except (ValueError, RecursionError) as error:
                    raise RecordError(
                        f"{name}, line {number}: not JSON ({error}): {line[:80]!r}; one JSON object per line is expected"
                    ) from None
                if not isinstance(row, dict):
                    raise RecordError(f"{name}, line {number}: {line[:80]!r} is no JSON object; each line must be one")
                yield row
    except UnicodeDecodeError as error:
        raise RecordFileError(f"{name}: not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise RecordFileError(f"{name}: cannot be read: {error.strerror or error}") from error


def parse_json(line: str) -> Any:
    """A text's value; a ValueError where a later stage could not write it again, or a part of it would be lost."""
    value = _DECODER.decode(line)
    if "\\u" in line or line.count("[") + line.count("{") > DEEPEST:
        _check_values(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large for a float")
    return value


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


_DECODER = json.JSONDecoder(parse_float=_float, parse_constant=_refuse_constant, object_pairs_hook=_object)


def _check_values(value: Any) -> None:
    left = [(value, 1)]
    while left:
        value, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        if isinstance(value, dict):
            left += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            left += [(part, depth + 1) for part in value]
        elif isinstance(value, str):
            value.encode()  # a UnicodeEncodeError is a ValueError, and says which half of a character stands alone


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        if twice := [name for name in table.column_names if table.column_names.count(name) > 1]:
            raise ValueError(f"column {twice[0]!r} stands twice")
        return arrow_rows(table)
    except Exception as error:  # noqa: BLE001 - of a damaged file, or of types that Python lacks, pyarrow raises nearly everything
        raise RecordFileError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def check_output(path: str | os.PathLike) -> None:
    """Raises a RecordFileError where `write_records` could not write to `path`; call it before the work.

    Raises:
        RecordFileError: the ending is unknown, or `path` is a folder.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise RecordFileError(f"{path}: unknown ending {path.suffix!r}; use .jsonl or .parquet")
    if os.path.isdir(path):
        raise RecordFileError(f"{path} is a folder; give the name of a file in it")


def write_records(path: str | os.PathLike, rows: Iterable[Record]) -> None:
    """Writes records as JSONL or Parquet, by file ending; the file appears whole or not at all.

    Args:
        rows: for Parquet a sequence, which is gone through twice; of neither more than a few thousand are held at a time.

    Raises:
        RecordFileError: the ending is unknown or the file cannot be written.
        RecordError: a value cannot be represented (a NaN in JSONL, say).
    """
    path = Path(path)
    check_output(path)
    if path.suffix == ".parquet":
        _write_parquet(path, rows)
    else:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for index, row in enumerate(rows):
                try:
                    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                except (TypeError, ValueError) as error:
                    raise RecordError(f"{path}, {row_name(row, index)}: cannot be written as JSON: {error}") from None


def arrow_rows(table: Any) -> list[Record]:
    """Rows of an Arrow table or batch; values of Arrow's JSON type, as `datasets` and `write_records` write them, are decoded."""
    rows = table.to_pylist()
    for field in table.schema:
        if (decode := _decoder(field.type)) is not None:
            for row in rows:
                if row[field.name] is not None:
                    row[field.name] = decode(row[field.name])
    return rows


def _decoder(type_: Any) -> Callable[[Any], Any] | None:
    """What decodes the JSON in values of an Arrow type; `None` where there is none in it."""
    import pyarrow

    if isinstance(type_, pyarrow.JsonType):
        return parse_json
    if pyarrow.types.is_struct(type_):
        parts = {field.name: decode for field in type_ if (decode := _decoder(field.type))}
        return partial(_decode_object, parts) if parts else None
    if pyarrow.types.is_list(type_) or pyarrow.types.is_large_list(type_):
        decode = _decoder(type_.value_type)
        return partial(_decode_list, decode) if decode else None
    return None


def _decode_object(parts: Mapping[str, Callable[[Any], Any]], value: Record) -> Record:
    return value | {name: decode(value[name]) for name, decode in parts.items() if value[name] is not None}


def _decode_list(decode: Callable[[Any], Any], value: list) -> list:
    return [None if part is None else decode(part) for part in value]


def _write_parquet(path: Path, rows: Iterable[Record]) -> None:
    import pyarrow.parquet

    as_json: set[str] = set()

    def tables() -> Iterator[pyarrow.Table]:
        there = iter(rows)
        while part := list(islice(there, ROWS_PER_GROUP)):
            yield _table(part, path, as_json)

    with atomic_path(path) as temporary:
        try:
            schema = _common_schema([table.schema for table in tables()], as_json)
            if schema is not None and not schema.names:
                raise RecordError(f"{path}: rows without any field cannot be written as Parquet; use .jsonl")
            with pyarrow.parquet.ParquetWriter(temporary, schema or pyarrow.schema([])) as writer:
                for table in tables():
                    for name in set(schema.names) - set(table.column_names):
                        table = table.append_column(name, pyarrow.nulls(len(table)))
                    writer.write_table(table.select(schema.names).cast(schema))
        except pyarrow.ArrowException as error:
            raise RecordError(f"{path}: cannot be written as Parquet ({error}); use .jsonl") from None


def _common_schema(schemas: Sequence[Any], as_json: set[str]) -> Any:
    """The schema of all groups; `None` without a group. Columns whose objects differ between groups are added to `as_json`."""
    import pyarrow

    types: dict[str, Any] = {}
    for field in (field for schema in schemas for field in schema if not pyarrow.types.is_null(field.type)):
        if types.setdefault(field.name, field.type) != field.type and "struct<" in str(field.type):
            as_json.add(field.name)
    # A column may be null, or of whole numbers, for thousands of rows before its type shows.
    replaced = [
        pyarrow.schema([field.with_type(pyarrow.json_()) if field.name in as_json else field for field in schema])
        for schema in schemas
    ]
    return pyarrow.unify_schemas(replaced, promote_options="permissive") if schemas else None


def _table(rows: Sequence[Record], path: Path, as_json: set[str]) -> Any:
    """A table with the columns of all rows: pyarrow's own takes those of the first row, and drops the others' silently.

    Args:
        as_json: columns to be written as JSON; those that Arrow would change are added.
    """
    import pyarrow

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if name not in as_json and any(map(_has_objects, values)) and not _kept_by_arrow(values):
            as_json.add(name)
        try:
            columns[name] = _json_array(values) if name in as_json else pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise RecordError(
                f"{path}: column {name!r} cannot be written as Parquet: {error}; give all its values one type, or use .jsonl"
            ) from None
    return pyarrow.table(columns)


def _has_objects(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = next((part for part in value if part is not None), None)
    return isinstance(value, Mapping)


def _kept_by_arrow(values: list[Any]) -> bool:
    """Whether Arrow gives objects back as they are. It gives all objects of a column the same keys in the same order, and fills
    the gaps with null; Parquet has no objects without keys."""
    import pyarrow

    try:
        array = pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return False
    return "struct<>" not in str(array.type) and json.dumps(array.to_pylist()) == json.dumps(values)


def _json_array(values: Sequence[Any]) -> Any:
    import pyarrow

    texts = [None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values]
    return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts, pyarrow.string()))


def check_records(rows: Iterable[Mapping[str, Any]], kind: str, source: str = "records") -> None:
    """Checks that rows are records of `kind`: columns present, ids integers, token-level columns as long as their ids.

    Of pairs, `weight` is a number in all of them or in none.

    Raises:
        MissingColumnError: a required column is missing from a row.
        RecordError: a value has the wrong type, length or range, or a problem or a draw occurs twice.
    """
    if getattr(rows, "kind", None) == kind:
        return  # a RecordFile, checked as it was opened
    seen: set[bytes] = set()
    weighted = False

    def occurs_twice(*key: Any) -> bool:
        # A million ids of any length, in the memory of a million hashes.
        known = len(seen)
        seen.add(hashlib.blake2b(repr(key).encode(errors="surrogatepass"), digest_size=16).digest())
        return len(seen) == known

    for index, row in enumerate(rows):
        name = f"{source}, {row_name(row, index)}"
        for column in REQUIRED[kind]:
            if column not in row:
                raise MissingColumnError(
                    f"{name}: column {column!r} is missing; a {kind} record has {', '.join(REQUIRED[kind])}"
                )
        if not isinstance(row["id"], str) or not row["id"]:
            raise RecordError(f"{name}: id {row['id']!r} must be a non-empty string")
        if kind == "problem" and occurs_twice(row["id"]):
            raise RecordError(f"{name}: the id occurs twice; ids of problems must be unique")
        if kind in ("sample", "verdict"):
            if not isinstance(row["sample"], int) or isinstance(row["sample"], bool):
                raise RecordError(f"{name}: sample {row['sample']!r} must be an integer, the number of the draw")
            if occurs_twice(row["id"], row["sample"]):
                raise RecordError(
                    f"{name}: sample {row['sample']} of this problem occurs twice; remove one, or renumber"
                )
        if kind == "verdict":
            if not isinstance(row["correct"], bool):
                raise RecordError(f"{name}: correct {row['correct']!r} must be true or false")
            if row["extracted"] is not None and not isinstance(row["extracted"], str):
                raise RecordError(f"{name}: extracted {row['extracted']!r} must be text, or null for no answer")
        check_prompt(row["prompt"], name)
        for column in _TEXT_COLUMNS:
            if column in REQUIRED[kind] and not isinstance(row[column], str):
                raise RecordError(f"{name}: {column} {row[column]!r} must be text")
        for column in _ID_COLUMNS:
            if column in row:
                check_ids(row[column], column, name)
        check_token_columns(row, name)
        if kind == "pair":
            weighted = row.get(PAIR_WEIGHT) is not None if index == 0 else weighted
            check_pair_weight(row, name, weighted)


def check_prompt(prompt: Any, name: str, column: str = "prompt") -> None:
    """Raises a RecordError where a prompt (or a completion) is neither text nor chat messages."""
    if isinstance(prompt, str):
        return
    messages = isinstance(prompt, list) and prompt
    if not messages or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and any(key in m for key in SAID) for m in prompt
    ):
        raise RecordError(
            f"{name}: {column} {prompt!r} must be text or a list of messages with `role` and `content` (or `tool_calls`)"
        )


def is_empty(completion: str | list[dict]) -> bool:
    """Whether a completion says nothing: no text, no tool call, no reasoning."""
    if isinstance(completion, str):
        return not completion
    return not any(_says(message.get(key)) for message in completion for key in SAID)


def _says(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return any(part.get("text", True) if isinstance(part, dict) else part for part in parts)


def check_ids(ids: Any, column: str, name: str, vocab_size: int | None = None) -> None:
    """Checks one list of token ids: integers from 0, below `vocab_size` where that is given.

    Raises:
        RecordError: names the row, the position and the id.
    """
    if not isinstance(ids, (list, tuple)):
        raise RecordError(f"{name}: {column} must be a list of token ids, got {type(ids).__name__}")
    for position, token_id in enumerate(ids):
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise RecordError(f"{name}: {column}[{position}] = {token_id!r} is no token id; ids are integers")
        if not 0 <= token_id < (_MOST_IDS if vocab_size is None else vocab_size):
            limit = "" if vocab_size is None else f" of {vocab_size} tokens"
            raise RecordError(
                f"{name}: {column}[{position}] = {token_id} is not in the vocabulary{limit}; "
                "were the ids made with another tokenizer?"
            )


def check_token_columns(row: Mapping[str, Any], name: str, columns: Sequence[str] = TOKEN_COLUMNS) -> None:
    """Checks the token-level columns of a pair: one finite number per id, scores in [0, 1].

    Raises:
        MissingColumnError: the column's ids are missing, so nothing says which tokens the numbers belong to.
        RecordError: a length differs from the number of ids, or a number is not finite or out of range.
    """
    for side in ("chosen", "rejected"):
        for column in columns:
            full = f"{side}_{column}"
            values = row.get(full)
            if values is None:
                continue
            ids = row.get(f"{side}_ids")
            if ids is None:
                raise MissingColumnError(f"{name}: {full} stands without {side}_ids; store the ids it belongs to")
            if not isinstance(values, (list, tuple)):
                raise RecordError(f"{name}: {full} must be a list of numbers, got {type(values).__name__}")
            if len(values) != len(ids):
                raise RecordError(
                    f"{name}: {full} has {len(values)} numbers for {len(ids)} ids{_hint(row, values, ids)}"
                )
            for position, value in enumerate(values):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MOST:
                    raise RecordError(
                        f"{name}: {full}[{position}] = {value!r} is no finite number; remove or mend the row"
                    )
                if column in PROBABILITIES and not 0.0 <= value <= 1.0:
                    raise RecordError(
                        f"{name}: {full}[{position}] = {value!r} is no probability; {column} lie in [0, 1]"
                    )


def check_pair_weight(row: Mapping[str, Any], name: str, weighted: bool) -> None:
    """Checks the `weight` of a pair: a finite number of 0 or more where the data set has the column, and else nothing.

    Raises:
        RecordError: names the row and the value.
    """
    value = row.get(PAIR_WEIGHT)
    if value is None and not weighted:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (weighted and number and 0 <= value <= LARGEST_WEIGHT):
        where = " as a number, which a CSV file does not have" if isinstance(value, str) else ""
        raise RecordError(
            f"{name}: {PAIR_WEIGHT} = {value!r} must be a finite number of 0 or more (at most {LARGEST_WEIGHT:g}), in every pair or "
            f"in none; give each pair one{where} (1 changes nothing), or remove the column"
        )


def _hint(row: Mapping[str, Any], values: Sequence, ids: Sequence) -> str:
    """What usually lies behind a length that differs."""
    difference = len(values) - len(ids)
    if difference == -1:
        return "; one is missing, often EOS's: every id needs a number, EOS included"
    if difference == 1:
        return "; one too many, often the prompt's last token or a shift by one: give completion tokens only"
    if difference == len(row.get("prompt_ids") or ()):
        return "; the prompt's tokens seem to be included: give completion tokens only"
    return "; every id needs exactly one number"
