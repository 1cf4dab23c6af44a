"""Rows of a local file or of a hub data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, RecordError, RecordFileError
from .record_file import RecordFile
from .records import parse_json


def load_rows(source: str, *, split: str = "train", subset: str | None = None) -> Sequence[dict[str, Any]]:
    """Rows, in their order.

    Args:
        source: a `.jsonl` or `.parquet` file; a `.json` file that is one list of objects, also as
            `hf://datasets/owner/name/file.json`; or the name of a hub data set.
        split, subset: split and configuration of a hub data set (`main` for `openai/gsm8k`).

    Raises:
        ConfigError: no such data set, split or subset.
        RecordFileError, RecordError: a file cannot be read, or holds nothing.
    """
    from datasets import load_dataset

    suffix = Path(source).suffix
    if subset is not None and (os.path.exists(source) or "://" in source):
        raise ConfigError(f"{source}: subset = {subset!r} belongs to a hub data set, and this is a file; leave it out")
    try:
        if suffix in (".jsonl", ".parquet") and "://" not in source:
            rows: Sequence[Any] = RecordFile(source)
        elif suffix == ".json":
            rows = _read_json(source)
        elif os.path.exists(source):  # what is in it would decide how it is read, pyarrow's JSON reader among the ways
            raise RecordFileError(f"{source}: no .jsonl, .parquet or .json file; name one")
        else:
            rows = load_dataset(source, subset, split=split)
    except (RecordFileError, RecordError):
        raise
    except Exception as error:  # whatever the hub, the network or a parser comes up with
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{source}: neither a .jsonl, .parquet or .json file nor a data set that loads ({reason}); check the name, "
            "split and subset"
        ) from error
    if len(rows) == 0:
        raise RecordError(f"{source}: there are no rows in it")
    return rows


def check_outside(folder: str | os.PathLike, *sections: Mapping[str, Any]) -> None:
    """Raises a ConfigError where the `source` of a section, or of its `problems`, lies where a run writes its files."""
    places = [Path(os.path.realpath(place)) for place in (folder, Path(folder, "test"))]
    for section in (*sections, *(section.get("problems") or {} for section in sections)):
        source = str(section.get("source") or "")
        if os.path.isfile(source) and Path(os.path.realpath(source)).parent in places:
            raise ConfigError(
                f"{source} lies in {folder}, where stages write files of their own over it; move it, or give another output"
            )


def _read_json(source: str) -> list[dict[str, Any]]:
    """Objects of a file that is one list of them. pyarrow's reader, which data sets are loaded by, dies of some damaged files."""
    import fsspec

    if "://" not in source and not os.path.isfile(source):
        raise RecordFileError(f"{source}: no such file; check the path")
    try:
        with fsspec.open(source, "r", encoding="utf-8-sig") as file:
            text = file.read()
        rows = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{source}: not JSON ({error}); one list of objects is expected") from None
    if not isinstance(rows, list):
        raise RecordError(f"{source}: {text[:80]!r} is no list; a file with one object per line ends in .jsonl")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise RecordError(f"{source}, row {index}: {str(row)[:80]!r} is no JSON object")
    return rows


def first_of(row: dict[str, Any], columns: Sequence[str]) -> Any:
    """The first of these columns that the row has a value in."""
    return next((row[column] for column in columns if row.get(column) not in (None, "")), None)


def row_id(row: dict[str, Any], index: int, split: str, columns: Sequence[str] = ("id",)) -> str:
    """The row's own id, or its split and number."""
    found = first_of(row, columns)
    return f"{split}-{index}" if found is None else str(found)
