"""What a run's folder says of the run: stages, trainings, files of records, the evaluation, and what is damaged or missing.

Only read, and never trusted: whatever a file holds, it is used as far as it makes sense and named in `Run.problems` otherwise.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from .errors import RecordFileError
from .evaluate import interval
from .row_sample import lines

MANIFEST, PARTS, TRAINING, SETTINGS = ".manifest.json", ".parts", ".training", ".training.settings"

#: What a count of dropped rows is called in manifests, and what it means.
DROPS = {
    "prompt_too_long": "prompts longer than max_prompt_length",
    "prompt_too_long_for_us": "prompts longer than max_prompt_length, with the student's tokenizer",
    "too_long": "pairs longer than max_length",
    "prompt_fills_max_length": "prompts that fill max_length and leave no room for a completion",
    "equal": "chosen and rejected are equal",
    "equal_after_truncation": "chosen and rejected are equal after truncation to max_length",
    "empty": "nothing in the completion",
    "completions_empty": "completions without a token",
    "completions_no_answer": "completions without an answer",
    "completions_truncated": "completions cut off at max_new_tokens",
    "problems_without_correct": "problems without a right completion",
    "problems_without_wrong": "problems without a wrong completion",
    "wrong": "wrong traces",
    "unended": "completions without an end",
    "mostly_student": "traces that are mostly the student's own",
    "left_out": "problems of which not even a beginning is left",
    "unknown_to_student": "samples with tokens that the student does not have",
}


@dataclass
class Stage:
    """A stage of the run.

    `outputs` are paths within the run's folder; `finished` is the manifest's file time in seconds since 1970, `None` for a stage
    that is not finished, of which `state` says how far it is.
    """

    name: str
    outputs: list[str]
    finished: float | None
    state: str = "finished"
    counts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Training:
    """What a Trainer logged: `series` has points (step, value) by name; `not_finite` how many values were left out."""

    name: str
    state: str
    steps: int
    max_steps: int | None
    series: dict[str, list[tuple[int, float]]]
    not_finite: dict[str, int]
    totals: dict[str, float]
    #: What its preflight found, in one line.
    preflight: str = ""


@dataclass
class Run:
    """A run's folder, read."""

    folder: Path
    stages: list[Stage] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    #: Per method, `name`, `title`, `n`, and `metrics`: value, low and high by name.
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    #: All of its files, but for what unfinished stages have in folders of theirs.
    files: list[str] = field(default_factory=list)
    #: Files of records, in the order of their stages.
    records: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run(folder: str | os.PathLike) -> Run:
    """Reads what a run's folder says, but for the rows of its records.

    Args:
        folder: what a recipe was given as `--output`, or any folder with outputs of stages.

    Raises:
        RecordFileError: it is no folder, or there is no trace of a stage in it.
    """
    run = Run(Path(folder))
    if not os.path.isdir(run.folder):
        raise RecordFileError(f"{folder}: no such folder; give the --output of a recipe")
    files, unfinished = _walk(run)
    run.files = files
    manifests = [name for name in files if name.endswith(MANIFEST) and not name.endswith(SETTINGS + MANIFEST)]
    run.stages = _finished(run, manifests) + [_unfinished(run, name) for name in unfinished]
    for name in files:
        if Path(name).name == "trainer_state.json":
            _add_training(run, Path(name).parent.as_posix(), [name], "finished")
    for name in unfinished:
        if name.endswith(TRAINING):
            _add_training(run, name.removesuffix(TRAINING), _checkpoints(run.folder, name), "not finished")
    known = {output: at for at, stage in enumerate(run.stages) for output in stage.outputs}
    run.trainings.sort(key=lambda training: known.get(training.name, len(known)))
    rows = [name for name in files if Path(name).suffix in (".jsonl", ".parquet")]
    run.records = sorted(rows, key=lambda name: (known.get(name, len(known)), name))
    summary = "summary.json" in files
    if not (run.stages or run.trainings or summary):
        raise RecordFileError(
            f"{folder}: neither a manifest nor a training nor a summary is in it; give the --output of a recipe"
        )
    run.problems += [
        f"{name}: has no manifest: written by hand, or its stage was interrupted"
        for name in run.records
        if name not in known
    ]
    _read_versions(run, [name for name in files if Path(name).name == "README.md"])
    _read_evaluation(run, summary, known)
    return run


