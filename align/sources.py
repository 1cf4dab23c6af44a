"""Rows of a local file or of a hub data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, RecordError, RecordFileError
from .record_file import RecordFile
from .records import ENDINGS, READABLE, file_format


def load_rows(source: str, *, split: str = "train", subset: str | None = None) -> Sequence[dict[str, Any]]:
    """Rows, in their order.

    Args:
        source: a file with one of `align.records.ENDINGS`, compressed or not, also as `hf://datasets/owner/name/file.jsonl`; or
            the name of a hub data set. Cells of CSV and TSV files are text as it is written; an empty one is `None`.
        split, subset: split and configuration of a hub data set (`main` for `openai/gsm8k`).

    Raises:
        ConfigError: no such data set, split or subset.
        RecordFileError, RecordError: a file cannot be read, or holds nothing.
    """
    from datasets import load_dataset

    readable = file_format(source)[0] in ENDINGS
    if subset is not None and (os.path.exists(source) or "://" in source):
        raise ConfigError(f"{source}: subset = {subset!r} belongs to a hub data set, and this is a file; leave it out")
    try:
        if readable:
            rows: Sequence[Any] = RecordFile.remote(source) if "://" in source else RecordFile(source)
        elif os.path.exists(source):  # what is in it would decide how it is read, pyarrow's JSON reader among the ways
            raise RecordFileError(f"{source}: cannot be read as rows; name a file that ends in {READABLE}")
        else:
            rows = load_dataset(source, subset, split=split)
    except (RecordFileError, RecordError):
        raise
    except Exception as error:  # whatever the hub, the network or a parser comes up with
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{source}: neither a file that ends in {READABLE}, nor a data set that loads ({reason}); check the name, "
            "split and subset"
        ) from error
    if len(rows) == 0:
        raise RecordError(f"{source}: there are no rows in it; give a file or split that has some")
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


def first_of(row: dict[str, Any], columns: Sequence[str]) -> Any:
    """The first of these columns that the row has a value in."""
    return next((row[column] for column in columns if row.get(column) not in (None, "")), None)


def row_id(row: dict[str, Any], index: int, split: str, columns: Sequence[str] = ("id",)) -> str:
    """The row's own id, or its split and number."""
    found = first_of(row, columns)
    return f"{split}-{index}" if found is None else str(found)
