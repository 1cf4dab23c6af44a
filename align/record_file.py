"""Files of rows that need not fit into memory: rows are read from disk as they are asked for.

A list of a million pairs takes tens of gigabytes; here a row costs 20 bytes, whatever it holds.

CSV and JSON are read here and not by `datasets`' readers: pandas turns the answer 007 into 7 and 1.50 into 1.5, and
pyarrow's JSON reader aborts the process on some damaged files.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, overload

from .atomic import write_error
from .errors import RecordError, RecordFileError
from .progress import DELAY, watched
from .records import Record, arrow_rows, check_file, check_records, file_format, parse_json, read_jsonl

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

    def read(self, path: str | os.PathLike, name: str | os.PathLike | None = None) -> Iterator[Record]:
        """Adds a file while its rows are read; errors as in `align.records.read_records`, which call the file `name`."""
        for row, _ in zip(read_jsonl(Path(path), name), self.index(path), strict=True):
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


class _CopiedRows(JsonLines):
    """Rows of a file that no place in it leads to, a CSV file say, from a copy as JSON lines.

    Args:
        rows: of the file.
        name: how messages call the file.
    """

    def __init__(self, rows: Iterable[Record], name: str | os.PathLike) -> None:
        super().__init__()
        with _copying(name):
            self._copy = tempfile.NamedTemporaryFile()  # noqa: SIM115 (read from as long as the rows are)
            for row in rows:
                self._copy.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._copy.flush()
        for _ in self.index(self._copy.name):
            pass


@contextmanager
def _copying(name: str | os.PathLike) -> Iterator[None]:
    """Makes a RecordFileError of a full disk while the file `name` is copied to the folder of temporary files."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        folder = f"{tempfile.gettempdir()} ($TMPDIR names another folder)"
        raise write_error(f"{name}: its copy in {folder}", error) from None


def _unpacked(source: str | os.PathLike, codec: str | None) -> IO[bytes]:
    """A temporary file with what is in a compressed or remote one.

    Raises:
        RecordFileError: the file is damaged or cannot be read, or the codec's package is not installed.
    """
    import fsspec
    from fsspec.compression import compr

    if codec not in compr:
        package = {"zstd": "zstandard"}.get(codec, codec)
        raise RecordFileError(f"{source}: {codec} files need the package {package}; install it, or unpack the file")
    with _copying(source):
        copy = tempfile.NamedTemporaryFile()  # noqa: SIM115 (the caller reads from it)
        try:
            with fsspec.open(str(source), "rb", compression=codec) as file:
                shutil.copyfileobj(file, copy, 1 << 20)
        except Exception as error:  # noqa: BLE001 - each codec has errors of its own
            if codec is None or isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
                raise
            raise RecordFileError(f"{source}: cannot be unpacked ({error}); it is damaged, so fetch it again") from None
        copy.flush()
    return copy


def _read_table(path: Path, name: str | os.PathLike, delimiter: str) -> Iterator[Record]:
    """Rows of a CSV file with a header: every cell is text as it is written, an empty one `None`."""
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                columns = _columns(next((line for line in lines if line), []), name)
                for cells in lines:
                    if cells and len(cells) != len(columns):
                        raise RecordError(
                            f"{name}, line {lines.line_num}: {len(cells)} cells under {len(columns)} columns "
                            f"({', '.join(columns)[:80]}): {cells!r:.80}; put a cell with {delimiter!r} or quotes in it in quotes"
                        )
                    if cells:
                        yield {column: cell or None for column, cell in zip(columns, cells, strict=True)}
            except csv.Error as error:
                raise RecordError(
                    f"{name}, line {lines.line_num}: cannot be read ({error}); put cells with quotes in them in quotes, and write "
                    "each quote inside twice"
                ) from None
    except UnicodeDecodeError as error:
        raise RecordFileError(f"{name}: not UTF-8 text ({error}); save it as UTF-8") from None


