"""Rows of a local file or of a hub data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, RecordError, RecordFileError
from .record_file import RecordFile


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
    try:
        if suffix in (".jsonl", ".parquet") and "://" not in source:
            rows: Sequence[Any] = RecordFile(source)
        elif suffix == ".json":
            if "://" not in source and not Path(source).is_file():
                raise RecordFileError(f"{source}: no such file; check the path")
            rows = load_dataset("json", data_files=source, split="train")
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


def first_of(row: dict[str, Any], columns: Sequence[str]) -> Any:
    """The first of these columns that the row has a value in."""
    return next((row[column] for column in columns if row.get(column) not in (None, "")), None)


def row_id(row: dict[str, Any], index: int, split: str, columns: Sequence[str] = ("id",)) -> str:
    """The row's own id, or its split and number."""
    found = first_of(row, columns)
    return f"{split}-{index}" if found is None else str(found)
