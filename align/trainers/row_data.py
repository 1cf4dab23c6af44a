"""Rows as a data set on disk, and passes over whole data sets that hold a few thousand of their rows at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.compute
from datasets import Dataset, IterableDataset

from ..atomic import atomic_path
from ..errors import RecordError, RecordFileError
from ..processes import process_state, together
from ..progress import DELAY, progress
from ..records import Record

#: Rows of a table, and rows after which a file is mapped anew.
ROWS_PER_TABLE, ROWS_PER_MAPPING = 1_000, 50_000


def dataset_on_disk(rows: Sequence[Record], path: Path, hidden: bool = False) -> Dataset:
    """What `Dataset.from_list(rows)` is, but written row by row to `path` and mapped into memory from there.

    One process writes, all read.

    Args:
        hidden: shows no progress.

    Raises:
        RecordError: a column whose values have no common type.
        RecordFileError: `path` cannot be written, or another process cannot read it.
    """
    process = process_state()
    with together(process):
        if process.is_main_process:
            _write(rows, path, hidden)
    try:
        return Dataset.from_file(str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise RecordFileError(
            f"{path}: process {process.process_index} cannot read what process 0 wrote there ({error}); give an output folder that "
            "all machines share"
        ) from error


def _write(rows: Sequence[Record], path: Path, hidden: bool) -> None:
    def tables() -> Iterator[pyarrow.Table]:
        there, start = iter(rows), 0
        while part := list(islice(there, ROWS_PER_TABLE)):
            names = dict.fromkeys(name for row in part for name in row)  # the first row may lack a column of others
            yield pyarrow.table({name: _column(part, name, start) for name in names})
            start += len(part)
            bar.update(start - bar.n)

    # With each pass over the rows, the bar begins again.
    with atomic_path(path) as temporary, progress(len(rows), "writing rows", hidden=hidden, delay=DELAY) as bar:
        schema = next(tables()).schema
        if _write_tables(temporary, tables(), schema):
            return
        # Numbers that were whole for a thousand rows, or a column that was empty.
        try:
            schema = pyarrow.unify_schemas([table.schema for table in tables()], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise RecordError(f"the rows have values of different types in one column: {error}") from None
        _write_tables(temporary, (_completed(table, schema).cast(schema) for table in tables()), schema)


def _write_tables(path: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> bool:
    """Whether all tables had this schema and were written."""
    with pyarrow.ipc.new_stream(str(path), schema) as writer:
        for table in tables:
            if table.schema != schema:
                return False
            writer.write_table(table)
    return True


def _completed(table: pyarrow.Table, schema: pyarrow.Schema) -> pyarrow.Table:
    """The table with all columns of the schema, empty where it has none, in the schema's order."""
    for name in set(schema.names) - set(table.column_names):
        table = table.append_column(name, pyarrow.nulls(len(table)))
    return table.select(schema.names)


def _column(rows: Sequence[Record], name: str, start: int) -> pyarrow.Array:
    try:
        return pyarrow.array([row.get(name) for row in rows])
    except (pyarrow.ArrowException, OverflowError) as error:
        raise RecordError(
            f"rows {start} to {start + len(rows) - 1}: {name} has values of different types ({error}); give one type"
        ) from None


def plain_rows(dataset: Any) -> Any:
    """The rows that a reader of the data set gets, as Python values: without its format and the columns that this hides.

    A transform (`set_transform`) makes each row once, here, because the columns that it makes are not the data set's own.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if not isinstance(dataset, Dataset):
        return dataset
    seen = dataset.format
    if seen["type"] == "custom":
        return dataset.map(dict, remove_columns=dataset.column_names).with_format(None)
    if len(seen["columns"]) < len(dataset.column_names):
        dataset = dataset.select_columns(seen["columns"])
    return dataset if seen["type"] is None else dataset.with_format(None)


def tables_of(dataset: Dataset, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
    """Some columns of a data set, in its order, as tables of at most `ROWS_PER_TABLE` rows."""
    for start in range(0, len(dataset), ROWS_PER_MAPPING):
        # Pages of a file stay mapped once they were read; a copy maps it anew, and takes them along when it goes.
        part = pickle.loads(pickle.dumps(dataset)) if dataset.cache_files else dataset
        part = part.select(range(start, min(start + ROWS_PER_MAPPING, len(dataset))))
        yield from part.select_columns(list(columns)).with_format("arrow").iter(ROWS_PER_TABLE)


def lengths_of(dataset: Dataset, columns: Sequence[str]) -> dict[str, numpy.ndarray]:
    """Per column of lists, how long that of each row is."""
    found: dict[str, list[numpy.ndarray]] = {column: [numpy.zeros(0, dtype=numpy.int64)] for column in columns}
    for table in tables_of(dataset, columns):
        for column in columns:
            lengths = pyarrow.compute.list_value_length(table[column])
            found[column].append(lengths.to_numpy().astype(numpy.int64))
    return {column: numpy.concatenate(parts) for column, parts in found.items()}


def numbers_of(column: pyarrow.ChunkedArray) -> tuple[numpy.ndarray, numpy.ndarray] | None:
    """A column of lists of numbers as its lengths and all its numbers; `None` where it is anything else, or has gaps."""
    array: Any = column.combine_chunks()
    if isinstance(array, pyarrow.ChunkedArray):
        array = pyarrow.concat_arrays(array.chunks)
    if not (pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type)) or array.null_count:
        return None
    values = array.flatten()
    number = pyarrow.types.is_integer(values.type) or pyarrow.types.is_floating(values.type)
    if not number or values.null_count:
        return None
    return pyarrow.compute.list_value_length(array).to_numpy(), values.to_numpy()
