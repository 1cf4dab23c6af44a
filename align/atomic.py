"""Files that appear whole or not at all, and what to say where the system refuses to write them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import AlignError, RecordFileError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`, for a file or a folder, that replaces it when the block ends, and vanishes when
    it fails. What replaced it survives a power cut.

    Raises:
        RecordFileError: the disk is full, say; the message has the remedy.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except AlignError:
        raise
    except UnicodeEncodeError as error:
        raise RecordFileError(f"{path}: cannot be written as UTF-8 ({error}); remove half a surrogate pair") from None
    except Exception as error:
        if not isinstance(error, OSError) and not failed_write(error):
            raise
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Has the system put a file, or all files of a folder, on the disk: a rename may outlive a power cut that their bytes do not."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_dir():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    for folder in [path, *path.rglob("*")] if path.is_dir() else []:
        if folder.is_dir():
            _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some network file systems know no such thing
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


#: What to do where the system refuses a write, by its error number.
_REMEDIES = {
    errno.ENOSPC: "free space there and run it again",
    errno.EDQUOT: "free space there, or have the quota raised, and run it again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write to another file system, and run it again",
    errno.EROFS: "give an output in a folder that can be written to",
    errno.EACCES: "give an output in a folder that you may write to",
    errno.EPERM: "give an output in a folder that you may write to",
    errno.ENOTDIR: "a file stands where a folder is needed: give another output, or move the file",
    errno.EEXIST: "a file stands where a folder is needed: give another output, or move the file",
    errno.ENAMETOOLONG: "give a shorter name",
}

#: How pyarrow and safetensors spell an error number, and what torch says where a file takes no more.
_NUMBER = re.compile(r"(?:os error|[Ee]rrno) (\d+)")
_TORCH = ("PytorchStreamWriter failed", "unexpected pos ")


def failed_write(error: BaseException) -> bool:
    """Whether an error is the system's refusal of a write, be it passed on by a library that hides its number."""
    return _number(error) in _REMEDIES


def _number(error: BaseException) -> int | None:
    """The system's number of an error."""
    text = str(error)
    if (number := getattr(error, "errno", None)) is not None:
        return number
    if found := _NUMBER.search(text):
        return int(found[1])
    # torch.save does not say why; this is why, but for a limit on file sizes.
    return errno.ENOSPC if any(words in text for words in _TORCH) else None


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Makes a RecordFileError that names `path` of a refusal of the system to write, move or remove below it."""
    try:
        yield
    except AlignError:
        raise
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: str | os.PathLike, error: BaseException) -> RecordFileError:
    """A RecordFileError that names `path`, what the system said, and the remedy."""
    number = _number(error)
    reason = os.strerror(number) if number else " ".join(str(error).split())[:200]
    remedy = f"; {_REMEDIES[number]}" if number in _REMEDIES else ""
    return RecordFileError(f"{path}: cannot be written: {reason}{remedy}")
