"""What every scoring stage shares: pairs in, the same pairs with more token-level columns out."""

from __future__ import annotations

import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RecordError
from ..logps import Row
from ..models import vocab_size
from ..positions import check_positions, position_limit
from ..progress import DELAY, watched
from ..records import Record, check_records, row_name
from ..stages import records_hash, run_in_parts
from ..tokens import check_pair_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDES = ("chosen", "rejected")

#: Pairs per part: what at most is computed again after an interruption.
PAIRS_PER_PART = 256


def both_sides(
    compute: Callable[[list[Row]], Mapping[str, Sequence[list[float]]]],
) -> Callable[[int, list[Record]], list[Record]]:
    """Makes a part's computation of one that knows rows alone.

    Args:
        compute: rows of prompt and completion ids -> per column, without its side, one list of numbers per row.
    """

    def compute_part(_number: int, part: list[Record]) -> list[Record]:
        rows = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in part for side in SIDES]
        numbers = compute(rows)
        return [
            {
                f"{side}_{column}": values[2 * i + n]
                for column, values in numbers.items()
                for n, side in enumerate(SIDES)
            }
            for i in range(len(part))
        ]

    return compute_part


def score_stage(
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    compute: Callable[[int, list[Record]], list[Record]],
    *,
    model: PreTrainedModel,
    max_length: int | None,
    stage: str,
    settings: dict[str, Any],
    adds: Sequence[str] = (),
    varies: str | None = None,
    per_part: int = PAIRS_PER_PART,
    fed: Callable[[Record], int] | None = None,
    finish: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
    count: Callable[[Sequence[Record]], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Adds columns to pairs; checks every row before the first forward pass.

    Args:
        pairs: a list, or a `RecordFile`, of which a part is in memory at a time.
        compute: number of a part and its pairs -> per pair, the columns to add. See `both_sides`.
        model: for its vocabulary size.
        max_length: longest prompt and completion together, in tokens; longer pairs are left out and counted.
        settings: what the numbers depend on besides the pairs.
        adds: token-level columns, without their side, that the pairs must not have yet: a user's own must not vanish.
        varies: token-level column, without its side, that should differ between the tokens of a completion. Pairs in which
            it does not are counted, and warned of where they are most.
        per_part: pairs of a part.
        fed: most tokens of a sequence that the model gets for a pair; by default those of the prompt and the longer completion.
        finish, count: see `run_in_parts`; for numbers that depend on the whole data set, and further counts.

    Returns:
        Counts: `rows`, `too_long`, `tokens`, with `varies` `constant`, and what `count` gives.

    Raises:
        RecordError, MissingColumnError: a row does not fit the model or the schema.
    """
    check_records(pairs, "pair", source="pairs")
    size, limit = vocab_size(model), position_limit(model)
    remedy = "lower max_new_tokens" if fed else f"max_length = {limit}, which leaves longer pairs out and counts them"
    lengths, tokens = array("q"), array("q")
    for index, pair in enumerate(watched(pairs, f"{stage}: checking", delay=DELAY)):
        check_pair_ids(pair, index, size)
        present = [f"{side}_{column}" for side in SIDES for column in adds if f"{side}_{column}" in pair]
        if present:
            raise RecordError(
                f"pairs, row {index} (id {pair['id']!r}): has {', '.join(present)} already, which {stage} would replace; "
                "remove or rename them"
            )
        lengths.append(pair_length(pair))
        if max_length is None or lengths[-1] <= max_length:
            name = f"pairs, {row_name(pair, index)}: {'prompt and max_new_tokens' if fed else 'prompt and completion'}"
            check_positions(lengths[-1] if fed is None else fed(pair), limit, name, remedy)
        tokens.append(sum(len(pair[f"{side}_ids"]) for side in SIDES))
    kept = [index for index, length in enumerate(lengths) if max_length is None or length <= max_length]
    if not kept:
        raise RecordError(f"none of the {len(pairs)} pairs fits max_length = {max_length}; raise it or check the pairs")
    counts = {"too_long": len(pairs) - len(kept), "tokens": sum(tokens[index] for index in kept)}
    # Pairs of similar length share a part, so that batches within it carry little padding.
    by_length = array("q", sorted(kept, key=lambda index: -lengths[index]))
    parts = [by_length[i : i + per_part] for i in range(0, len(by_length), per_part)]

    def compute_part(number: int, part: Sequence[int]) -> list[Record]:
        those = [pairs[index] for index in part]
        added = compute(number, those)
        return [pair | new | {"_row": index} for index, pair, new in zip(part, those, added, strict=True)]

    seen = Counter({"constant": 0, "of": 0})

    def last_words(rows: Sequence[Record]) -> Iterable[Record]:
        for row in rows if finish is None else finish(rows):
            if varies is not None:
                numbers = [row[f"{side}_{varies}"] for side in SIDES]
                if all(len(values) > 1 for values in numbers):  # of one token there is nothing to compare
                    seen["of"] += 1
                    seen["constant"] += all(len(set(values)) == 1 for values in numbers)
            yield row
        if seen["constant"] > seen["of"] / 2:
            print(
                f"align: {stage}: in {seen['constant']} of {seen['of']} pairs all tokens of a completion have the same {varies}; "
                "there, they tell no token from another",
                file=sys.stderr,
            )

    def counted(rows: Sequence[Record]) -> dict[str, Any]:
        constant = {} if varies is None else {"constant": seen["constant"]}
        return counts | constant | dict(count(rows) if count else {})

    return run_in_parts(
        out_path,
        parts,
        compute_part,
        stage=stage,
        settings=score_settings(pairs, max_length, settings),
        order=lambda row: row.pop("_row"),
        finish=last_words,
        count=counted,
    )


def score_settings(pairs: Sequence[Record], max_length: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What a scoring stage's output depends on; with it `stages.is_complete` tells whether there is work left."""
    return {**settings, "pairs": records_hash(pairs), "max_length": max_length}


def pair_length(pair: Record) -> int:
    """Tokens of a pair's prompt and its longer completion."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
