"""Reference log-probabilities of preference pairs, token by token, so that training needs no reference pass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..logps import Row, token_logps
from ..records import Record
from .pairs import both_sides, score_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_reference(
    model: PreTrainedModel,
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    *,
    pad_token_id: int,
    max_length: int | None = None,
    max_tokens_per_batch: int = 8192,
    settings: dict | None = None,
) -> dict[str, int]:
    """The stage `align score reference`: adds `chosen_ref_logps` and `rejected_ref_logps`, in nats, to pairs.

    Args:
        model: the reference policy; where it has an adapter, that is on.
        pairs: pair records; other token-level columns are kept.
        out_path: scored pairs, JSONL or Parquet.
        max_length: pairs whose prompt and longer completion exceed it are left out and counted.
        settings: what else the numbers depend on (hash of the model), for resuming.

    Returns:
        Counts: `rows`, `too_long`, `tokens`.
    """
    adapter = getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None

    def compute(rows: list[Row]) -> dict[str, list[list[float]]]:
        options = {"pad_token_id": pad_token_id, "max_tokens_per_batch": max_tokens_per_batch}
        return {"ref_logps": token_logps(model, rows, adapter=adapter, **options)}

    return score_stage(
        pairs, out_path, both_sides(compute), model=model, max_length=max_length,
        stage="score reference", settings=settings or {},
    )  # fmt: skip
