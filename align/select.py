"""Which traces to train on: scores of a trace under the student, and the stage that ranks and keeps.

- `mean-logp`: mean log-probability; higher is better.
- `rsr`, rank-surprisal ratio ("Which Reasoning Trajectories Teach Students to Reason Better?"): mean rank of the tokens over
  their mean negative log-likelihood; lower is better.
- `aslec-drop`, `aslec-casl` ("On the Step Length Confounding in LLM Reasoning Data Selection"): mean log-probability without
  what the first token of every step does to it. It is improbable, and long steps dilute it, so the plain mean prefers
  long steps. `drop` leaves these tokens out; `casl` takes out what a regression over all traces says their share explains.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .checks import check_share, check_whole
from .errors import ConfigError, MissingColumnError, RecordError
from .locks import locked
from .logps import Batch, completion_logits, per_token
from .positions import check_positions, position_limit
from .records import Record, read_records, row_name
from .stages import parts_of, records_hash, run_in_parts, write_chosen
from .tokens import check_row_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Rule -> column of its score, and whether a lower score is better.
RULES = {
    "rsr": ("rank_surprisal_ratio", True),
    "aslec-drop": ("mean_logp_without_first", False),
    "aslec-casl": ("mean_logp_debiased", False),
    "mean-logp": ("mean_logp", False),
}

PART = 256


@dataclass(frozen=True)
class SelectConfig:
    """How traces are chosen.

    Args:
        rule: a key of `RULES`.
        keep_share: share of all traces that is kept.
        keep_per_problem: traces that are kept of each problem; one of the two is given.
        step_separator: text that ends a step.
        only_correct: leaves wrong traces out first.
        only_ended: leaves traces out that were cut, where `finish_reason` says so.
        max_student_share: leaves traces out of which more is the student's own, where `student_share` says so.
    """

    rule: str = "rsr"
    keep_share: float | None = None
    keep_per_problem: int | None = None
    step_separator: str = "\n"
    only_correct: bool = True
    only_ended: bool = True
    max_student_share: float = 0.5

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"rule {self.rule!r} is unknown; there are {', '.join(RULES)}")
        if (self.keep_share is None) == (self.keep_per_problem is None):
            raise ConfigError("give one of keep_share and keep_per_problem")
        if self.keep_share is not None and not 0 < self.keep_share <= 1:
            raise ConfigError(f"keep_share = {self.keep_share} must lie in (0, 1]")
        if self.keep_per_problem is not None:
            check_whole("keep_per_problem", self.keep_per_problem, 1)
        check_share("max_student_share", self.max_student_share)
        if not isinstance(self.step_separator, str) or not self.step_separator:
            what = "empty" if self.step_separator == "" else f"{self.step_separator!r}, no text"
            raise ConfigError(f"step_separator is {what}; give the text that ends a step")


def rank_surprisal_ratio(logps: Sequence[float], ranks: Sequence[int]) -> float:
    """Mean rank over mean surprisal.

    Args:
        logps: log-probability of every token, nats.
        ranks: its rank under the student, 1 being the likeliest.
    """
    surprisal = -fmean(logps)
    return fmean(ranks) / surprisal if surprisal > 0 else float("inf")


def mean_without_first(logps: Sequence[float], first: Sequence[bool]) -> float:
    """ASLEC-DROP: mean log-probability of the tokens that do not begin a step; of all, where each begins one."""
    kept = [logp for logp, begins in zip(logps, first, strict=True) if not begins]
    return fmean(kept or logps)


def debiased_means(means: Sequence[float], shares: Sequence[float]) -> list[float]:
    """ASLEC-CASL: mean log-probabilities less what a least-squares line through all traces says of their share of first tokens.

    Args:
        means: mean log-probability of every trace.
        shares: of its tokens, those that begin a step.

    Returns:
        m − b · (share − mean share), b the slope of m on the share; m itself where all shares are the same.
    """
    centre, level = fmean(shares), fmean(means)
    spread = sum((share - centre) ** 2 for share in shares)
    if spread <= 1e-12 * max(1.0, centre**2):
        return list(means)
    slope = sum((s - centre) * (m - level) for s, m in zip(shares, means, strict=True)) / spread
    return [m - slope * (s - centre) for m, s in zip(means, shares, strict=True)]


def first_of_steps(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], separator: str) -> list[bool]:
    """Per token, whether a step begins with it: the first of all, and each behind a separator."""
    from .token_texts import token_texts

    texts = token_texts(tokenizer, ids)
    starts, place = [], 0
    for text in texts:
        starts.append(place)
        place += len(text)
    whole, first, at = "".join(texts), [False] * len(ids), 0
    boundaries = {0}
    while (found := whole.find(separator, at)) >= 0:
        at = found + len(separator)
        boundaries.add(at)
    for boundary in boundaries:
        # Of several tokens that begin there, all but the last are empty: parts of a character.
        index = next((i for i, start in enumerate(starts) if start >= boundary and texts[i]), None)
        if index is not None:
            first[index] = True
    return first


def token_ranks(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(N, 2): log-probability of each completion token, and how many tokens are at least as likely, itself included."""
    import torch

    pairs = []
    for start in range(0, len(batch.positions), 256):
        part = slice(start, start + 256)
        rows = logits[batch.positions[part]].float()
        own = rows.gather(1, batch.token_ids[part, None])
        ranks = 1 + (rows > own).sum(1)
        pairs.append(torch.stack([own[:, 0] - rows.logsumexp(1), ranks.float()], 1))
    return torch.cat(pairs)


