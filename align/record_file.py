"""Files of records that need not fit into memory: rows are read from disk as they are asked for.

A list of a million pairs takes tens of gigabytes; here a row costs 20 bytes, whatever it holds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from .atomic import write_error
from .errors import RecordFileError
from .progress import DELAY, watched
from .records import Record, arrow_rows, check_file, check_records, read_jsonl

#: What the system says where a copy has no room.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: Rows of a batch of a Parquet file's copy: what is read for one row.
ROWS_PER_BATCH = 64


class Rows(Sequence[Record], ABC):
    """A read-only sequence of rows that `_row` makes anew each time; a slice is a list."""

    @abstractmethod
    def _row(self, index: int) -> Record:
        """Row `index`, which is at least 0."""

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(int(index) % len(self))

    def __iter__(self) -> Iterator[Record]:
        return (self._row(i) for i in range(len(self)))


class JsonLines(Rows):
    """Rows of JSONL files, one file after the other, by where their lines lie."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._which, self._starts, self._sizes = array("i"), array("q"), array("q")
        self._stamps: list[tuple[int, int]] = []  # of the files, as they were indexed

    def __len__(self) -> int:
        return len(self._starts)

    def index(self, path: str | os.PathLike) -> Iterator[None]:
        """Adds a file line by line, without a look at what is in them."""
        self._files.append(Path(path))
        start = 0
        with open(path, "rb") as file:
            self._stamps.append(_stamp(file.fileno()))
            for line in (piece for block in file for piece in block.splitlines(keepends=True)):
                if line[:1] == b"{" or line.decode("utf-8-sig", "replace").strip():
                    self._which.append(len(self._files) - 1)
                    self._starts.append(start)
                    self._sizes.append(len(line))
                    yield
                start += len(line)

    def read(self, path: str | os.PathLike) -> Iterator[Record]:
        """Adds a file while its rows are read; errors as in `align.records.read_records`."""
        for row, _ in zip(read_jsonl(Path(path)), self.index(path), strict=True):
            yield row

    def _row(self, index: int) -> Record:
        path = self._files[self._which[index]]
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                changed = _stamp(descriptor) != self._stamps[self._which[index]]
                line = os.pread(descriptor, self._sizes[index], self._starts[index])
            finally:
                os.close(descriptor)
            if changed:
                raise ValueError
            return json.loads(line.decode("utf-8-sig"))
        except ValueError:
            raise RecordFileError(f"{path}: was changed while it was in use; start again") from None
        except OSError as error:
            raise RecordFileError(f"{path}: cannot be read: {error.strerror or error}") from error


def _stamp(descriptor: int) -> tuple[int, int]:
    """What changes when a file is written to, or is another one under its name."""
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns


class _ArrowRows(Rows):
    """Rows of a Parquet file, from a copy in batches of a few rows: a Parquet file's own groups may hold a million."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            source = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
            names = source.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"column {twice[0]!r} stands twice")
            self._copy = tempfile.TemporaryFile()  # noqa: SIM115 (read from as long as the rows are)
            with pyarrow.ipc.new_file(self._copy, source.schema_arrow) as writer:
                for batch in source.iter_batches(ROWS_PER_BATCH):
                    writer.write_batch(batch)
            self._reader = pyarrow.ipc.open_file(self._copy)
            starts = [0]
            for number in range(self._reader.num_record_batches):
                starts.append(starts[-1] + len(self._reader.get_batch(number)))
        except Exception as error:  # noqa: BLE001 - of a damaged file pyarrow raises nearly everything
            if getattr(error, "errno", None) in _FULL:
                folder = f"{tempfile.gettempdir()} ($TMPDIR names another folder)"
                raise write_error(f"{path}: its copy in {folder}", error) from None
            raise RecordFileError(f"{path}: not a readable Parquet file ({error}); write it again") from None
        self._path, self._starts = path, array("q", starts)
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._starts[-1]

    def _row(self, index: int) -> Record:
        number = bisect_right(self._starts, index) - 1
        if number != self._last[0]:
            self._last = number, self._reader.get_batch(number)
        try:
            return arrow_rows(self._last[1].slice(index - self._starts[number], 1))[0]
        except Exception as error:  # noqa: BLE001 - of types that Python lacks, pyarrow raises nearly everything
            raise RecordFileError(f"{self._path}: not a readable Parquet file ({error}); write it again") from None


class RecordFile(Rows):
    """A file of records as a sequence, checked once as it is opened, read row by row from then on.

    Args:
        path, kind: see `align.records.read_records`, whose list it stands for. A Parquet file is copied to the folder of
            temporary files first, uncompressed.

    Raises:
        RecordFileError, RecordError, MissingColumnError: as `read_records` does.
    """

    def __init__(self, path: str | os.PathLike, kind: str | None = None) -> None:
        self.path, self.kind = Path(path), None
        if check_file(self.path) == ".jsonl":
            self._rows: Rows = JsonLines()
            rows: Iterable[Record] = self._rows.read(self.path)
        else:
            self._rows = rows = _ArrowRows(self.path)
        rows = watched(rows, f"reading {self.path.name}", delay=DELAY)
        if kind is None:
            for _ in rows:
                pass
        else:
            check_records(rows, kind, source=str(path))
            self.kind = kind

    def __len__(self) -> int:
        return len(self._rows)

    def _row(self, index: int) -> Record:
        return self._rows[index]

    @cached_property
    def digest(self) -> str:
        """`digest_of` the rows, computed once."""
        return digest_of(watched(self, f"hashing {self.path.name}", delay=DELAY))


class Sorted(Rows):
    """Rows of another sequence in the order of a key.

    Args:
        rows: the sequence; `keys` may still be filling it.
        keys: of every row, in its order.
        take: last word on a row as it is read, in place.
    """

    def __init__(self, rows: Rows, keys: Iterable[Any], take: Callable[[Record], Any]) -> None:
        known = list(keys)
        self._order = array("q", sorted(range(len(known)), key=known.__getitem__))
        self._rows, self._take = rows, take

    def __len__(self) -> int:
        return len(self._order)

    def _row(self, index: int) -> Record:
        row = self._rows[self._order[index]]
        self._take(row)
        return row


class Derived(Rows):
    """What a function makes of each row of another sequence, one at a time.

    Args:
        rows: the sequence.
        make: row -> row.
        kept: numbers of the rows that are in it; `None` is all.
    """

    def __init__(self, rows: Sequence[Record], make: Callable[[Record], Record], kept: Sequence[int] | None = None):
        self._rows, self._make = rows, make
        self._kept = range(len(rows)) if kept is None else kept

    def __len__(self) -> int:
        return len(self._kept)

    def _row(self, index: int) -> Record:
        return self._make(self._rows[self._kept[index]])


def digest_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of records."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
