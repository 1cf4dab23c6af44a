"""Rollouts: how often the model still reaches the right answer after each token of a completion, and so which token of a
wrong solution is critical. What cDPO's contrastive scores estimate (arXiv 2411.19943) is here counted.

State t of a completion y is its first t tokens; V_t is the share of n continuations of state t that end in the right
answer, V_T is 1 or 0 as y itself does. In a search of all positions the n continuations of neighbouring states are shared: a
draw that takes y's own token at state t *is* a draw of state t + 1, so only those that fork off are continued, and fresh ones
take their places. Every V_t stays the mean of n independent draws, and V_t − V_{t+1} is free of noise where nothing forks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..continuations import Continuations, Fork, chain_draws
from ..errors import ConfigError, MissingColumnError
from ..evaluate import pass_at_k
from ..logps import Row
from ..records import Record, check_records, row_name
from ..sample import SampleConfig, derived_seed
from ..tokens import decode_completion
from ..verify import verify_completion
from .pairs import SIDES, pair_length, score_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEARCHES = ("all", "bisection")
RULES = ("drop", "critical")


@dataclass(frozen=True)
class RolloutConfig:
    """How to roll out.

    Args:
        n: continuations per position; the paper draws 64.
        search: `all` looks at every position; `bisection` at about log2 T of them, for the one where V falls to
            `threshold`, which it finds where V falls once.
        threshold: share of right continuations below which a state counts as lost; about 0.05 in the paper.
        rule: `drop` weights a rejected token with what it costs, max(0, V_t − V_{t+1}); `critical` gives the critical token
            weight 1. All other weights of rejected tokens are 0. A bisection gives weight to the critical token alone.
        weight_chosen: whether chosen tokens are weighted with what they gain, max(0, V_{t+1} − V_t), instead of 1.
        ks: for each k, pass@k with the critical token and with another in its place, from n fresh continuations of
            each kind. The search's own would not do: it chose the token by their outcomes.
        temperature, top_p, top_k, stop: see `SampleConfig`; the policy's own sampling settings are meant.
        max_new_tokens: longest completion, what is given of it included; no shorter than those that are rolled out.
        seed: with the number of the part, decides every draw.
        batch_size: most continuations generated together.
    """

    n: int = 64
    search: str = "all"
    threshold: float = 0.05
    rule: str = "drop"
    weight_chosen: bool = False
    ks: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 64
    sampling: SampleConfig = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, known in (("search", SEARCHES), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"rollout: {name} = {getattr(self, name)!r} is unknown; use {' or '.join(known)}")
        if self.temperature == 0:
            raise ConfigError(f"rollout: temperature = {self.temperature} draws the same continuation every time")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"rollout: threshold = {self.threshold} must lie in [0, 1)")
        if self.weight_chosen and self.search == "bisection":
            raise ConfigError(
                "rollout: weight_chosen needs search 'all': a bisection looks for one loss, not for gains"
            )
        for k in self.ks:
            if not 1 <= k <= self.n:
                raise ConfigError(f"rollout: pass@{k} needs n of at least {k}, and k of at least 1; n is {self.n}")
        object.__setattr__(self, "ks", tuple(self.ks))
        names = ("n", "temperature", "top_p", "top_k", "max_new_tokens", "stop", "seed", "batch_size")
        object.__setattr__(self, "sampling", SampleConfig(**{name: getattr(self, name) for name in names}))


@dataclass(frozen=True)
class Rollout:
    """What was counted for one completion of T tokens.

    Args:
        correct: per state that was looked at, how many of its n continuations were right. State T is the completion
            itself, and counts n or 0.
        n: continuations per state.
        length: T.
        critical: index of the critical token; `None` where the completion is right or its first state lost already.
        with_critical: right ones of n continuations of state `critical` + 1, drawn after the search and independent of
            it; the search's own count where `ks` is empty.
        without: the same with another token in the critical one's place; `None` where `ks` is empty or there is none.
        cut: how many of all continuations that were drawn reached `max_new_tokens` without an end.
        forward_tokens: what the model was fed for it; a batch's are spread evenly.
        independent_tokens: what the same continuations cost when each is computed from the prompt on.
    """

    correct: dict[int, int]
    n: int
    length: int
    critical: int | None
    with_critical: int | None
    without: int | None
    cut: int
    forward_tokens: float
    independent_tokens: int

    def values(self) -> list[float]:
        """V_0 … V_T; a state that was not looked at has the value of the last one before it that was."""
        found, last = [], 0.0
        for state in range(self.length + 1):
            last = self.correct[state] / self.n if state in self.correct else last
            found.append(last)
        return found


def roll_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    answers: Sequence[str],
    config: RolloutConfig,
    seed: int = 0,
    share: bool | None = None,
) -> list[Rollout]:
    """Counts right continuations along each completion.

    Args:
        model: the policy; where it has an adapter, that is on.
        rows: prompt and completion ids.
        answers: reference answers.
        seed: decides the draws.
        share: see `Continuations`.

    Raises:
        ConfigError: a completion is longer than `max_new_tokens`.
    """
    if not rows:
        return []
    _check_budget([(f"rollout, row {i}: the completion", ids) for i, (_, ids) in enumerate(rows)], config)
    continuations = Continuations(model, tokenizer, rows, config.sampling, seed, share, fresh=bool(config.ks))
    judge = _Judge(continuations, answers)
    search = _search_all if config.search == "all" else _bisect
    found = search(judge, config, random.Random(seed))
    searched = {i: (f.correct[f.critical + 1], None) for i, f in enumerate(found) if f.critical is not None}
    after = _draw_afresh(judge, found) if config.ks else searched
    cost = continuations.forward_tokens / len(rows)
    return [
        Rollout(f.correct, config.n, len(ids), f.critical, *after.get(i, (None, None)), cut, cost, f.independent)
        for i, (f, cut, (_, ids)) in enumerate(zip(found, continuations.cut, rows, strict=True))
    ]


def _check_budget(completions: Iterable[tuple[str, Sequence[int]]], config: RolloutConfig) -> None:
    """Raises ConfigError where a completion (its name, its ids) is longer than continuations may get."""
    longest, over = 0, None
    for name, ids in completions:
        longest = max(longest, len(ids))
        over = over or (f"{name} has {len(ids)} tokens" if len(ids) > config.max_new_tokens else None)
    if over:
        raise ConfigError(
            f"{over}, more than max_new_tokens = {config.max_new_tokens}; its continuations would be cut before they end. "
            f"Set max_new_tokens to {longest} or more, or leave out long rows"
        )


@dataclass
class _Found:
    """What a search leaves of one row: see `Rollout`."""

    correct: dict[int, int]
    critical: int | None = None
    independent: int = 0


class _Judge:
    """Continues forks, and says which completions end in their row's answer; equal ones are asked about once."""

    def __init__(self, continuations: Continuations, answers: Sequence[str]) -> None:
        self.continuations, self.answers = continuations, answers
        self.rows, self.next_tokens = continuations.rows, continuations.next_tokens
        self._known: dict[tuple[int, str], bool] = {}

    def right(self, row: int, ids: Sequence[int]) -> bool:
        text = decode_completion(self.continuations.tokenizer, ids)
        if (row, text) not in self._known:
            self._known[(row, text)] = verify_completion(text, self.answers[row]).correct
        return self._known[(row, text)]

    def outcomes(self, forks: Sequence[Fork]) -> list[tuple[bool, int]]:
        """Whether each fork ends right, and what it costs when computed from the prompt on."""
        ends = self.continuations.complete(forks)
        return [
            (self.right(fork.row, ids), len(self.rows[fork.row][0]) + len(ids) - 1)
            for fork, ids in zip(forks, ends, strict=True)
        ]