def good_traces(
    rows: Sequence[Record], max_student_share: float, only_correct: bool = True, only_ended: bool = True
) -> tuple[list[Record], dict[str, int]]:
    """Traces that are right, have ended, and are not mostly the student's; samples count as wholly the teacher's.

    Returns:
        The rows, and of the others how many are `wrong`, `unended`, `mostly_student`; the first reason counts.
    """
    good, counts = [], dict.fromkeys(("wrong", "unended", "mostly_student"), 0)
    for row in rows:
        if only_correct and not row["correct"]:
            counts["wrong"] += 1
        elif only_ended and row.get("finish_reason") not in (None, "stop"):
            counts["unended"] += 1
        elif (row.get("student_share") or 0.0) > max_student_share:
            counts["mostly_student"] += 1
        else:
            good.append(row)
    return good, counts


def select_traces(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Record],
    out_path: str | os.PathLike,
    config: SelectConfig,
    *,
    scores_path: str | os.PathLike | None = None,
    max_tokens_per_batch: int = 8192,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The stage `align select`: scores traces under the student, ranks them, writes the kept ones as demonstrations.

    Args:
        student: who shall learn from them; where it has an adapter, that is on.
        traces: records with `id`, `prompt_ids`, `completion_ids`, and `correct` where `only_correct`.
        out_path: the kept, best first within a problem's order; each has all of `RULES`' columns.
        scores_path: all traces with their scores; beside `out_path` by default (`….scores.jsonl`).
        settings: what else the numbers depend on (hash of the student), for resuming.

    Returns:
        Counts: `rows` kept, `traces`, `wrong`, `unended`, `mostly_student` and `empty` (left out), `problems` that are left.

    Raises:
        RecordError, MissingColumnError: a row that is no trace; or nothing is left.
    """
    from .models import vocab_size

    for index, row in enumerate(traces):
        _check_trace(row, f"traces, {row_name(row, index)}", config.only_correct)
    there = [row for row in traces if row.get("completion_ids")]
    for index, row in enumerate(there):
        check_row_ids(row, index, ("prompt_ids", "completion_ids"), vocab_size(student))
    right, refused = good_traces(there, config.max_student_share, config.only_correct, config.only_ended)
    limit = position_limit(student)
    for index, row in enumerate(right):
        tokens = len(row["prompt_ids"]) + len(row["completion_ids"])
        name = f"traces that can be kept, {row_name(row, index)}: prompt and completion"
        check_positions(tokens, limit, name, "remove the row")
    if not right:
        raise RecordError(f"none of {len(traces)} traces can be kept: {len(there)} have tokens; refused: {refused}")
    scores_path = f"{out_path}.scores.jsonl" if scores_path is None else scores_path

    def compute(_number: int, part: range) -> list[Record]:
        traces = right[part.start : part.stop]
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in traces]
        numbers = per_token(
            student, rows, lambda batch: token_ranks(completion_logits(student, batch, _adapter(student)), batch),
            pad_token_id=tokenizer.pad_token_id, max_tokens_per_batch=max_tokens_per_batch,
        )  # fmt: skip
        return [
            {**row, "_row": index, **_scores(tokenizer, row["completion_ids"], found, config.step_separator)}
            for index, row, found in zip(part, traces, numbers, strict=True)
        ]

    def finish(rows: Sequence[Record]) -> Iterator[Record]:
        numbers = [(row["mean_logp"], row["first_token_share"]) for row in rows]
        debiased = debiased_means(*zip(*numbers, strict=True))
        return (row | {"mean_logp_debiased": value} for row, value in zip(rows, debiased, strict=True))

    # The same whatever is kept: a score is computed once for all rules.
    scoring = {"step_separator": config.step_separator, "traces": records_hash(right), **(settings or {})}
    with locked(out_path):
        run_in_parts(
            scores_path, parts_of(right, PART), compute, stage="select", settings=scoring,
            order=lambda row: row.pop("_row"), finish=finish,
        )  # fmt: skip
        kept = keep(read_records(scores_path), config)
        counts = {
            "rows": len(kept), "traces": len(traces), "empty": len(traces) - len(there), **refused,
            "problems": len({row["id"] for row in kept}),
        }  # fmt: skip
        write_chosen(out_path, kept, "select", select_settings(traces, config, settings), counts)
    return counts


def _check_trace(row: Record, name: str, only_correct: bool) -> None:
    if only_correct and row.get("correct") is None:
        raise MissingColumnError(f"{name}: no column correct; verify them first, or set only_correct to False")
    if not isinstance(row.get("id"), str):
        raise RecordError(f"{name}: id {row.get('id')!r} must be text, the problem's id")
    if not isinstance(row.get("correct", True), (bool, type(None))):
        raise RecordError(f"{name}: correct {row['correct']!r} must be true or false")
    share = row.get("student_share")
    if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1):
        raise RecordError(f"{name}: student_share {share!r} must be a number in [0, 1], or left out")


def select_settings(traces: Sequence[Record], config: SelectConfig, settings: dict[str, Any] | None) -> dict[str, Any]:
    """What the output of `select_traces` depends on."""
    return {**asdict(config), **(settings or {}), "all_traces": records_hash(traces)}


def _adapter(model: PreTrainedModel) -> str | None:
    return getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None


def _scores(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], found: Sequence[Sequence[float]], separator: str
) -> Record:
    logps, ranks = [row[0] for row in found], [int(row[1]) for row in found]
    first = first_of_steps(tokenizer, ids, separator)
    return {
        "rank_surprisal_ratio": rank_surprisal_ratio(logps, ranks), "mean_logp": fmean(logps),
        "mean_logp_without_first": mean_without_first(logps, first), "first_token_share": fmean(map(float, first)),
    }  # fmt: skip


def keep(rows: Sequence[Record], config: SelectConfig) -> list[Record]:
    """The best of scored traces, in their order; of equal scores the first counts as better."""
    column, lower = RULES[config.rule]
    sign = 1 if lower else -1
    ranked = sorted(range(len(rows)), key=lambda i: (sign * rows[i][column], i))
    if config.keep_share is not None:
        chosen = ranked[: max(1, round(config.keep_share * len(rows)))]
    else:
        of_problem: dict[str, list[int]] = defaultdict(list)
        for i in ranked:
            if len(of_problem[rows[i]["id"]]) < config.keep_per_problem:
                of_problem[rows[i]["id"]].append(i)
        chosen = [i for those in of_problem.values() for i in those]
    return [rows[i] for i in sorted(chosen)]
