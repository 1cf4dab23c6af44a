"""One writer per output: a lock that the system gives back when its process dies, and removal of what dead writers left."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .atomic import write_error
from .errors import RecordFileError


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Holds the output `path`, a file or a folder, while the block works; temporary files of killed writers are removed first.

    The lock is the system's, on `.NAME.lock` beside the output: a killed process leaves the file behind, but not the lock.
    Of several processes of one launch the first holds it for all. The same process may take it again.

    Raises:
        RecordFileError: another process holds it, or nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    from filelock import FileLock, Timeout

    path = Path(os.path.abspath(path))
    file = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, is_singleton=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise RecordFileError(
            f"{path}: {_holder(file)} is writing it; wait until that has ended and run this again, or give another output"
        ) from None
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with suppress(OSError):  # a full disk: the name is for the message above alone
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        remove_temporaries(path)
        yield
    finally:
        lock.release()


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


def remove_temporaries(path: Path) -> None:
    """Removes what killed writers of `path` and of its manifest left; only who holds the lock may do so."""
    ours = re.compile(rf"\.{re.escape(path.name)}(\.manifest\.json)?\.\d+\.tmp")
    for entry in list(path.parent.iterdir()):
        if ours.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
            with suppress(OSError):
                entry.unlink()
