"""Verdicts -> the two contrastive training sets and the preference pairs, by cDPO's selection (arXiv 2411.19943)."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from .checks import check_apart, check_whole
from .errors import ConfigError, RecordError
from .locks import locked
from .progress import watched
from .records import Record, check_output, check_records, read_records, write_records
from .stages import file_hash, forget, is_complete, read_manifest, write_manifest
from .verify import canonical_answer


@dataclass(frozen=True)
class PairConfig:
    """What to select.

    Args:
        negative_coverage: share of a problem's wrong completions whose answers the negative set covers (paper: 0.5).
        pairs_per_problem: preference pairs per problem; the k-th takes the k-th most frequent wrong answer and another
            correct completion (paper: 1).
        keep_truncated: whether completions cut at the length limit may be selected.
    """

    negative_coverage: float = 0.5
    pairs_per_problem: int = 1
    keep_truncated: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.negative_coverage <= 1:
            raise ConfigError(f"pair: negative_coverage = {self.negative_coverage} must lie in (0, 1]")
        check_whole("pair: pairs_per_problem", self.pairs_per_problem, 1)


@dataclass(frozen=True)
class Selection:
    """`positive` and `negative` are demonstration records, `pairs` pair records; `counts` says what was dropped and why."""

    positive: list[Record]
    negative: list[Record]
    pairs: list[Record]
    counts: dict[str, int]


def select_pairs(verdicts: Sequence[Record], config: PairConfig | None = None) -> Selection:
    """Groups each problem's completions by extracted answer, most frequent first, and selects from the groups.

    Positive set: one correct completion. Negative set: one completion for each of the most frequent wrong answers,
    until they cover `negative_coverage` of the wrong completions. Pairs: correct against most frequent wrong answer.
    Completions without an answer are never used. Of a group, the first draws are taken.

    Counted: completions (`completions`, `completions_no_answer`, `completions_truncated`, `completions_empty`) and problems
    (`problems`, `problems_without_correct`, `problems_without_wrong`, `problems_without_either`).

    Raises:
        MissingColumnError, RecordError: a verdict does not fit the schema, or a problem has two prompts.
    """
    config = config or PairConfig()
    check_records(verdicts, "verdict", source="verdicts")
    counts: Counter[str] = Counter(
        dict.fromkeys(("completions_no_answer", "completions_truncated", "completions_empty"), 0)
        | dict.fromkeys(("problems_without_correct", "problems_without_wrong", "problems_without_either"), 0)
    )
    by_problem: dict[str, list[Record]] = defaultdict(list)
    prompts: dict[str, list[int]] = {}
    for row in watched(verdicts, "pair"):
        counts["completions"] += 1
        if prompts.setdefault(row["id"], row["prompt_ids"]) != row["prompt_ids"]:
            raise RecordError(
                f"verdicts, problem {row['id']!r}: sample {row['sample']} has other prompt_ids than the first one, so that a "
                "pair would join two prompts; pair the samples of each tokenizer and template on their own"
            )
        usable = by_problem[row["id"]]
        if not row["completion_ids"]:
            counts["completions_empty"] += 1
        elif canonical_answer(row["extracted"]) is None:
            counts["completions_no_answer"] += 1
        elif row["finish_reason"] == "length" and not config.keep_truncated:
            counts["completions_truncated"] += 1
        else:
            usable.append(row)
    positive: list[Record] = []
    negative: list[Record] = []
    pairs: list[Record] = []
    for rows in by_problem.values():
        correct = _answer_groups([row for row in rows if row["correct"]])
        wrong = _answer_groups([row for row in rows if not row["correct"]])
        if not correct or not wrong:
            side = "either" if not correct and not wrong else "wrong" if correct else "correct"
            counts[f"problems_without_{side}"] += 1
        positive += [_demonstration(group[0]) for group in correct[:1]]
        negative += [_demonstration(group[0]) for group in _covering(wrong, config.negative_coverage)]
        right = [row for group in correct for row in group]
        pairs += [
            _pair(good, group[0], k)
            for k, (good, group) in enumerate(zip(right, wrong[: config.pairs_per_problem], strict=False))
        ]
    made = {"problems": len(by_problem), "positive": len(positive), "negative": len(negative), "pairs": len(pairs)}
    return Selection(positive, negative, pairs, {**counts, **made})


def _answer_groups(rows: Sequence[Record]) -> list[list[Record]]:
    groups: dict[str | None, list[Record]] = defaultdict(list)
    for row in rows:
        groups[canonical_answer(row["extracted"])].append(row)
    return sorted(groups.values(), key=len, reverse=True)  # stable: of equal sizes, the first drawn comes first


def _covering(groups: Sequence[list[Record]], share: float) -> list[list[Record]]:
    """The first groups that together hold `share` of all rows."""
    needed = share * sum(map(len, groups))
    covered, taken = 0, []
    for group in groups:
        if covered >= needed:
            break
        taken.append(group)
        covered += len(group)
    return taken


def _demonstration(row: Record) -> Record:
    return {key: row[key] for key in ("id", "prompt", "completion", "prompt_ids", "completion_ids", "answer")}


def _pair(good: Record, bad: Record, number: int) -> Record:
    pair = {
        "id": good["id"] if number == 0 else f"{good['id']}#{number}",
        "prompt": good["prompt"],
        "chosen": good["completion"],
        "rejected": bad["completion"],
        "prompt_ids": good["prompt_ids"],
        "chosen_ids": good["completion_ids"],
        "rejected_ids": bad["completion_ids"],
        "answer": good["answer"],
        "rejected_answer": bad["extracted"],
    }
    return pair | ({"solution": good["solution"]} if good.get("solution") else {})


def pair(
    verdicts_path: str | os.PathLike,
    pairs_path: str | os.PathLike,
    positive_path: str | os.PathLike,
    negative_path: str | os.PathLike,
    config: PairConfig | None = None,
) -> dict[str, int]:
    """The stage `align pair`: verdict records -> pairs, positive set, negative set.

    Returns:
        The counts of `select_pairs`.

    Raises:
        RecordError: not one pair could be made; the message says what was dropped.
    """
    check_apart(verdicts_path, pairs_path, positive_path, negative_path)
    config = config or PairConfig()
    settings = {**asdict(config), "verdicts": file_hash(verdicts_path) if os.path.exists(verdicts_path) else None}
    paths = (positive_path, negative_path, pairs_path)
    if all(is_complete(path, "pair", settings) for path in paths):
        return read_manifest(pairs_path)["counts"]
    for path in paths:
        check_output(path)
    selection = select_pairs(read_records(verdicts_path, "verdict"), config)
    if not selection.pairs:
        dropped = ", ".join(f"{reason}: {n}" for reason, n in selection.counts.items() if n)
        raise RecordError(
            f"{verdicts_path}: no problem has both a correct and a wrong completion ({dropped}); "
            "sample more completions per problem, or at another temperature"
        )
    with ExitStack() as locks:
        for path in paths:
            locks.enter_context(locked(path))
        for path in paths:
            forget(path)
        for path, rows in zip(paths, (selection.positive, selection.negative, selection.pairs), strict=True):
            write_records(path, rows)
            write_manifest(path, "pair", settings, selection.counts)
    return selection.counts
