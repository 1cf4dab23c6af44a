"""A few rows of a file of records, however large it is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .records import Record, arrow_rows


@dataclass
class Sampled:
    """A file of records: rows drawn evenly from it, each with its index, and how many there are."""

    path: str
    rows: list[tuple[int, Record]]
    total: int


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def sample_rows(folder: Path, name: str, most: int, problems: list[str]) -> Sampled:
    """Draws at most so many rows of a file, each row as likely as any other, without holding more of it in memory.

    What is damaged among the rows drawn, and a last line that is cut off, is added to `problems`.
    """
    path = folder / name
    try:
        rows, total, damaged = _sample_parquet(path, most) if path.suffix == ".parquet" else _sample_jsonl(path, most)
    except Exception as error:  # noqa: BLE001 - of a damaged file, or of types that Python lacks, pyarrow raises nearly everything
        problems.append(f"{name}: cannot be read ({str(error)[:200]})")
        return Sampled(name, [], 0)
    if damaged:
        more = f", and {len(damaged) - 1} more of the rows looked at" if len(damaged) > 1 else ""
        problems.append(f"{name}: damaged, {damaged[0]}{more}")
    return Sampled(name, rows, total)


def _sample_jsonl(path: Path, most: int) -> tuple[list[tuple[int, Record]], int, list[str]]:
    draw, kept, total, last = random.Random(0), [], 0, None
    for number, line in lines(path):
        last = (total, number, line)
        place = total if total < most else draw.randrange(total + 1)
        if place < most:
            kept[place : place + 1] = [last]
        total += 1
    rows, damaged = [], []
    checked = kept if last is None or last in kept else [*kept, last]  # the last line is where a file is cut off
    for index, number, line in sorted(checked, key=lambda found: found[0]):
        try:
            row = json.loads(line.decode("utf-8-sig"))  # of bytes, json takes half a surrogate pair for text
        except (ValueError, RecursionError):
            cut = " (the last one, cut off)" if number == last[1] and not line.endswith(b"\n") else ""
            damaged.append(f"line {number}{cut} is not JSON")
            continue
        if not isinstance(row, dict):
            damaged.append(f"line {number} is no JSON object")
        elif index != last[0] or last in kept:
            rows.append((index, row))
    return rows, total, damaged


def _sample_parquet(path: Path, most: int) -> tuple[list[tuple[int, Record]], int, list[str]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        total, first, rows = file.metadata.num_rows, 0, []
        wanted = sorted(random.Random(0).sample(range(total), min(most, total)))
        for batch in file.iter_batches(batch_size=1024):
            here = [index for index in wanted if first <= index < first + len(batch)]
            rows += zip(here, arrow_rows(batch.take([index - first for index in here])), strict=True)
            first += len(batch)
    return rows, total, []
