"""Running a stage: parts that appear whole, a manifest, resuming, and sharing the work among processes.

A stage's output `out.jsonl` is accompanied by `out.jsonl.manifest.json` (settings, hashes of the inputs, counts).
While the stage runs, finished batches lie in `out.jsonl.parts/`; a run that is started again with the same settings
takes them up. The work of a batch depends on its number alone, so any number of processes gives the same rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from .atomic import atomic_path, writing
from .errors import RecordFileError
from .locks import locked
from .progress import DELAY, progress, watched
from .record_file import JsonLines, RecordFile, Sorted, digest_of
from .records import Record, check_output, write_records


def manifest_path(path: str | os.PathLike) -> Path:
    """Where the manifest of the output `path` lies."""
    return Path(f"{path}.manifest.json")


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder."""
    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def records_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of records, for the manifest of what is made from them."""
    return rows.digest if isinstance(rows, RecordFile) else digest_of(rows)


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """The manifest of the output `path`; `None` where there is none or it is not readable."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def write_manifest(
    path: str | os.PathLike,
    stage: str,
    settings: Mapping[str, Any],
    counts: Mapping[str, Any],
    written: str | os.PathLike | None = None,
) -> None:
    """Marks the output `path` as complete for `settings`; call it last.

    Args:
        written: where the output still lies, if it is yet to be moved to `path`.
    """
    sizes = _sizes(path if written is None else written)
    manifest = {"stage": stage, "settings": _plain(settings), "counts": dict(counts), "bytes": sizes}
    with atomic_path(manifest_path(path)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False), encoding="utf-8")


def write_chosen(
    path: str | os.PathLike, rows: Sequence[Record], stage: str, settings: Mapping[str, Any], counts: Mapping[str, Any]
) -> None:
    """Writes rows that every process has, with their manifest, from one of them; the others wait."""
    from .processes import process_state, together

    process = process_state()
    with together(process), locked(path):
        if process.is_main_process:
            forget(path)
            write_records(path, rows)
            write_manifest(path, stage, settings, counts)


def forget(path: str | os.PathLike) -> None:
    """Removes the manifest of `path`; call it before the output is replaced, or an old manifest could stand beside it."""
    with writing(manifest_path(path)):
        manifest_path(path).unlink(missing_ok=True)


def is_complete(path: str | os.PathLike, stage: str, settings: Mapping[str, Any]) -> bool:
    """Whether `path` holds the finished output of `stage` with exactly these settings (inputs' hashes among them). Parts
    that were left by a process that was killed at its very end are then removed.

    Raises:
        RecordFileError: it was finished, and cut off or changed since.
    """
    path, manifest = Path(path), read_manifest(path)
    if (
        not os.path.exists(path)  # unlike pathlib's, of a name that is too long, too
        or manifest is None
        or manifest.get("stage") != stage
        or manifest.get("settings") != _plain(settings)
        or not isinstance(manifest.get("counts"), dict)
        or not isinstance(manifest.get("bytes"), dict)
    ):
        return False
    sizes = _sizes(path)
    for name, size in manifest["bytes"].items():
        if sizes.get(name) != size:
            file, now = (path / name if path.is_dir() else path), sizes.get(name)
            found = "is missing" if now is None else f"has {now} bytes instead of {size}"
            raise RecordFileError(
                f"{file}: {found}: it was cut off or changed after it was complete; put it back as it was, or remove {path} "
                "to have it made again"
            )
    if os.path.exists(_parts(path)) and os.environ.get("RANK", "0") == "0":
        # Another process may just be making the output anew with other settings; then they are its parts.
        with suppress(RecordFileError), locked(path):
            shutil.rmtree(_parts(path), ignore_errors=True)
    return True


