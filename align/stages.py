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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import RecordFileError
from .records import Record, atomic_path, check_output, read_records, write_records


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
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """The manifest of the output `path`; `None` where there is none or it is not readable."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def write_manifest(path: str | os.PathLike, stage: str, settings: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Marks the output `path` as complete for `settings`; call it last."""
    manifest = {"stage": stage, "settings": _plain(settings), "counts": dict(counts)}
    with atomic_path(manifest_path(path)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False), encoding="utf-8")


def write_chosen(
    path: str | os.PathLike, rows: list[Record], stage: str, settings: Mapping[str, Any], counts: Mapping[str, Any]
) -> None:
    """Writes rows that every process has, with their manifest, from one of them; the others wait."""
    from .processes import process_state

    process = process_state()
    if process.is_main_process:
        forget(path)
        write_records(path, rows)
        write_manifest(path, stage, settings, counts)
    process.wait_for_everyone()


def forget(path: str | os.PathLike) -> None:
    """Removes the manifest of `path`; call it before the output is replaced, or an old manifest could stand beside it."""
    manifest_path(path).unlink(missing_ok=True)


def is_complete(path: str | os.PathLike, stage: str, settings: Mapping[str, Any]) -> bool:
    """Whether `path` holds the finished output of `stage` with exactly these settings (inputs' hashes among them)."""
    manifest = read_manifest(path)
    return (
        Path(path).exists()
        and manifest is not None
        and manifest.get("stage") == stage
        and manifest.get("settings") == _plain(settings)
    )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, so that tuples and paths compare equal to what was stored."""
    return json.loads(json.dumps(settings, default=str))


def run_in_parts(
    path: str | os.PathLike,
    batches: Sequence[Any],
    compute: Callable[[int, Any], list[Record]],
    *,
    stage: str,
    settings: Mapping[str, Any],
    order: Callable[[Record], Any],
    finish: Callable[[list[Record]], None] | None = None,
    count: Callable[[list[Record]], Mapping[str, Any]] | None = None,
    note: Callable[[list[Record]], str] | None = None,
) -> dict[str, Any]:
    """Computes `compute(number, batch)` for every batch, in several processes where launched so, and writes `path`.

    Args:
        path: output file of records.
        batches: the work, the same list in every process; process r of n takes batches r, r+n, …
        compute: makes one batch's rows; must depend on the batch and its number only.
        stage: name of the stage, for the manifest and the progress bar.
        settings: everything the rows depend on. Parts of a run with other settings are discarded.
        order: sort key of a row, so that the file does not depend on how work was batched or shared.
        finish: last word on all rows, in place, in their order.
        count: counts for the manifest, from all rows.
        note: what stands beside the progress bar, from the rows of the batch that was last computed.

    Returns:
        The manifest's counts.

    Raises:
        RecordFileError: the output cannot be written.
    """
    from tqdm import tqdm

    from .processes import process_state, together

    process = process_state()
    parts = Path(f"{path}.parts")
    with together(process):
        check_output(path)
        if process.is_main_process and not is_complete(path, stage, settings):
            _open_parts(parts, stage, settings, len(batches))
    if not is_complete(path, stage, settings):
        mine = range(process.process_index, len(batches), process.num_processes)
        with together(process):
            for number in (bar := tqdm(mine, desc=stage, unit="batch", disable=not process.is_main_process)):
                part = parts / f"{number:06d}.jsonl"
                if not part.exists():
                    rows = compute(number, batches[number])
                    write_records(part, rows)
                    if note is not None:
                        bar.set_postfix_str(note(rows))
        with together(process):
            if process.is_main_process:
                rows = [row for number in range(len(batches)) for row in read_records(parts / f"{number:06d}.jsonl")]
                rows.sort(key=order)
                if finish is not None:
                    finish(rows)
                forget(path)
                write_records(path, rows)
                write_manifest(path, stage, settings, {"rows": len(rows), **(count(rows) if count else {})})
                shutil.rmtree(parts)
    manifest = read_manifest(path)
    if manifest is None:
        raise RecordFileError(f"{path}: its manifest vanished while the stage ran; run it again")
    return manifest["counts"]


def _open_parts(parts: Path, stage: str, settings: Mapping[str, Any], batches: int) -> None:
    """Keeps the parts of an earlier run with the same settings; discards any others."""
    wanted = {"stage": stage, "settings": _plain(settings), "batches": batches}
    header = parts / "settings.json"
    try:
        known = json.loads(header.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != wanted:
        if parts.exists():
            shutil.rmtree(parts)
        with atomic_path(header) as temporary:
            temporary.write_text(json.dumps(wanted), encoding="utf-8")
