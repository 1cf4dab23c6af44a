"""What every scoring stage shares: pairs in, the same pairs with one more token-level column out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RecordError
from ..logps import Row
from ..models import vocab_size
from ..records import Record, check_records
from ..stages import records_hash, run_in_parts
from ..tokens import check_pair_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Pairs per part: what at most is computed again after an interruption.
PAIRS_PER_PART = 256


def score_stage(
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    compute: Callable[[list[Row]], dict[str, list[list[float]]]],
    *,
    model: PreTrainedModel,
    max_length: int | None,
    stage: str,
    settings: dict[str, Any],
) -> dict[str, int]:
    """Adds token-level columns to pairs; checks every row before the first forward pass.

    Args:
        compute: rows of prompt and completion ids -> per column, without its side, one list of numbers per row.
        model: for its vocabulary size.
        max_length: longest prompt and completion together, in tokens; longer pairs are left out and counted.
        settings: what the numbers depend on besides the pairs.

    Returns:
        Counts: `rows`, `too_long`, `tokens`.

    Raises:
        RecordError, MissingColumnError: a row does not fit the model or the schema.
    """
    pairs = list(pairs)
    check_records(pairs, "pair", source="pairs")
    size = vocab_size(model)
    for index, pair in enumerate(pairs):
        check_pair_ids(pair, index, size)
    kept = [(index, pair) for index, pair in enumerate(pairs) if max_length is None or _length(pair) <= max_length]
    if not kept:
        raise RecordError(f"none of the {len(pairs)} pairs fits max_length = {max_length}; raise it or check the pairs")
    # Pairs of similar length share a part, so that batches within it carry little padding.
    kept.sort(key=lambda item: -_length(item[1]))
    parts = [kept[i : i + PAIRS_PER_PART] for i in range(0, len(kept), PAIRS_PER_PART)]

    def compute_part(_number: int, part: list[tuple[int, Record]]) -> list[Record]:
        rows = [(pair["prompt_ids"], pair[f"{side}_ids"]) for _, pair in part for side in ("chosen", "rejected")]
        numbers = compute(rows)
        return [
            pair
            | {f"chosen_{column}": values[2 * i] for column, values in numbers.items()}
            | {f"rejected_{column}": values[2 * i + 1] for column, values in numbers.items()}
            | {"_row": index}
            for i, (index, pair) in enumerate(part)
        ]

    return run_in_parts(
        out_path,
        parts,
        compute_part,
        stage=stage,
        settings=score_settings(pairs, max_length, settings),
        order=lambda row: row.pop("_row"),
        count=lambda rows: {
            "too_long": len(pairs) - len(rows),
            "tokens": sum(len(row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")),
        },
    )


def score_settings(pairs: Sequence[Record], max_length: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What a scoring stage's output depends on; with it `stages.is_complete` tells whether there is work left."""
    return {**settings, "pairs": records_hash(list(pairs)), "max_length": max_length}


def _length(pair: Record) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
