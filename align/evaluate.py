"""Accuracy from verdicts: pass@1, pass@k, maj@k, each with n and a 95 % interval."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from .errors import ConfigError, MissingColumnError, RecordError
from .progress import progress, watched
from .records import Record, check_records, row_name
from .verify import canonical_answer

#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased probability that of k completions drawn without replacement from n, `correct` of them right, at least
    one is right: 1 − C(n−c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ConfigError: k exceeds n.
    """
    if not 1 <= k <= n:
        raise ConfigError(
            f"pass@{k} needs at least {k} completions of every problem, one has {n}; sample more or lower k"
        )
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(verdicts: Sequence[Record], k: int) -> float:
    """Share of correctness of the most frequent answer among the first k draws of one problem; tied answers share.

    Completions without an answer do not vote; where none votes, the problem counts as wrong.

    Raises:
        ConfigError: k exceeds the number of draws.
    """
    if not 1 <= k <= len(verdicts):
        raise ConfigError(
            f"maj@{k} needs {k} completions of every problem, one has {len(verdicts)}; sample more or lower k"
        )
    draws = sorted(verdicts, key=lambda row: row["sample"])[:k]
    votes = Counter(answer for row in draws if (answer := canonical_answer(row["extracted"])) is not None)
    if not votes:
        return 0.0
    top = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == top]
    right = {canonical_answer(row["extracted"]): row["correct"] for row in draws}
    return fmean(float(right[answer]) for answer in winners)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over problems: Wilson's where every value is 0 or 1, or all are the same (which says
    nothing about their spread), else the normal one, within [0, 1].

    Args:
        values: one number per problem.
    """
    n, mean = len(values), fmean(values)
    if all(value in (0.0, 1.0) for value in values) or (n > 1 and stdev(values) == 0):
        centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
    elif n == 1:
        return 0.0, 1.0  # one problem says nothing about the spread between problems
    else:
        centre, half = mean, Z95 * stdev(values) / math.sqrt(n)
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate_verdicts(verdicts: Sequence[Record], ks: Sequence[int] = ()) -> dict[str, Any]:
    """Scores verdict records.

    Args:
        verdicts: all draws of all problems.
        ks: for each k > 1, pass@k and maj@k are added.

    Returns:
        `n` problems, `samples` per problem (the fewest), `no_answer` share, and per metric (`pass@1`, `pass@k`,
        `maj@k`) a dict of `value`, `low`, `high`.

    Raises:
        RecordError, MissingColumnError: there are no verdicts, or one does not fit the schema.
        ConfigError: some problem has fewer than k draws.
    """
    check_records(verdicts, "verdict", source="verdicts")
    problems: dict[str, list[Record]] = defaultdict(list)
    for row in verdicts:
        problems[row["id"]].append(row)
    if not problems:
        raise RecordError("there are no verdicts to evaluate; run sample and verify first")

    if any(k < 1 for k in ks):
        raise ConfigError(f"k = {min(ks)} must be at least 1; pass@k and maj@k are of k completions")
    values: dict[str, list[float]] = defaultdict(list)
    with progress(len(verdicts), "evaluate") as bar:
        for rows in problems.values():
            correct = sum(row["correct"] for row in rows)
            values["pass@1"].append(pass_at_k(len(rows), correct, 1))
            for k in dict.fromkeys(ks):
                if k > 1:
                    values[f"pass@{k}"].append(pass_at_k(len(rows), correct, k))
                    values[f"maj@{k}"].append(majority_at_k(rows, k))
            bar.update(len(rows))
    result: dict[str, Any] = {
        "n": len(problems),
        "samples": min(map(len, problems.values())),
        "no_answer": fmean(float(row["extracted"] is None) for row in verdicts),
    }
    for name, those in values.items():
        low, high = interval(those)
        result[name] = {"value": fmean(those), "low": low, "high": high}
    return result


def preference_accuracy(pairs: Sequence[Record]) -> dict[str, Any]:
    """How often a policy's implicit reward ranks a held-out pair right: Σ_t log(π/π_ref) larger for chosen than for
    rejected. Equal sums count one half.

    Args:
        pairs: scored by `align score guidance`, the policy as guide: `chosen_guidance_logratios`, `rejected_…`.

    Returns:
        `n` pairs, and `preference` with `value`, `low`, `high`.

    Raises:
        MissingColumnError: pairs without log-ratios.
    """
    check_records(pairs, "pair", source="pairs")
    values = []
    for index, row in enumerate(watched(pairs, "evaluate pairs")):
        columns = [f"{side}_guidance_logratios" for side in ("chosen", "rejected")]
        if missing := [column for column in columns if row.get(column) is None]:
            raise MissingColumnError(
                f"pairs, {row_name(row, index)}: no {missing[0]}; run `align score guidance` first"
            )
        chosen, rejected = (sum(row[column]) for column in columns)
        values.append(0.5 if chosen == rejected else float(chosen > rejected))
    if not values:
        raise RecordError("there are no pairs to evaluate")
    low, high = interval(values)
    return {"n": len(values), "preference": {"value": fmean(values), "low": low, "high": high}}


def format_interval(metric: dict[str, float]) -> str:
    """`96.0 [94.0, 97.4]`: per cent, with the interval."""
    return f"{100 * metric['value']:.1f} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