def _sizes(path: str | os.PathLike) -> dict[str, int]:
    """Bytes of an output: of the file, or of a folder's weights (people add to a model's card)."""
    path = Path(path)
    if not path.is_dir():
        return {"": path.stat().st_size}
    return {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*.safetensors"))}


def _parts(path: str | os.PathLike) -> Path:
    return Path(f"{path}.parts")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, so that tuples and paths compare equal to what was stored."""
    return json.loads(json.dumps(settings, default=str))


def parts_of(rows: Sequence[Any], size: int) -> list[range]:
    """The places of rows, in parts of a size, the last of which may be smaller: batches for `run_in_parts`."""
    return [range(len(rows))[start : start + size] for start in range(0, len(rows), size)]


def run_in_parts(
    path: str | os.PathLike,
    batches: Sequence[Any],
    compute: Callable[[int, Any], list[Record]],
    *,
    stage: str,
    settings: Mapping[str, Any],
    order: Callable[[Record], Any],
    finish: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
    count: Callable[[Sequence[Record]], Mapping[str, Any]] | None = None,
    note: Callable[[list[Record]], str] | None = None,
    size: Callable[[Any], int] | None = None,
) -> dict[str, Any]:
    """Computes `compute(number, batch)` for every batch, in several processes where launched so, and writes `path`.

    Args:
        path: output file of records.
        batches: the work, the same list in every process; process r of n takes batches r, r+n, …
        compute: makes one batch's rows; must depend on the batch and its number only.
        stage: name of the stage, for the manifest and the progress bar.
        settings: everything the rows depend on. Parts of a run with other settings are discarded.
        order: sort key of a row, so that the file does not depend on how work was batched or shared.
        finish: last word on all rows: those that are in order -> those that are written, one at a time. A row is read
            from disk each time it is asked for, and one that is changed is not changed for the next who asks.
        count: counts for the manifest, from all rows that were written; read from disk, as above.
        note: what stands beside the progress bar, from the rows of the batch that was last computed.
        size: rows of a batch, for the progress bar, which counts those of this process; by default its length, 1 of what has none.

    Returns:
        The manifest's counts.

    Raises:
        RecordFileError: the output cannot be written.
    """
    from .processes import process_state, together

    size = size or (lambda batch: len(batch) if isinstance(batch, Sized) else 1)
    process = process_state()
    with ExitStack() as held:
        with together(process):
            check_output(path)
            complete = is_complete(path, stage, settings)
            if not complete:
                held.enter_context(locked(path))
                parts = _parts(path)
                if process.is_main_process:
                    with writing(parts):
                        _open_parts(parts, stage, settings, len(batches))
        if not complete:
            mine = range(process.process_index, len(batches), process.num_processes)
            with together(process):
                missing = [number for number in mine if not _seal(parts / f"{number:06d}.jsonl").exists()]
                total, left = (sum(size(batches[number]) for number in numbers) for numbers in (mine, missing))
                share = stage if process.num_processes == 1 else f"{stage}, process 1 of {process.num_processes}"
                with progress(total, share, done=total - left) as bar:
                    for number in missing:
                        part = parts / f"{number:06d}.jsonl"
                        rows = compute(number, batches[number])
                        write_records(part, rows)
                        _write_seal(part)
                        if note is not None:
                            bar.set_postfix_str(note(rows), refresh=False)
                        bar.update(size(batches[number]))
            with together(process):
                if process.is_main_process:
                    merging = [parts / f"{number:06d}.jsonl" for number in range(len(batches))]
                    rows = _merge(path, merging, order, finish, stage)
                    write_manifest(path, stage, settings, {"rows": len(rows), **(count(rows) if count else {})})
                    shutil.rmtree(parts)
    manifest = read_manifest(path)
    if manifest is None:
        raise RecordFileError(f"{path}: its manifest vanished while the stage ran; run it again")
    return manifest["counts"]


def _merge(
    path: str | os.PathLike,
    parts: Sequence[Path],
    order: Callable[[Record], Any],
    finish: Callable[[Sequence[Record]], Iterable[Record]] | None,
    stage: str,
) -> Sequence[Record]:
    """Writes `path` from the rows of its parts, and gives its rows; never more than one of them is in memory."""
    lines = JsonLines()
    rows: Sequence[Record] = Sorted(lines, (order(row) for part in parts for row in lines.read(part)), take=order)
    last_words = watched(rows if finish is None else finish(rows), f"{stage}: writing", len(rows), delay=DELAY)
    if Path(path).suffix == ".parquet":  # its types depend on all rows, which are gone through twice
        merged = parts[0].with_name("merged.jsonl") if parts else Path(f"{path}.parts", "merged.jsonl")
        write_records(merged, last_words)
        written = _written(merged)
        forget(path)
        write_records(path, written)
        return written
    forget(path)
    write_records(path, last_words)
    return _written(path)


def _written(path: str | os.PathLike) -> Sequence[Record]:
    """Rows of a JSONL file that was just written."""
    rows = JsonLines()
    for _ in rows.index(path):
        pass
    return rows


def _open_parts(parts: Path, stage: str, settings: Mapping[str, Any], batches: int) -> None:
    """Keeps the whole parts of an earlier run with the same settings; discards any others, and says which were damaged."""
    wanted = {"stage": stage, "settings": _plain(settings), "batches": batches}
    header = parts / "settings.json"
    try:
        known = json.loads(header.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = None
    if known != wanted:
        if parts.exists():
            say_discarded(parts, known, wanted)
            shutil.rmtree(parts)
        with atomic_path(header) as temporary:
            temporary.write_text(json.dumps(wanted), encoding="utf-8")
    for file in parts.glob(".*.tmp"):  # of a run that was killed while it wrote
        file.unlink()
    for number in range(batches):
        part = parts / f"{number:06d}.jsonl"
        if damage := _damage(part):
            print(f"align: {part} {damage}; it is computed again", file=sys.stderr)
        if damage is not None:
            _seal(part).unlink(missing_ok=True)


def say_discarded(path: Path, known: Any, wanted: Mapping[str, Any]) -> None:
    """Says on stderr that unfinished work is removed, and which of its settings are not those that are wanted now."""
    old, new = _flat(known), _flat(_plain(wanted))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name, ...) != new.get(name, ...))
    what = "of other settings" if isinstance(known, dict) else "of unknown settings"
    what += f" ({', '.join(changed[:8])})" if isinstance(known, dict) and changed else ""
    print(f"align: {path} is unfinished work {what}; it is removed", file=sys.stderr)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values of nested settings by their dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}".lstrip(".")).items()}


def _seal(part: Path) -> Path:
    """Written behind a part: its size and hash."""
    return part.with_suffix(".seal.json")


def _write_seal(part: Path) -> None:
    with atomic_path(_seal(part)) as temporary:
        temporary.write_text(json.dumps({"bytes": part.stat().st_size, "sha256": file_hash(part)}), encoding="utf-8")


def _damage(part: Path) -> str | None:
    """What is wrong with a part, empty for one that is not there; `None` for a whole one."""
    try:
        seal = json.loads(_seal(part).read_text(encoding="utf-8"))
        size, known = seal["bytes"], seal["sha256"]
    except FileNotFoundError:
        return "has no record of its size" if part.exists() else ""
    except (OSError, ValueError, KeyError, TypeError):
        return "has a record of its size that is not readable"
    if not part.is_file():
        return "is missing"
    if part.stat().st_size != size:
        return f"has {part.stat().st_size} bytes instead of {size}"
    return None if file_hash(part) == known else "does not hold what was written"