def _walk(run: Run) -> tuple[list[str], list[str]]:
    """Files of the run, and folders of unfinished stages, as paths within it; what lies in the latter is not listed."""
    files, unfinished = [], []

    def unreadable(error: OSError) -> None:
        run.problems.append(f"{error.filename}: cannot be read: {error.strerror}")

    for place, folders, names in os.walk(run.folder, onerror=unreadable):
        within = Path(place).relative_to(run.folder)
        unfinished += [(within / name).as_posix() for name in folders if name.endswith((PARTS, TRAINING))]
        skipped = (PARTS, TRAINING)
        folders[:] = sorted(n for n in folders if not n.startswith((".", "checkpoint-")) and not n.endswith(skipped))
        folders[:] = [name for name in folders if name != "contexts"]  # what BASH and RAC made on the way: many rows
        files += [(within / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(files), sorted(unfinished)


def _json(run: Run, name: str) -> dict[str, Any] | None:
    """A file that holds one JSON object; `None`, and a problem, where it does not."""
    try:
        value = json.loads((run.folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        run.problems.append(f"{name}: cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        run.problems.append(f"{name}: damaged, not JSON ({str(error)[:120]})")
    else:
        if isinstance(value, dict):
            return value
        run.problems.append(f"{name}: damaged, {type(value).__name__} where an object is expected")
    return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number, or `None`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _finished(run: Run, manifests: Sequence[str]) -> list[Stage]:
    """Stages with a manifest, in the order in which they were finished; files of one stage together."""
    stages: list[Stage] = []
    for name in manifests:
        output, manifest = name.removesuffix(MANIFEST), _json(run, name)
        if not (run.folder / output).exists():
            run.problems.append(f"{output}: its manifest is there, and it is not")
        manifest = manifest or {}
        counts, settings = _mapping(manifest.get("counts")), _mapping(manifest.get("settings"))
        if not isinstance(manifest.get("stage"), str) and manifest:
            run.problems.append(f"{name}: damaged, it names no stage")
        stage = str(manifest.get("stage", "unknown: its manifest is damaged"))
        time = (run.folder / name).stat().st_mtime
        # Only `pair` has several outputs; equal selections of two rules are two stages.
        mine = [s for s in stages if stage == s.name == "pair" and (s.counts, s.settings) == (counts, settings)]
        same = mine[0] if mine else None
        if same is None:
            stages.append(Stage(stage, [output], time, counts=counts, settings=settings))
        else:
            same.outputs.append(output)
            same.finished = max(same.finished, time)
    return sorted(stages, key=lambda stage: (stage.finished, stage.outputs))


def _unfinished(run: Run, name: str) -> Stage:
    """A stage that is running, or was interrupted."""
    if name.endswith(TRAINING):
        output, marker = name.removesuffix(TRAINING), f"{name}.settings{MANIFEST}"
        header = _json(run, marker) if (run.folder / marker).exists() else None
        state = "not finished: running, or interrupted"
    else:
        output, marker = name.removesuffix(PARTS), f"{name}/settings.json"
        header = _json(run, marker) if (run.folder / marker).exists() else None
        done, batches = len(list((run.folder / name).glob("*.jsonl"))), _number(_mapping(header).get("batches"))
        of = f" of {int(batches)}" if batches is not None else ""
        state = f"not finished: running, or interrupted, with {done}{of} batches done"
    header = header or {}
    settings = _mapping(header.get("settings"))
    return Stage(str(header.get("stage", "unknown")), [output], None, state, settings=settings)


def _checkpoints(folder: Path, name: str) -> list[str]:
    """States of a training's checkpoints, the newest first."""
    found = [path for path in (folder / name).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return [f"{name}/{path.name}/trainer_state.json" for path in found]


def _add_training(run: Run, name: str, states: Sequence[str], state: str) -> None:
    """Adds the training whose newest whole state is among `states`."""
    for path in states:
        found = _json(run, path)
        if found is None:
            continue
        history = found.get("log_history")
        if not isinstance(history, list):
            run.problems.append(f"{path}: damaged, it has no log_history")
            continue
        series, not_finite, totals = _series(history)
        steps, most = _number(found.get("global_step")), _number(found.get("max_steps"))
        file = f"{name}{'' if state == 'finished' else TRAINING}/preflight.json"
        preflight = (_json(run, file) or {}).get("summary") if (run.folder / file).is_file() else ""
        run.trainings.append(
            Training(
                name, state, int(steps or 0), int(most) if most else None, series, not_finite, totals,
                preflight[:1000] if isinstance(preflight, str) else "",
            )
        )  # fmt: skip
        return
    if state != "finished" and not states:
        run.problems.append(f"{name}: its training has no checkpoint yet, so there is nothing to draw of it")


#: What the Trainer logs once, at the end, or of its own speed.
_TOTALS = re.compile(r"^(eval_)?(total_flos|train_loss|.*runtime|.*_per_second)$")


def _series(history: list) -> tuple[dict[str, list[tuple[int, float]]], dict[str, int], dict[str, float]]:
    series: dict[str, list[tuple[int, float]]] = {}
    not_finite: dict[str, int] = {}
    totals: dict[str, float] = {}
    for entry in history:
        step = _number(_mapping(entry).get("step"))
        if step is None:
            continue
        for name, value in entry.items():
            number = _number(value)
            if name in ("step", "epoch"):
                continue
            if _TOTALS.match(name):
                totals |= {name: number} if number is not None else {}
            elif number is not None:
                series.setdefault(name, []).append((int(step), number))
            elif isinstance(value, float):
                not_finite[name] = not_finite.get(name, 0) + 1
    return series, not_finite, totals


def _read_versions(run: Run, cards: Sequence[str]) -> None:
    """Versions that the model cards of trainings record."""
    for name in cards:
        try:
            text = (run.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            run.problems.append(f"{name}: cannot be read ({error})")
            continue
        part = text.partition("### Framework versions")[2].partition("\n#")[0]
        for package, version in re.findall(r"^- ([\w .-]{1,40}): (\S{1,60})$", part, re.MULTILINE):
            seen = run.versions.get(package, version)
            run.versions[package] = seen if version in seen.split(", ") else f"{seen}, {version}"


def _read_evaluation(run: Run, summary: bool, known: dict[str, int]) -> None:
    """The table of `summary.json`; of a run that has none, what there is among `test/*-verdicts.jsonl`."""
    found = _json(run, "summary.json") if summary else None
    if found is None:
        if not summary:
            run.problems.append("summary.json: not there, so the run has not come to its end")
        for name in run.records:
            match = re.fullmatch(r"test/(.+)-verdicts\.jsonl", name)
            if match and name in known:
                _evaluate(run, name, match[1])
        return
    if any(stage.finished is None for stage in run.stages):
        run.problems.append("summary.json: of an earlier run, since there are stages that are not finished")
    scores, table = _mapping(found.get("scores")), found.get("table")
    titles = [_mapping(row).get("method") for row in table] if isinstance(table, list) else []
    for place, (name, score) in enumerate(scores.items()):
        score = _mapping(score)
        metrics = {key: metric for key, value in score.items() if (metric := _metric(value)) is not None}
        title = titles[place] if len(titles) == len(scores) else name
        counted = {
            key: n for key in ("n", "samples", "pairs", "no_answer") if (n := _number(score.get(key))) is not None
        }
        run.evaluation.append({"name": name, "title": str(title), "metrics": metrics, **counted})
        for key, value in _mapping(score.get("corrections")).items():
            if (share := _number(value)) is not None and key != "n":
                run.facts[f"{name}, corrections: {key.replace('_', ' ')}"] = f"{100 * share:.1f} %"
        if isinstance(score.get("export"), str):
            run.facts[f"{name}, exported"] = score["export"]
    if not scores:
        run.problems.append("summary.json: has no scores")
    for name, value in found.items():
        share, n = _number(_mapping(value).get("share")), _number(_mapping(value).get("n"))
        if share is not None and n is not None:
            run.facts[name] = f"{100 * share:.1f} % of {n:.0f}"
    for name, counts in _mapping(found.get("counts")).items():
        _add_counts(run, name, _mapping(counts))


def _add_counts(run: Run, name: str, counts: dict[str, Any]) -> None:
    """Drops that a summary has and the manifest of a training has not."""
    for stage in run.stages:
        if name.startswith("train ") and name.removeprefix("train ") in stage.outputs:
            stage.counts |= {key: value for key, value in counts.items() if key in DROPS and key not in stage.counts}


def _metric(value: Any) -> dict[str, float] | None:
    found = {key: _number(_mapping(value).get(key)) for key in ("value", "low", "high")}
    return None if None in found.values() else found


def _evaluate(run: Run, name: str, method: str) -> None:
    """pass@1 of a file of verdicts, line by line."""
    problems: dict[str, list[bool]] = {}
    try:
        for _, line in lines(run.folder / name):
            row = json.loads(line)
            problems.setdefault(str(row["id"]), []).append(bool(row["correct"]))
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        run.problems.append(f"{name}: damaged, so it is not in the table ({error})")
        return
    if problems:
        values = [fmean(found) for found in problems.values()]
        low, high = interval(values)
        metrics = {"pass@1": {"value": fmean(values), "low": low, "high": high}}
        run.evaluation.append({"name": method, "title": method, "metrics": metrics, "n": len(values)})