def _search_all(judge: _Judge, config: RolloutConfig, rng: random.Random) -> list[_Found]:
    forks, plans = chain_draws(judge.continuations, rng)
    ends = judge.outcomes(forks)
    found = []
    for row, ((prompt, completion), (states, fates)) in enumerate(zip(judge.rows, plans, strict=True)):
        own = (judge.right(row, completion), len(prompt) + len(completion) - 1)
        outcomes = [[ends[fates[draw]] if draw in fates else own for draw in standing] for standing in states]
        correct = {state: sum(right for right, _ in those) for state, those in enumerate(outcomes)}
        correct[len(completion)] = config.n * own[0]
        critical = _critical(correct, len(completion), config)
        found.append(_Found(correct, critical, sum(cost for those in outcomes for _, cost in those)))
    return found


def _critical(correct: dict[int, int], length: int, config: RolloutConfig) -> int | None:
    """The token at which the count first falls to 0, the share staying at or under the threshold from there on."""
    lost = config.threshold * config.n
    if correct[length] or correct[0] <= lost:
        return None
    for state in range(1, length + 1):
        if correct[state] == 0 and all(correct[later] <= lost for later in range(state, length)):
            return state - 1
    return None


def _bisect(judge: _Judge, config: RolloutConfig, rng: random.Random) -> list[_Found]:
    # Draws are not shared here: which states are looked at depends on earlier outcomes, and draws chosen by their outcome
    # would no longer be fair ones.
    lost = config.threshold * config.n
    found = [_Found({len(ids): config.n * judge.right(row, ids)}) for row, (_, ids) in enumerate(judge.rows)]
    bounds = {row: (-1, len(judge.rows[row][1])) for row, f in enumerate(found) if not any(f.correct.values())}
    right = [(row, 0) for row in range(len(found)) if row not in bounds]

    def look(asked: list[tuple[int, int]]) -> None:
        counts = _count_right(judge, found, [(row, state, judge.next_tokens[row].any[state]) for row, state in asked])
        for (row, state), correct in zip(asked, counts, strict=True):
            found[row].correct[state] = correct

    while bounds:
        asked = [(row, 0 if low < 0 else (low + high) // 2) for row, (low, high) in bounds.items()]
        look(asked)
        for row, state in asked:
            low, high = bounds[row]
            is_lost = found[row].correct[state] <= lost
            bounds[row] = low, high = (low, state) if is_lost else (state, high)
            if state == 0 and is_lost:
                del bounds[row]  # lost from the start: no token is to blame
            elif high - low <= 1:
                found[row].critical = low
                del bounds[row]
    look(right)  # no token is to blame there either, but the columns have V_0
    return found


def _count_right(judge: _Judge, found: list[_Found], asked: Sequence[tuple[int, int, list[int]]]) -> list[int]:
    """Right continuations, per row and position, with each of these tokens there; what they cost goes to `found`."""
    ends = iter(judge.outcomes([Fork(row, position, token) for row, position, tokens in asked for token in tokens]))
    counts = []
    for row, _, tokens in asked:
        those = [next(ends) for _ in tokens]
        found[row].independent += sum(cost for _, cost in those)
        counts.append(sum(right for right, _ in those))
    return counts


def _draw_afresh(judge: _Judge, found: list[_Found]) -> dict[int, tuple[int, int | None]]:
    """`with_critical` and `without` of `Rollout`, for each row that has a critical token."""
    critical = [(row, f.critical) for row, f in enumerate(found) if f.critical is not None]
    fresh = judge.continuations.fresh_tokens
    # Behind the last token there is nothing to draw: a wrong completion is all that it leads to.
    asked = [(row, place + 1, [*fresh[row].any, []][place + 1]) for row, place in critical]
    asked += [(row, place, fresh[row].others[place]) for row, place in critical]
    counts = _count_right(judge, found, asked)
    both = zip(critical, counts[: len(critical)], counts[len(critical) :], strict=True)
    return {row: (kept, other if fresh[row].others[place] else None) for (row, place), kept, other in both}


def rollout_columns(side: str, rollout: Rollout, config: RolloutConfig) -> Record:
    """The columns `score_rollout` writes for one side of a pair."""
    values = rollout.values()
    steps = [after - before for before, after in zip(values, values[1:], strict=False)]
    if side == "chosen":
        weights = [max(0.0, step) for step in steps] if config.weight_chosen else [1.0] * rollout.length
    elif config.rule == "critical":
        weights = [float(position == rollout.critical) for position in range(rollout.length)]
    elif config.search == "bisection":
        weights = [max(0.0, -step) * (position == rollout.critical) for position, step in enumerate(steps)]
    else:
        weights = [max(0.0, -step) for step in steps]
    return {f"{side}_rollout_values": values[1:], f"{side}_weights": weights}


def score_rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    config: RolloutConfig | None = None,
    *,
    max_length: int | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The stage `align score rollout`: adds, per side, `rollout_values` (V after each token) and `weights`; per pair,
    `prompt_value` (V before the first token), `critical` (index of the rejected completion's critical token, or null),
    `critical_with`, `critical_without`: right ones of n fresh continuations with that token and of n with another in
    its place. Without `ks` they are the search's count of right ones after it (0 by construction in search `all`) and null.

    Chosen completions are rolled out with `weight_chosen` alone; otherwise their weights are 1.

    Args:
        model: the policy; where it has an adapter, that is on.
        pairs: pair records with `answer`.
        out_path: scored pairs, JSONL or Parquet.
        config: how to roll out.
        max_length: pairs whose prompt and longer completion exceed it are left out and counted.
        settings: what else the numbers depend on (hash of the model), for resuming.

    Returns:
        Counts: `rows`, `too_long`, `tokens`, `critical` (rejected completions that have a critical token),
        `lost_from_start`, `cut` (continuations that reached `max_new_tokens` without an end), `forward_tokens`,
        `independent_tokens`, `constant` (pairs with one weight for all tokens of each completion); where `ks` is given, `without_alternative` (critical tokens that the policy has no other
        for), and per k `pass@k with` and `pass@k without`.

    Raises:
        MissingColumnError: a pair has no answer to compare with.
        ConfigError: a completion that would be rolled out is longer than `max_new_tokens`.
    """
    config = config or RolloutConfig()
    for index, pair in enumerate(pairs):
        if not isinstance(pair.get("answer"), str) or not pair["answer"]:
            name = row_name(pair, index)
            raise MissingColumnError(
                f"pairs, {name}: no answer; a continuation is right where it ends in the answer. `align pair` keeps it"
            )
    check_records(pairs, "pair", source="pairs")
    sides = SIDES if config.weight_chosen else SIDES[1:]
    those = ((i, pair) for i, pair in enumerate(pairs) if max_length is None or pair_length(pair) <= max_length)
    named = ((f"pairs, {row_name(p, i)}: {side}", p[f"{side}_ids"]) for i, p in those for side in sides)
    _check_budget(named, config)

    def compute(number: int, part: list[Record]) -> list[Record]:
        rows = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in part for side in sides]
        answers = [pair["answer"] for pair in part for _ in sides]
        found = iter(roll_out(model, tokenizer, rows, answers, config, seed=derived_seed(config.seed, number)))
        added = []
        for pair in part:
            those = [next(found) for _ in sides]
            new: Record = {"_drawn": [[r.forward_tokens, r.independent_tokens, r.cut] for r in those]}
            if not config.weight_chosen:
                new["chosen_weights"] = [1.0] * len(pair["chosen_ids"])
            for side, rollout in zip(sides, those, strict=True):
                new |= rollout_columns(side, rollout, config)
            new |= {"prompt_value": rollout.values()[0], "critical": rollout.critical}
            added.append(new | {"critical_with": rollout.with_critical, "critical_without": rollout.without})
        return added

    drawn = [0.0, 0, 0]

    def finish(rows: Sequence[Record]) -> Iterator[Record]:
        for row in rows:
            drawn[:] = map(sum, zip(drawn, *row.pop("_drawn"), strict=True))
            yield row

    def count(rows: Sequence[Record]) -> dict[str, Any]:
        costs = {"forward_tokens": round(drawn[0]), "independent_tokens": drawn[1], "cut": drawn[2]}
        return _count(rows, config) | costs

    return score_stage(
        pairs, out_path, compute, model=model, max_length=max_length, stage="score rollout",
        settings=rollout_settings(config, settings), adds=("weights",), varies="weights", finish=finish,
        per_part=max(1, config.batch_size // config.n), count=count,
        fed=lambda pair: len(pair["prompt_ids"]) + config.max_new_tokens,
    )  # fmt: skip


def rollout_settings(config: RolloutConfig, settings: dict[str, Any] | None) -> dict[str, Any]:
    """What the output of `score_rollout` depends on besides pairs and `max_length`."""
    return {**{k: v for k, v in asdict(config).items() if k != "sampling"}, **(settings or {})}


def _count(rows: Sequence[Record], config: RolloutConfig) -> dict[str, Any]:
    lost = sum(row["prompt_value"] <= config.threshold for row in rows)
    found = [(row["critical_with"], row["critical_without"]) for row in rows if row["critical"] is not None]
    both = [drawn for drawn in found if drawn[1] is not None]
    counts: dict[str, Any] = {"critical": len(found), "lost_from_start": lost}
    if config.ks:
        counts["without_alternative"] = len(found) - len(both)
        for k in config.ks if both else ():
            for place, name in enumerate(("with", "without")):
                counts[f"pass@{k} {name}"] = fmean(pass_at_k(config.n, drawn[place], k) for drawn in both)
    return counts