def _columns(cells: Sequence[str], name: str | os.PathLike) -> list[str]:
    """Names of a CSV file's columns; a nameless one, such as pandas' index, is called as pandas calls it."""
    columns = [cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(cells)]
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise RecordError(f"{name}, line 1: column {twice[0]!r} stands twice; rename one")
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t,"):
        raise RecordError(
            f"{name}, line 1: {columns[0]!r} is one column; separate columns by a comma in .csv files, by a tab in .tsv files"
        )
    return columns


def _read_json(path: Path, name: str | os.PathLike) -> Iterator[Record]:
    """Rows of a `.json` file: a list of objects, or one object per line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            begin = file.read(1)
            while begin.isspace():
                begin = file.read(1)
            if begin != "[":
                yield from read_jsonl(path, name)
                return
            rows = parse_json(begin + file.read())
    except UnicodeDecodeError as error:
        raise RecordFileError(f"{name}: not UTF-8 text ({error}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(
            f"{name}: not JSON ({error}); a list of objects is expected, or one object per line"
        ) from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise RecordError(f"{name}, row {index}: {str(row)[:80]!r} is not a JSON object; each row must be one")
        yield row


class _ArrowRows(Rows):
    """Rows of a Parquet file, from a copy in batches of a few rows: a Parquet file's own groups may hold a million."""

    def __init__(self, path: Path, name: str | os.PathLike) -> None:
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
                raise write_error(f"{name}: its copy in {folder}", error) from None
            raise RecordFileError(f"{name}: not a readable Parquet file ({error}); write it again") from None
        self._path, self._starts = name, array("q", starts)
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


def _rows_of(path: Path, name: str | os.PathLike, ending: str) -> tuple[Rows, Iterable[Record]]:
    """Rows of an uncompressed file to be asked for later, and the same rows to be gone through first."""
    if ending in (".jsonl", ".ndjson"):
        lines = JsonLines()
        return lines, lines.read(path, name)
    if ending == ".parquet":
        rows: Rows = _ArrowRows(path, name)
    elif ending == ".json":
        rows = _CopiedRows(_read_json(path, name), name)
    else:
        rows = _CopiedRows(_read_table(path, name, "," if ending == ".csv" else "\t"), name)
    return rows, rows


class RecordFile(Rows):
    """A file of rows as a sequence, checked once as it is opened, read row by row from then on.

    Args:
        path, kind: see `align.records.read_records`, whose list it stands for. Unless it is a plain JSONL file, it is copied
            to the folder of temporary files first, uncompressed.

    Raises:
        RecordFileError, RecordError, MissingColumnError: as `read_records` does.
    """

    def __init__(self, path: str | os.PathLike, kind: str | None = None) -> None:
        self.path, self.kind = Path(path), None
        check_file(self.path)
        self._open(self.path, file_format(path), kind)

    @classmethod
    def remote(cls, address: str) -> RecordFile:
        """A file that fsspec finds at an address, such as `hf://datasets/owner/name/file.jsonl`."""
        found = cls.__new__(cls)
        found.path, found.kind = Path(address), None
        found._open(address, file_format(address), None)
        return found

    def _open(self, source: str | os.PathLike, form: tuple[str, str | None], kind: str | None) -> None:
        ending, codec = form
        place = self.path
        try:
            if codec is not None or "://" in str(source):
                self._whole = _unpacked(source, codec)  # lies there as long as the rows are read
                place = Path(self._whole.name)
            self._rows, rows = _rows_of(place, source, ending)
            rows = watched(rows, f"reading {self.path.name}", delay=DELAY)
            if kind is None:
                for _ in rows:
                    pass
            else:
                check_records(rows, kind, source=str(source))
                self.kind = kind
                if not len(self._rows):
                    raise RecordError(f"{source}: there are no rows in it; name a file of {kind} records that has some")
        except OSError as error:
            if isinstance(error, RecordFileError):
                raise
            raise RecordFileError(f"{source}: cannot be read: {error.strerror or error}") from error

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
