"""Contrastive scores of preference pairs: which tokens of a wrong solution are critical (cDPO, arXiv 2411.19943)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError, ModelMismatchError
from ..logps import Batch, Row, completion_logits, per_token
from ..losses import contrastive_scores
from ..records import Record
from .pairs import both_sides, score_stage

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def score_rows(
    model: PeftModel,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    positive: str = "positive",
    negative: str = "negative",
    beta: float = 1.0,
    max_tokens_per_batch: int = 8192,
) -> list[list[float]]:
    """Contrastive probability s_t of every completion token, from two adapters over one base.

    Args:
        model: base with the adapters `positive` and `negative`, in eval mode; neither is merged.
        rows: prompt and completion ids.
        beta: β_CE; the paper uses 1.

    Returns:
        One list per row, one number in [0, 1] per id of its completion; low = critical.

    Raises:
        ConfigError: β_CE is negative.
        ModelMismatchError: an adapter is missing.
    """
    if beta < 0:
        raise ConfigError(f"beta = {beta} must not be negative; the paper uses 1")
    for name in (positive, negative):
        if name not in getattr(model, "peft_config", {}):
            raise ModelMismatchError(f"the model has no adapter {name!r}; load both with align.models.load_adapters")

    def compute(batch: Batch) -> torch.Tensor:
        logits = (completion_logits(model, batch, adapter) for adapter in (positive, negative))
        return contrastive_scores(*logits, batch.token_ids, beta, batch.positions)

    return per_token(model, rows, compute, pad_token_id=pad_token_id, max_tokens_per_batch=max_tokens_per_batch)


def score_contrastive(
    model: PeftModel,
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    *,
    pad_token_id: int,
    beta: float = 1.0,
    max_length: int | None = None,
    max_tokens_per_batch: int = 8192,
    settings: dict | None = None,
) -> dict[str, int]:
    """The stage `align score contrastive`: adds `chosen_ce_scores` and `rejected_ce_scores` to pairs.

    Args:
        model: base with adapters named `positive` and `negative`.
        pairs: pair records.
        out_path: scored pairs, JSONL or Parquet.
        max_length: pairs whose prompt and longer completion exceed it are left out and counted.
        settings: what else the scores depend on (hashes of the adapters), for resuming.

    Returns:
        Counts: `rows`, `too_long`, `tokens`.
    """

    def compute(rows: list[Row]) -> dict[str, list[list[float]]]:
        options = {"pad_token_id": pad_token_id, "max_tokens_per_batch": max_tokens_per_batch}
        return {"ce_scores": score_rows(model, rows, beta=beta, **options)}

    return score_stage(
        pairs, out_path, both_sides(compute), model=model, max_length=max_length,
        stage="score contrastive", settings={"beta": beta, **(settings or {})},
    )  # fmt: skip
